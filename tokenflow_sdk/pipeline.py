"""Encodes many pictures: threads decode some while the engine encodes others, and codes come in the pictures' order."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import closing, suppress
from functools import partial
from math import ceil
from queue import Empty, SimpleQueue
from threading import BoundedSemaphore, Thread, local
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from tokenflow_sdk.errors import ArgumentError, TokenFlowError
from tokenflow_sdk.pictures.codes import Codes
from tokenflow_sdk.pictures.preparation import Preparation
from tokenflow_sdk.pictures.sources import ImageSource, kept

__all__ = ["Pipeline", "Prepared", "encode_ahead", "map_ahead"]

T = TypeVar("T")
R = TypeVar("R")
P = TypeVar("P")

_POLL = 0.2
"""Seconds at most before Ctrl-C is seen where calls may hang."""


class Prepared(NamedTuple):
    """Pixels of the tokenizer's size, u8 [H, W, 3], and how they were made from a picture, where that is known."""

    pixels: NDArray[np.uint8]
    preparation: Preparation | None


class Pipeline(NamedTuple):
    """How many pictures are encoded.

    Args:
        prepare: reads a picture; called by several threads at once.
        encode: codes of prepared pictures, at most `batch` of them; called by `lanes` threads at once.
        batch: pictures in one call of the engine.
        workers: threads that read pictures while others wait for the engine.
        lanes: calls of the engine at once.
    """

    prepare: Callable[[ImageSource], Prepared]
    encode: Callable[[Sequence[Prepared]], list[Codes]]
    batch: int
    workers: int
    lanes: int

    def codes(self, images: Iterable[ImageSource], raising: bool) -> Generator[Codes | TokenFlowError, None, None]:
        """The codes of each picture, in order; or the error of one that cannot be used, which is raised if `raising`."""
        taken = (self._taken(image) for image in images)
        results = encode_ahead(self._read, self._encoded, taken, self.batch, self.workers, self.lanes)
        with closing(results):
            for codes in results:
                if raising and isinstance(codes, TokenFlowError):
                    raise codes
                yield codes

    def _encoded(self, batch: Sequence[Prepared | TokenFlowError]) -> list[Codes | TokenFlowError]:
        good = [each for each in batch if isinstance(each, Prepared)]
        found = iter(self.encode(good) if good else ())
        return [next(found) if isinstance(each, Prepared) else each for each in batch]

    def _taken(self, image: ImageSource) -> ImageSource | Prepared | TokenFlowError:
        """What a thread can use later, whatever the caller does with the picture meanwhile."""
        try:
            own = kept(image)
        except TokenFlowError as error:
            return error
        return self._read(image) if own is None else own

    def _read(self, image: ImageSource | Prepared | TokenFlowError) -> Prepared | TokenFlowError:
        if isinstance(image, (Prepared, TokenFlowError)):
            return image
        try:
            return self.prepare(image)
        except TokenFlowError as error:
            return error


def encode_ahead(
    prepare: Callable[[T], P],
    encode: Callable[[Sequence[P]], Iterable[R]],
    items: Iterable[T],
    batch: int,
    workers: int,
    lanes: int,
) -> Generator[R, None, None]:
    """Prepare items by threads while others are encoded, and yield the results in the items' order.

    Items are read by the thread that reads the results, as by `map_ahead`, and what is raised comes as there.

    Args:
        prepare: called by `workers` threads at once.
        encode: gives a result for each of at most `batch` prepared items; called by `lanes` threads at once.
        items: what is prepared.
        batch: items in one call of `encode`.
        workers: threads that prepare items while others wait for the engine.
        lanes: calls of `encode` at once.
    """
    free = BoundedSemaphore(lanes)

    def run(reading: list[Future[P]]) -> list[R]:
        ready = [each.result() for each in reading]
        with free:
            return list(encode(ready))

    # Items of a batch are prepared side by side, and earlier batches first, so that the engine soon has one.
    readers = _Pool(workers)
    reading = (readers.submit(prepare, item) for item in items)
    # Calls for the batches that the engine takes, and for those that wait for an item: a slow one holds up no others.
    results = map_ahead(run, _batches(reading, batch), lanes + ceil(workers / batch))
    # The readers end first, so that no batch waits for items that nobody wants any more.
    with closing(results), readers:
        for batch_results in results:
            yield from batch_results


