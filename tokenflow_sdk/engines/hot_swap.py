"""Hot swap: serves from one backend while another is being prepared, then switches to it without dropping a call."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from tokenflow_sdk.backends.session import Array, OpenSession, Session, SessionOptions, Tensor
from tokenflow_sdk.bundle.schema import GraphEntry

__all__ = ["EngineSwap", "SwappingSession", "SwappingSessions"]


class SwappingSession(Session):
    """A session that can be switched to another session for the same graph while calls are running.

    Running calls finish on the session they started on, which is closed after the last of them.

    Args:
        first: runs the calls until `swap`.
    """

    def __init__(self, first: Session) -> None:
        super().__init__(first.inputs, first.outputs)
        self._lock = threading.Lock()
        self._current = first
        self._calls: dict[Session, int] = {}
        self._closed = False

    @property
    def device(self) -> str:
        return self._current.device

    def swap(self, session: Session) -> None:
        """Run all later calls on `session`. It is closed at once if this session is closed already."""
        with self._lock:
            old, self._current = self._current, session
            idle = not self._calls.get(old)
        if idle:
            old.close()
        if self._closed:
            session.close()

    def _infer(self, feeds: Mapping[str, Tensor], outputs: tuple[str, ...]) -> Sequence[Array]:
        with self._use() as session:
            found = session.run(feeds, outputs)
        return [found[name] for name in outputs]

    @contextmanager
    def _use(self) -> Iterator[Session]:
        with self._lock:
            session = self._current
            self._calls[session] = self._calls.get(session, 0) + 1
        try:
            yield session
        finally:
            with self._lock:
                self._calls[session] -= 1
                left = self._calls[session] == 0
                if left:
                    del self._calls[session]
                last = left and (self._closed or session is not self._current)
            if last:
                session.close()

    def close(self) -> None:
        """Close the current session: now, or after its last running call."""
        with self._lock:
            self._closed = True
            idle = not self._calls.get(self._current)
        if idle:
            self._current.close()


class EngineSwap:
    """Prepares engines on a background thread, and then switches to them.

    An error in either step is logged, and serving goes on without the engines.

    Args:
        prepare: builds and certifies the engines.
        swap: switches to them.
    """

    def __init__(self, prepare: Callable[[], object], swap: Callable[[], None]) -> None:
        self._prepare, self._swap = prepare, swap
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="tokenflow-engines", daemon=True)
        self._thread.start()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the engines are in use, for at most `timeout` seconds (None: without limit).

        Returns:
            Whether the engines are in use.

        Raises:
            Exception: the error that ended the preparation or the swap.
        """
        self._thread.join(timeout)
        if self._error is not None:
            raise self._error
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            self._prepare()
            self._swap()
        except Exception as error:
            self._error = error
            logging.getLogger("tokenflow_sdk").warning("Going on without TensorRT engines: %s", error)


class SwappingSessions:
    """Opens sessions on one backend, and can later switch them, and all that are opened afterwards, to another backend.

    Args:
        first: opens sessions until `swap`.
    """

    def __init__(self, first: OpenSession) -> None:
        self._open_session = first
        self._lock = threading.Lock()
        self._swapped = False
        self._opened: list[tuple[SwappingSession, Path, GraphEntry, SessionOptions]] = []

    def open(self, path: Path, entry: GraphEntry, options: SessionOptions) -> Session:
        """Open a session on the current backend. An `OpenSession`; errors as that of the backend."""
        with self._lock:
            session = self._open_session(path, entry, options)
            if self._swapped:
                return session
            swapping = SwappingSession(session)
            self._opened.append((swapping, path, entry, options))
            return swapping

    def swap(self, open_session: OpenSession) -> None:
        """Reopen every open session with `open_session`, switch to the new ones, and use it for later sessions too."""
        with self._lock:
            for session, path, entry, options in self._opened:
                session.swap(open_session(path, entry, options))
            self._open_session, self._swapped = open_session, True
            self._opened.clear()
