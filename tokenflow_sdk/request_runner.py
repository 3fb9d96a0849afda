"""`RequestRunner`: takes requests from several threads, and finishes each on the model that it was submitted to."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Generic, TypeVar

from tokenflow_sdk.errors import ArgumentError
from tokenflow_sdk.loaded_model import LoadedModel, Request

__all__ = ["RequestRunner"]

R = TypeVar("R", bound=Request)


class RequestRunner(Generic[R]):
    """Takes requests from several threads. Each is finished on the model that it was submitted to.

    Args:
        owner: the class that users know, for error messages.
        model: runs requests until `replace`.
    """

    def __init__(self, owner: str, model: LoadedModel[R]) -> None:
        self.model = model
        self._owner = owner
        self._process = os.getpid()
        self._replaced: list[LoadedModel[R]] = []
        self._closed = False

    def check(self, request: R) -> None:
        """Raise if a request could never run.

        Raises:
            ArgumentError: the model is closed, or was opened before a fork.
            PagesExhausted, PromptError: the request is too large.
        """
        self._require_usable()
        self.model.scheduler.check(request)

    @contextmanager
    def submitted(self, requests: Sequence[R]) -> Iterator[LoadedModel[R]]:
        """Submit requests, and drop them at the end of the block, finished or not.

        Raises:
            ArgumentError: the model is closed, or was opened before a fork.
            PagesExhausted, PromptError: a request could never run.
        """
        self._require_usable()
        for request in requests:
            self.model.scheduler.check(request)
        accepted = False
        while not accepted:
            model = self.model
            try:
                # Refused where the model was replaced or closed since.
                if accepted := model.submit(requests):
                    yield model
                else:
                    self._require_usable()
            finally:
                if os.getpid() == self._process:
                    model.drop(requests)

    def advance(self, model: LoadedModel[R], request: R, count: int) -> None:
        """Wait until `request.reached(count)`.

        Raises:
            ArgumentError: the model is closed, or was opened before a fork.
            BaseException: what made a step of this request fail.
        """
        self._require_usable()
        model.wait(request, count)

    def replace(self, model: LoadedModel[R]) -> None:
        """Run new requests on another model; the old one is closed after its last request."""
        old, self.model = self.model, model
        self._replaced = [*(each for each in self._replaced if not each.closed), old]
        old.retire()
        if self._closed:
            model.close(self._closed_error)

    def close(self) -> None:
        """Free the model after the step that is running. Closing twice is fine. In a forked child it does nothing."""
        if os.getpid() != self._process:
            return
        self._closed = True
        for model in (*self._replaced, self.model):
            model.close(self._closed_error)

    def _require_usable(self) -> None:
        if os.getpid() != self._process:
            raise ArgumentError(
                f"This {self._owner} was opened before this process was forked, and threads do not survive that.",
                f"Open it in the child process with {self._owner}.from_pretrained.",
            )
        if self._closed:
            raise self._closed_error()

    def _closed_error(self) -> ArgumentError:
        return ArgumentError(f"This {self._owner} is closed.", f"Make a new one with {self._owner}.from_pretrained.")