def map_ahead(function: Callable[[T], R], items: Iterable[T], threads: int, may_hang: bool = False) -> Generator[R, None, None]:
    """Yield `function(item)` of each item, in order, computed by threads.

    Items are read by the thread that reads the results, whenever it asks for one, at most twice as many ahead as there are
    threads. Closing the generator drops what has not begun, and waits for what has.

    Args:
        function: called by the threads.
        items: may raise an `Exception`; results of what came before are yielded first.
        threads: how many calls may run at once. One call at a time is made by the thread that reads the results.
        may_hang: calls may never return, as those of a network. Nothing waits for them, not even the end of Python.

    Raises:
        ArgumentError: it was begun before this process was forked.
        BaseException: what `function` or `items` raised, in its place.
    """
    if threads == 1:
        yield from map(function, items)
        return
    source, failure, ended = iter(items), None, False
    pending: deque[Future[R]] = deque()
    process = os.getpid()
    with _Daemons(threads) if may_hang else _Pool(threads) as pool:
        while True:
            _require_process(process)
            asked = False
            # One for each result, so that no thread is without work where results wait to be read; more until one is ready.
            while not ended and len(pending) < 2 * threads and not (asked and pending[0].done()):
                asked = True
                try:
                    pending.append(pool.submit(function, next(source)))
                except StopIteration:
                    ended = True
                except Exception as error:
                    failure, ended = error, True
            if not pending:
                break
            following = pending.popleft()
            while may_hang and not following.done():
                # A signal that comes just before a wait without an end is not seen.
                wait([following], _POLL)
            yield following.result()
    if failure is not None:
        raise failure


_thread = local()


class _Pool(ThreadPoolExecutor):
    """Threads that end with a `with` block: calls that have not begun are dropped, and those that have are waited for."""

    def __init__(self, threads: int) -> None:
        super().__init__(threads, "tokenflow", partial(setattr, _thread, "in_pool", True))
        self._made_in = os.getpid()

    def __exit__(self, *error: object) -> None:
        if os.getpid() == self._made_in:
            # The garbage collector may end the block in a thread of a pool, for which nothing may wait there.
            self.shutdown(wait=not getattr(_thread, "in_pool", False), cancel_futures=True)


class _Daemons:
    """As `_Pool`, but calls that have begun are waited for only where the block ends well: those of a network may never return.

    Python joins the threads of its own pools when it ends.
    """

    def __init__(self, threads: int) -> None:
        self._calls: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._most, self._threads = threads, list[Thread]()

    def submit(self, function: Callable[[T], R], item: T) -> Future[R]:
        future = Future[R]()
        if len(self._threads) < self._most:
            thread = Thread(target=self._work, name="tokenflow-daemon", daemon=True)
            thread.start()
            self._threads.append(thread)
        self._calls.put(partial(_call, future, function, item))
        return future

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            call()

    def __enter__(self) -> _Daemons:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        with suppress(Empty):
            while True:
                self._calls.get_nowait()
        for _ in self._threads:
            self._calls.put(None)
        for thread in self._threads if kind is None else ():
            thread.join()


def _call(future: Future[R], function: Callable[[T], R], item: T) -> None:
    try:
        future.set_result(function(item))
    except BaseException as error:  # raised by the thread that waits for it
        future.set_exception(error)


def _require_process(process: int) -> None:
    if os.getpid() != process:
        raise ArgumentError(
            "This iterator was begun before this process was forked, and threads do not survive that.",
            "Begin it again in the child process.",
        )


def _batches(items: Iterator[T], size: int) -> Generator[list[T], None, None]:
    """The items in lists of `size`; the last, also before an item that fails, may have fewer."""
    batch: list[T] = []
    try:
        for item in items:
            batch.append(item)
            if len(batch) == size:
                yield batch
                batch = []
    except Exception:
        if batch:
            yield batch
        raise
    if batch:
        yield batch
