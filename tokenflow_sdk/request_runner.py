"""Running requests of several threads on a model whose backend may be exchanged meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Generic, Protocol, TypeVar

from tokenflow_sdk.backends.session import Session
from tokenflow_sdk.errors import ArgumentError
from tokenflow_sdk.model.transformer import PagedTransformer

__all__ = ["LoadedModel", "Request", "RequestRunner", "Scheduler"]


class Request(Protocol):
    """Something that steps bring forward."""

    error: BaseException | None
    """Why it cannot go on: a step that it shared failed."""

    def reached(self, count: int) -> bool:
        """Whether it has brought forth `count` scales or tokens, or is finished with fewer."""


R_contra = TypeVar("R_contra", bound=Request, contravariant=True)
R = TypeVar("R", bound=Request)


class Scheduler(Protocol[R_contra]):
    """Requests over one loaded model. Not safe for several threads: its owner locks."""

    def check(self, request: R_contra, /) -> None:
        """Raise if a request could never run, even alone."""

    def submit(self, request: R_contra, /) -> None:
        """Take a request. Errors as in `check`."""

    def remove(self, request: R_contra, /) -> None:
        """Forget a request and free its pages."""

    def step(self) -> None:
        """Bring some requests forward."""


class LoadedModel(Generic[R]):
    """Sessions of all graphs, pages of keys and values, and the requests on them."""

    def __init__(self, sessions: Mapping[str, Session], transformer: PagedTransformer, scheduler: Scheduler[R]) -> None:
        self.sessions, self.transformer, self.scheduler = sessions, transformer, scheduler
        self.users = 0
        """Calls whose requests are here."""

    def close(self) -> None:
        """Free sessions and pages."""
        for session in self.sessions.values():
            session.close()
        self.transformer.close()


class RequestRunner(Generic[R]):
    """Takes requests from several threads. Each is finished on the model that it was submitted to.

    Every thread runs steps for whoever needs them while it waits for its own request, so there is no thread of ours.

    Args:
        owner: the class that users know, for error messages.
        model: runs requests until `replace`.
    """

    def __init__(self, owner: str, model: LoadedModel[R]) -> None:
        self.model = model
        self._owner = owner
        self._lock = threading.Lock()
        self._closed = False

    def check(self, request: R) -> None:
        """Raise if a request could never run, e.g. PagesExhausted or PromptError."""
        self.model.scheduler.check(request)

    @contextmanager
    def submitted(self, requests: Sequence[R]) -> Iterator[LoadedModel[R]]:
        """Submit requests, and remove them at the end of the block, finished or not.

        Raises:
            ArgumentError: the model is closed.
            PagesExhausted, PromptError: a request could never run.
        """
        with self._lock:
            self._require_open()
            model = self.model
            model.users += 1
        try:
            with self._lock:
                for request in requests:
                    model.scheduler.submit(request)
            yield model
        finally:
            with self._lock:
                for request in requests:
                    model.scheduler.remove(request)
                model.users -= 1
                if model is not self.model and not model.users:
                    model.close()

    def advance(self, model: LoadedModel[R], request: R, count: int) -> None:
        """Run steps, whoever they are for, until `request.reached(count)`.

        Raises:
            ArgumentError: the model is closed.
            BaseException: what made a step of this request fail.
        """
        while not request.reached(count):
            with self._lock:
                self._require_open()
                if request.error is not None:
                    raise request.error
                if not request.reached(count):
                    model.scheduler.step()

    def replace(self, model: LoadedModel[R]) -> None:
        """Run new requests on another model; the old one is closed after its last request."""
        with self._lock:
            old, self.model = self.model, model
            if not old.users:
                old.close()
            if self._closed:
                model.close()

    def close(self) -> None:
        """Free the model. Closing twice is fine."""
        with self._lock:
            self._closed = True
            self.model.close()

    def _require_open(self) -> None:
        if self._closed:
            raise ArgumentError(f"This {self._owner} is closed.", f"Make a new one with {self._owner}.from_pretrained.")
