"""What `Generator` and `Understander` share: a language model on some engine, who uses it, and changing over to another."""

from __future__ import annotations

import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Any, Generic, Protocol, TypeVar

from tokenflow_sdk.backends.base import OpenSession, Session, SessionOptions, open_onnxruntime
from tokenflow_sdk.backends.choice import EngineOptions, Needs, choose
from tokenflow_sdk.backends.swapping import EngineSwap
from tokenflow_sdk.bundle import Bundle
from tokenflow_sdk.config import GeneratorConfig, UnderstanderConfig
from tokenflow_sdk.engine_jobs import pool_pages
from tokenflow_sdk.errors import ArgumentError
from tokenflow_sdk.pairing import require_tokenizer, tokenizer_of
from tokenflow_sdk.tokenizer import Tokenizer
from tokenflow_sdk.transformer import PagedTransformer

__all__ = ["PagedModel", "Running"]

M = TypeVar("M", bound="PagedModel[Any, Any]")
C = TypeVar("C", bound="GeneratorConfig | UnderstanderConfig")


class Queue(Protocol):
    """Requests, and steps that bring some of them forward."""

    def submit(self, request: Any, /) -> None: ...

    def remove(self, request: Any, /) -> None: ...

    def step(self) -> None: ...


S = TypeVar("S", bound=Queue)


class Running(Generic[S]):
    """Sessions of all graphs, pages, and the requests on them. Not safe for several threads: its owner locks."""

    def __init__(self, sessions: Mapping[str, Session], transformer: PagedTransformer, scheduler: S) -> None:
        self.sessions, self.transformer, self.scheduler = sessions, transformer, scheduler
        self.users = 0
        """Calls whose requests are here."""

    def close(self) -> None:
        for session in self.sessions.values():
            session.close()
        self.transformer.close()


class PagedModel(ABC, Generic[C, S]):
    """A language model over pages. Requests may come from several threads; each ends on the engines that it began on.

    Args:
        bundle: whose graphs.
        tokenizer: the one that it was exported with.
        options: of sessions.
        pages: pages in the pool, if the engine does not say; None: `default_pages`.
        page_size: tokens in a page.
        open_session: gives the engines.

    Raises:
        ArgumentError: a pool that holds nothing.
        CodebookMismatchError: the tokenizer has another codebook.
    """

    def __init__(
        self,
        bundle: Bundle[C],
        tokenizer: Tokenizer,
        options: SessionOptions,
        pages: int | None,
        page_size: int,
        open_session: OpenSession,
    ) -> None:
        if page_size < 1 or (pages is not None and pages < 1):
            raise ArgumentError(f"pages={pages}, page_size={page_size} hold nothing.", "Give at least 1 of each.")
        require_tokenizer(tokenizer, bundle.config, bundle.path)
        self.bundle = bundle
        self.tokenizer = tokenizer
        self._options, self._pages, self._page_size = options, pages, page_size
        self._lock = threading.Lock()
        self._closed = False
        self._swap: EngineSwap | None = None
        self._running = self._open(open_session)

    @classmethod
    def _open_pretrained(
        cls: type[M],
        bundle: Bundle[Any],
        tokenizer: Tokenizer | str | os.PathLike[str] | None,
        options: SessionOptions,
        wanted: EngineOptions,
        pages: int | None,
        page_size: int,
    ) -> M:
        """The model, and its tokenizer if only a name of it is given, on the engines that are wanted."""
        bundle.verify()
        tokenizer = tokenizer_of(bundle, tokenizer, options, wanted)
        needs = Needs(pages=pages, page_size=page_size)
        if not wanted.serve_while_building:
            open_session, options = choose(bundle, options, wanted, needs)
            return cls(bundle, tokenizer, options, pages, page_size, open_session)
        engines = wanted.engines(bundle, options, needs)
        # As many pages as the engines will have: what fits now fits after the change.
        model = cls(bundle, tokenizer, options, pool_pages(bundle.config, engines.plan), page_size, open_onnxruntime)
        model._swap = EngineSwap(engines.prepare, lambda: model._move(engines.open))
        return model

    @staticmethod
    @abstractmethod
    def _default_pages(config: C, page_size: int) -> int:
        """Pages of a pool whose size nobody gave."""

    @abstractmethod
    def _schedule(self, sessions: Mapping[str, Session], transformer: PagedTransformer) -> S:
        """An empty queue over some sessions."""

    @property
    def config(self) -> C:
        """Sizes of this model."""
        return self.bundle.config

    @property
    def device(self) -> str:
        """Where the transformer runs, e.g. `cpu` or `cuda:0`."""
        return self._running.sessions["transformer"].device

    @property
    def token_forwards(self) -> int:
        """Tokens run through the transformer so far; counted anew after changing over to other engines."""
        return self._running.transformer.token_forwards

    def wait_for_engines(self, timeout: float | None = None) -> bool:
        """Whether new requests run on their engines, after at most `timeout` seconds; see `Tokenizer.wait_for_engines`."""
        done = self._swap is None or self._swap.wait(timeout)
        return self.tokenizer.wait_for_engines(timeout) and done

    def close(self) -> None:
        """Free the engines, not the tokenizer. Closing twice is fine; anything else afterwards raises ArgumentError."""
        with self._lock:
            self._closed = True
            self._running.close()

    def __enter__(self: M) -> M:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def _open(self, open_session: OpenSession) -> Running[S]:
        bundle = self.bundle
        with ExitStack() as opened:
            sessions = {
                name: opened.enter_context(open_session(bundle.path / entry.files[0].name, entry, self._options))
                for name, entry in bundle.graphs.items()
            }
            pages = self._pages or self._default_pages(bundle.config, self._page_size)
            transformer = PagedTransformer.of(bundle.config, sessions["transformer"], pages, self._page_size)
            scheduler = self._schedule(sessions, transformer)
            opened.pop_all()
        return Running(sessions, transformer, scheduler)

    def _move(self, open_session: OpenSession) -> None:
        """Run new requests on other engines; those under way end where they began."""
        running = self._open(open_session)
        with self._lock:
            old, self._running = self._running, running
            if not old.users:
                old.close()
            if self._closed:
                running.close()

    @contextmanager
    def _submitted(self, requests: Sequence[Any]) -> Iterator[Running[S]]:
        """Requests from their submission until they end, on the engines that are current now."""
        with self._lock:
            self._check_open()
            running = self._running
            running.users += 1
        try:
            with self._lock:
                for request in requests:
                    running.scheduler.submit(request)
            yield running
        finally:
            with self._lock:
                for request in requests:
                    running.scheduler.remove(request)
                running.users -= 1
                if running is not self._running and not running.users:
                    running.close()

    def _check_open(self) -> None:
        if self._closed:
            name = type(self).__name__
            raise ArgumentError(f"This {name} is closed.", f"Make a new one with {name}.from_pretrained.")
