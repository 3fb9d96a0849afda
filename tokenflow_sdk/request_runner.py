"""Runs the requests of several threads on a model whose backend may be changed meanwhile.

Steps run on a thread of the runner's own, which lives while somebody waits for a request. So an exception that belongs to a
caller's thread - Ctrl-C, a signal handler's timeout - never interrupts a step that others share, and a failure belongs to the
requests of its step alone. Callers only wait.

A stream that is dropped without being closed is cancelled by the garbage collector, at any line of any thread. So cancelling
takes no lock and changes no list of the scheduler: it puts the request on a queue that is emptied between steps.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Generic, Protocol, TypeVar

from tokenflow_sdk.backends.session import Session
from tokenflow_sdk.errors import ArgumentError, TokenFlowError
from tokenflow_sdk.model.transformer import PagedTransformer

__all__ = ["LoadedModel", "Progress", "Request", "RequestRunner", "Scheduler"]

LINGER = 0.05
"""Seconds that the thread waits for the next request before it ends: a stream asks for one token after another."""


class Progress:
    """How far the caller of a request wants it to be, and the signal that it is there."""

    def __init__(self) -> None:
        self.target = 0
        self.arrived = threading.Event()


class Request(Protocol):
    """Something that steps bring forward, by one scale or one token a step."""

    progress: Progress
    error: BaseException | None
    """What a step for this request raised; it cannot go on."""

    def reached(self, count: int) -> bool:
        """Whether it has `count` scales or tokens, or is finished with fewer."""


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

    def step(self) -> None:
        """Bring some requests forward. What fails becomes the `error` of the requests that it was for."""


class LoadedModel(Generic[R]):
    """Sessions of all graphs, pages of keys and values, the requests on them, and the thread that runs their steps.

    Only the thread uses the scheduler while a step runs, but for `check`; between steps, whoever holds the lock does.

    Args:
        sessions: by name of the graph.
        transformer: its pages.
        scheduler: without requests.
    """

    def __init__(self, sessions: Mapping[str, Session], transformer: PagedTransformer, scheduler: Scheduler[R]) -> None:
        self.sessions, self.transformer, self.scheduler = sessions, transformer, scheduler
        self.users = 0
        """Calls whose requests are here."""
        self._submitted: deque[Sequence[R]] = deque()
        self._dropped: deque[Sequence[R]] = deque()
        self._live: list[R] = []
        # Reentrant: the garbage collector and signal handlers run in the middle of a thread that may hold it.
        self._condition = threading.Condition(threading.RLock())
        self._thread: threading.Thread | None = None
        self._stepping = self._handing_over = False
        self._retiring = False
        self._why_closed: TokenFlowError | None = None
        self._closed = False
        self._open_sessions = list(sessions.values())

    def submit(self, requests: Sequence[R]) -> bool:
        """Queue requests of one call; False if the model is closing and takes no more."""
        with self._condition:
            accepted = not self._retiring and self._why_closed is None
            if accepted:
                self.users += 1
                self._submitted.append(requests)
        self._settle()
        return accepted

    def drop(self, requests: Sequence[R]) -> None:
        """Take back the requests of one call, and free their pages now or after the step that is running. Never waits."""
        self._dropped.append(requests)
        self._settle()

    def wait(self, request: R, count: int) -> None:
        """Wait until a request has `count` scales or tokens, is finished, or cannot go on.

        Raises:
            BaseException: what made a step of this request fail.
        """
        request.progress.target = count
        while not request.reached(count):
            if request.error is not None:
                raise request.error
            request.progress.arrived.clear()
            with self._condition:
                if self._thread is None and not self._closed:
                    # No daemon: at the end of the program one would be torn off inside a backend.
                    thread = threading.Thread(target=self._run, name="tokenflow-steps", daemon=False)
                    thread.start()
                    self._thread = thread
                self._condition.notify()
            self._settle()
            if request.error is None and not request.reached(count):
                request.progress.arrived.wait()

    def retire(self) -> None:
        """Take no more requests, and close after the last."""
        with self._condition:
            self._retiring = True
            self._condition.notify()
        self._settle()

    def close(self, why: TokenFlowError) -> None:
        """Free sessions and pages after the step that is running; requests that are not finished end with `why`."""
        with self._condition:
            self._why_closed = self._why_closed or why
            self._condition.notify()
            thread = self._thread
        self._settle()
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def _run(self) -> None:
        """Step while anybody waits for a request. Runs on the model's own thread."""
        while self._next_step():
            try:
                if not threading.main_thread().is_alive():
                    raise ArgumentError("The program ended before its requests did.", "Wait for them, or close the model.")
                self.scheduler.step()
            except BaseException as error:
                # A scheduler keeps failures with their requests. This one belongs to no request, so to all.
                for request in self._live:
                    request.error = request.error or error
        self._settle()

    def _next_step(self) -> bool:
        """Wait until somebody waits for a request, and begin a step; False when nobody did for a while."""
        with self._condition:
            self._stepping = False
            self._hand_over()
            if not self._wanted():
                self._condition.wait(LINGER)
                self._hand_over()
            self._stepping = self._wanted()
            if not self._stepping:
                self._thread = None
            return self._stepping

    def _wanted(self) -> bool:
        """Tell the callers whose requests have arrived, or failed; whether anybody waits for more."""
        wanted = False
        for request in list(self._live):
            if request.error is not None or request.reached(request.progress.target):
                request.progress.arrived.set()
            else:
                wanted = True
        return wanted

    def _settle(self) -> None:
        """Do what is due between steps, unless somebody else has the lock: they settle after they let go of it."""
        while self._due() and self._condition.acquire(blocking=False):
            try:
                busy = self._stepping or self._handing_over
                self._hand_over()
            finally:
                self._condition.release()
            if busy:
                return
        if self._closed:
            self._free()

    def _free(self) -> None:
        """Close sessions and pages, without the lock; several threads may do it together."""
        session: Session | None = None
        while self._open_sessions:
            with suppress(IndexError):
                session = self._open_sessions.pop()
            if session is not None:
                session.close()
        self.transformer.close()

    def _due(self) -> bool:
        closing = self._why_closed is not None or (self._retiring and not self.users)
        return bool(self._submitted or self._dropped) or (closing and not self._closed)

    def _hand_over(self) -> None:
        """Hand submitted and dropped requests to the scheduler, and mark the model as closed if that is due.

        The lock is held. Does nothing within a step or within itself: then the garbage collector or a signal handler called it,
        and its work is done by the loop that it interrupts, or after the step.
        """
        while self._due() and not (self._stepping or self._handing_over):
            self._handing_over = True
            try:
                if self._submitted:
                    self._take(self._submitted.popleft())
                elif self._dropped:
                    self._give_back(self._dropped.popleft())
                else:
                    self._end()
            finally:
                self._handing_over = False

    def _take(self, requests: Sequence[R]) -> None:
        for request in requests:
            self._live.append(request)
            try:
                self.scheduler.submit(request)
            except BaseException as error:
                request.error = error

    def _give_back(self, requests: Sequence[R]) -> None:
        for request in requests:
            if request in self._live:
                self._live.remove(request)
                self.scheduler.remove(request)
        self.users -= 1

    def _end(self) -> None:
        for request in self._live:
            self.scheduler.remove(request)
            request.error = request.error or self._why_closed
            request.progress.arrived.set()
        self._live.clear()
        self._closed = True


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
        self._lock = threading.RLock()
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
        model = self.model
        for request in requests:
            model.scheduler.check(request)
        while not model.submit(requests):
            # It was replaced or closed since.
            self._require_usable()
            model = self.model
        try:
            yield model
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
        with self._lock:
            old, self.model = self.model, model
            closed = self._closed
        old.retire()
        if closed:
            model.close(self._closed_error())

    def close(self) -> None:
        """Free the model after the step that is running. Closing twice is fine."""
        with self._lock:
            self._closed = True
            model = self.model
        model.close(self._closed_error())

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
