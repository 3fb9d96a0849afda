"""`LoadedModel`: a model on one backend, and the requests of several threads on it.

Steps run on a thread of the model, which lives while somebody waits for a request. So an exception that belongs to a caller's
thread - Ctrl-C, a signal handler's timeout - never interrupts a step that others share, and a failure belongs to the requests
of its step alone. Callers only wait.

A stream that is dropped without being closed is cancelled by the garbage collector, at any line of any thread, and a signal
handler may run at any line of the main thread. So callers never wait for a lock: what they submit and drop goes onto a queue,
which is emptied by whoever can take the lock at once, and otherwise by whoever has it.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from time import perf_counter
from typing import Generic, Literal, Protocol, TypeVar

from tokenflow_sdk.arguments import real
from tokenflow_sdk.backends.session import Session
from tokenflow_sdk.errors import ArgumentError, RequestCancelledError, RequestTimeoutError, TokenFlowError
from tokenflow_sdk.model.kv_cache import PageTable
from tokenflow_sdk.model.transformer import PagedTransformer

__all__ = ["LoadedModel", "Progress", "Request", "Scheduler", "cancelled"]

LINGER = 0.05
"""Seconds that the thread waits for the next request before it ends: a stream asks for one token after another."""


class Signal:
    """A flag that one thread waits for. Each method is a single call into C, so nothing can interrupt it half-way."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()

    def set(self) -> None:
        """Let `wait` return, now or the next time."""
        with suppress(RuntimeError):
            self._lock.release()

    def clear(self) -> None:
        """Take back a `set` that nobody waited for."""
        self._lock.acquire(blocking=False)

    def wait(self, timeout: float = -1) -> bool:
        """Wait for `set`, and clear it; False after `timeout` seconds without one."""
        return self._lock.acquire(timeout=timeout)


class Progress:
    """How far the caller of a request wants it to be and until when, and the signal that it is there.

    Args:
        timeout: seconds that the request may take, or None.
        began: when they begin, in seconds of `perf_counter`; None: now.

    Raises:
        ArgumentError: a timeout that is no time.
    """

    def __init__(self, timeout: float | None = None, began: float | None = None) -> None:
        hint = "Give seconds, or None for no limit."
        self.timeout = None if timeout is None else real("timeout", timeout, 0, math.inf, "is no time to wait.", hint)
        self._began = perf_counter() if began is None else began
        self.cancelled = False
        self.target = 0
        self.daemon = False
        """Whether the thread that waits is a daemon, for which no program goes on."""
        self.arrived = Signal()

    @property
    def remaining(self) -> float | None:
        """Seconds until the request is given up, not less than 0; None: it is not."""
        return None if self.timeout is None else max(0.0, self._began + self.timeout - perf_counter())

    def cancel(self) -> None:
        """Have the thread that waits, now or later, give the request up. Any thread may call this, and a signal handler."""
        self.cancelled = True
        self.arrived.set()

    def late(self) -> RequestTimeoutError:
        """The error of a request whose time has run out."""
        return RequestTimeoutError(
            f"The request was not finished within timeout={self.timeout:g} seconds.",
            "Give it more time, ask for less, or send fewer requests at once.",
        )


class Request(Protocol):
    """Something that steps bring forward, by one scale or one token a step."""

    progress: Progress
    error: BaseException | None
    """What a step for this request raised; it cannot go on."""

    def reached(self, count: int) -> bool:
        """Whether it has `count` scales or tokens, or is finished with fewer. Asked by other threads in the middle of steps."""


R_contra = TypeVar("R_contra", bound=Request, contravariant=True)
R = TypeVar("R", bound=Request)


class Scheduler(Protocol[R_contra]):
    """Requests over one loaded model. `check` is called from any thread, everything else by one thread at a time."""

    def check(self, request: R_contra, /) -> None:
        """Raise if a request could never run, even alone."""

    def submit(self, request: R_contra, /) -> None:
        """Queue a request that `check` accepts."""

    def remove(self, request: R_contra, /) -> None:
        """Drop a request and free its pages. Dropping a finished request does nothing."""

    def kept(self) -> list[PageTable]:
        """Prefixes that are kept for later requests and given up when pages are needed. Called from any thread."""

    def step(self) -> None:
        """Bring some requests forward. What fails becomes the `error` of the requests that it was for."""


