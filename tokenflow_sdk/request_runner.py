"""`RequestRunner`: takes requests from several threads, and finishes each on the model that it was submitted to.

`RequestStream` is what the caller of a request gets who wants to see it grow, or to cancel it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Generic, NoReturn, TypeVar

from tokenflow_sdk.errors import ArgumentError
from tokenflow_sdk.loaded_model import LoadedModel, Request, cancelled

__all__ = ["RequestRunner", "RequestStream"]

R = TypeVar("R", bound=Request)
Piece = TypeVar("Piece")
Result = TypeVar("Result")
S = TypeVar("S", bound="RequestStream[Any, Any]")


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
            RequestTimeoutError: its time has run out.
            RequestCancelledError: it was cancelled meanwhile.
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


class RequestStream(Iterator[Piece], Generic[Piece, Result]):
    """What comes of a request, piece by piece as it is found. It begins with the first piece that is asked for.

    One thread reads it. `close`, from any thread, cancels the request; so does dropping it, and the end of a `with` block.

    Args:
        request: what is run.
        pieces: runs it, and drops it at its end. It must not refer to the stream, so that it ends as soon as nobody has that.
        result: everything together, once `pieces` has ended.
    """

    def __init__(self, request: Request, pieces: Generator[Piece, None, None], result: Callable[[], Result]) -> None:
        self._request, self._pieces, self._result = request, pieces, result
        self._ended = False

    def __reduce__(self) -> NoReturn:
        raise ArgumentError("A stream stays where its model runs, so it cannot be copied or pickled.", "Send its result().")

    def __next__(self) -> Piece:
        """The next piece.

        Raises:
            StopIteration: there is none.
            RequestTimeoutError: the time of the request has run out.
            RequestCancelledError: the stream was closed.
            ArgumentError: another thread reads it, or the model is closed.
        """
        if self._request.progress.cancelled and not self._ended:
            raise self._request.error or cancelled()
        try:
            return next(self._pieces)
        except StopIteration:
            self._ended = True
            raise
        except BaseException as error:
            if _is_running(error):
                raise ArgumentError(
                    "Another thread is reading this stream.", "Read it in one thread; any may close it."
                ) from None
            # Nothing comes of it any more, and reading on must not look like its end.
            self._request.progress.cancel()
            raise

    def result(self) -> Result:
        """Run the request to its end, and return what it gives without streaming. Errors as in reading the stream."""
        for _ in self:
            pass
        return self._result()

    def close(self) -> None:
        """Cancel the request unless the stream was read to its end; its pages are free after the step that is running.

        A thread that is waiting for the next piece gets a `RequestCancelledError`.
        """
        if not self._ended:
            self._request.progress.cancel()
        try:
            self._pieces.close()
        except ValueError as error:
            # Another thread is in it, or the one that a signal handler interrupted: it leaves by what was just set.
            if not _is_running(error):
                raise

    def __enter__(self: S) -> S:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()


def _is_running(error: BaseException) -> bool:
    return isinstance(error, ValueError) and str(error) == "generator already executing"