class LoadedModel(Generic[R]):
    """Sessions of all graphs, pages of keys and values, the requests on them, and the thread that runs their steps.

    Whoever has the lock uses the scheduler, but for `check`: the thread while it steps, and others for a moment between steps.

    Args:
        sessions: by name of the graph.
        transformer: its pages.
        scheduler: without requests.
    """

    def __init__(self, sessions: Mapping[str, Session], transformer: PagedTransformer, scheduler: Scheduler[R]) -> None:
        self.sessions, self.transformer, self.scheduler = sessions, transformer, scheduler
        self._queue: deque[tuple[Literal["submit", "drop"], Sequence[R]]] = deque()
        self._calls: list[Sequence[R]] = []
        self._live: list[R] = []
        self._lock = threading.Lock()
        self._holder: int | None = None
        """The thread that has the lock."""
        self._gate = threading.RLock()
        """Held for the moment in which a submission is accepted or the model is closed for good."""
        self._stepping = threading.Lock()
        """Held by the thread that steps: there is never more than one."""
        self._wake = Signal()
        self._retiring = self.closed = False
        self._why_closed: Callable[[], TokenFlowError] | None = None
        self._open: list[Session | PagedTransformer] = [transformer, *sessions.values()]

    @property
    def users(self) -> int:
        """Calls whose requests are here."""
        return len(self._calls)

    def submit(self, requests: Sequence[R]) -> bool:
        """Queue the requests of one call; False if the model is closing and takes no more."""
        with self._gate:
            accepted = not (self._retiring or self.closed or self._why_closed)
            if accepted:
                self._queue.append(("submit", requests))
        self._settle()
        return accepted

    def drop(self, requests: Sequence[R]) -> None:
        """Take back the requests of one call, and free their pages now or after the step that is running. Never waits."""
        self._queue.append(("drop", requests))
        self._settle()

    def wait(self, request: R, count: int) -> None:
        """Wait until a request has `count` scales or tokens, is finished, or cannot go on.

        Raises:
            ArgumentError: the program has ended, or a signal handler interrupted this thread where waiting would be for ever.
            RequestTimeoutError: its time has run out.
            RequestCancelledError: it was cancelled meanwhile.
            BaseException: what made a step of this request fail.
        """
        progress = request.progress
        progress.daemon = threading.current_thread().daemon
        progress.target = count
        while True:
            progress.arrived.clear()
            if request.reached(count):
                return
            if progress.cancelled:
                raise cancelled()
            if request.error is not None:
                raise request.error
            if self.closed:
                raise self._closed_error()
            if self._holder == threading.get_ident():
                raise ArgumentError(
                    "The model is busy in the thread that a signal handler interrupted.", "Try again afterwards."
                )
            remaining = progress.remaining
            if remaining == 0:
                request.error = progress.late()
                raise request.error
            self._serve(progress)
            progress.arrived.wait(-1 if remaining is None else min(remaining, threading.TIMEOUT_MAX))

    def retire(self) -> None:
        """Take no more requests, and close after the last."""
        self._retiring = True
        self._settle()

    def close(self, why: Callable[[], TokenFlowError]) -> None:
        """Free sessions and pages after the step that is running; requests that are not finished end with `why`."""
        self._why_closed = self._why_closed or why
        self._wake.set()
        self._settle()
        # A signal handler or finaliser must not wait for the lock that the very thread holds which it interrupted.
        if not self.closed and self._holder != threading.get_ident():
            with self._lock:
                self._holder = threading.get_ident()
                try:
                    self._hand_over()
                finally:
                    self._holder = None
            self._settle()

    def _serve(self, progress: Progress) -> None:
        """Have a thread step, as long as the program runs."""
        if progress.daemon and not threading.main_thread().is_alive():
            raise _ended()
        self._wake.set()
        if not self._stepping.locked():
            # No daemon: at the end of the program one would be torn off inside a backend.
            threading.Thread(target=self._run, name="tokenflow-steps", daemon=False).start()

    def _run(self) -> None:
        """Step while anybody waits for a request. Another thread that does so already makes this one superfluous."""
        while self._stepping.acquire(blocking=False):
            try:
                while self._step() or (self._may_linger() and self._wake.wait(LINGER)):
                    pass
            finally:
                self._stepping.release()
            self._settle()
            # Whoever began to wait before the release relies on this thread, whoever begins later starts another. The queue
            # comes first: what has just left it is among the live requests.
            if not (self._queue or self._wanting()):
                return

    def _may_linger(self) -> bool:
        return not self.closed and threading.main_thread().is_alive()

    def _step(self) -> bool:
        """Empty the queue, step if anybody waits for it, and tell who has arrived; whether there is more to do."""
        with self._lock:
            self._holder = threading.get_ident()
            try:
                self._hand_over()
                self._give_up_late()
                wanting = self._wanting()
                if wanting and not threading.main_thread().is_alive() and all(r.progress.daemon for r in wanting):
                    self._fail(_ended())
                elif wanting:
                    self.scheduler.step()
            except BaseException as error:
                # A scheduler keeps failures with their requests. This one belongs to no request, so to all.
                self._fail(error)
            try:
                for request in list(self._live):
                    if request.error is not None or request.reached(request.progress.target):
                        request.progress.arrived.set()
                return bool(self._wanting() or self._queue)
            finally:
                # Last of all: who closes from a finaliser on this thread must see that it has the lock.
                self._holder = None

    def _wanting(self) -> list[R]:
        """Requests whose callers wait for more than there is."""
        return [r for r in list(self._live) if r.error is None and not r.reached(r.progress.target)]

    def _give_up_late(self) -> None:
        """Free the pages of requests whose time has run out, also of those that nobody waits for at the moment."""
        for request in self._live:
            if request.error is None and request.progress.remaining == 0:
                request.error = request.progress.late()
                self.scheduler.remove(request)

    def _fail(self, error: BaseException) -> None:
        for request in list(self._live):
            request.error = request.error or error
            request.progress.arrived.set()

    def _settle(self) -> None:
        """Empty the queue, and close if that is due, unless somebody else has the lock: they do it when they let go of it."""
        while (self._queue or self._is_closing()) and self._lock.acquire(blocking=False):
            self._holder = threading.get_ident()
            try:
                self._hand_over()
            finally:
                self._holder = None
                self._lock.release()
        if self.closed:
            self._free()

    def _is_closing(self) -> bool:
        return not self.closed and (self._why_closed is not None or (self._retiring and not self._calls))

    def _hand_over(self) -> None:
        """Hand what is queued to the scheduler, and mark the model as closed if that is due. The lock is held."""
        while self._queue:
            # Taken off the queue when it is done: Ctrl-C in the middle leaves it there, and each part may be done again.
            kind, requests = self._queue[0]
            if kind == "submit":
                self._take(requests)
            else:
                self._give_back(requests)
            self._queue.popleft()
        with self._gate:
            if self._is_closing() and not self._queue:
                self._end()

    def _take(self, requests: Sequence[R]) -> None:
        for request in requests:
            if request in self._live:
                continue
            try:
                self.scheduler.submit(request)
            except Exception as error:
                request.error = error
            self._live.append(request)
        if not any(call is requests for call in self._calls):
            self._calls.append(requests)

    def _give_back(self, requests: Sequence[R]) -> None:
        for request in requests:
            if request in self._live:
                try:
                    self.scheduler.remove(request)
                except Exception as error:
                    self._fail(error)
                self._live.remove(request)
        self._calls = [call for call in self._calls if call is not requests]

    def _end(self) -> None:
        for request in self._live:
            self.scheduler.remove(request)
            request.error = request.error or self._closed_error()
            request.progress.arrived.set()
        self._live.clear()
        self.closed = True

    def _closed_error(self) -> TokenFlowError:
        return self._why_closed() if self._why_closed else ArgumentError("The model was changed meanwhile.", "Ask again.")

    def _free(self) -> None:
        """Close sessions, then the pages, without the lock. Several threads may do it together; each is closed by one."""
        while True:
            try:
                closing = self._open.pop()
            except IndexError:
                return
            try:
                closing.close()
            except BaseException:
                self._free()
                raise


def cancelled() -> RequestCancelledError:
    """The error of reading a stream that was closed."""
    return RequestCancelledError("This stream was closed before its end.", "Read it to its end, or ask again.")


def _ended() -> ArgumentError:
    return ArgumentError("The program ended before its requests did.", "Wait for them, or close the model.")
