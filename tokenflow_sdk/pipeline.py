"""Encodes many pictures: threads decode some while the engine encodes others, and codes come in the pictures' order."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from threading import BoundedSemaphore, get_ident
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from tokenflow_sdk.errors import ArgumentError, TokenFlowError
from tokenflow_sdk.pictures.codes import Codes
from tokenflow_sdk.pictures.preparation import Preparation
from tokenflow_sdk.pictures.sources import ImageSource, kept

__all__ = ["Pipeline", "Prepared", "map_ahead"]

T = TypeVar("T")
R = TypeVar("R")


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
        lanes = BoundedSemaphore(self.lanes)

        def run(batch: list[ImageSource | Prepared | TokenFlowError]) -> list[Codes | TokenFlowError]:
            # A batch is read by the thread that encodes it, so as many are read at once as there are workers.
            read = [self._read(image) for image in batch]
            good = [each for each in read if isinstance(each, Prepared)]
            with lanes:
                found = iter(self.encode(good) if good else ())
            return [next(found) if isinstance(each, Prepared) else each for each in read]

        batches = _batches(map(self._taken, images), self.batch)
        with closing(map_ahead(run, batches, self.workers + self.lanes)) as results:
            for codes in (each for batch in results for each in batch):
                if raising and isinstance(codes, TokenFlowError):
                    raise codes
                yield codes

    def _taken(self, image: ImageSource) -> ImageSource | Prepared | TokenFlowError:
        """What a thread can use later, whatever the caller does with the picture meanwhile."""
        own = kept(image)
        return self._read(image) if own is None else own

    def _read(self, image: ImageSource | Prepared | TokenFlowError) -> Prepared | TokenFlowError:
        if isinstance(image, (Prepared, TokenFlowError)):
            return image
        try:
            return self.prepare(image)
        except TokenFlowError as error:
            return error


def map_ahead(function: Callable[[T], R], items: Iterable[T], threads: int) -> Generator[R, None, None]:
    """Yield `function(item)` of each item, in order, computed by threads.

    Items are read by the thread that reads the results, whenever it asks for one, at most twice as many ahead as there are
    threads. Closing the generator drops what has not begun, and waits for what has.

    Args:
        function: called by the threads.
        items: may raise an `Exception`; results of what came before are yielded first.
        threads: how many calls may run at once.

    Raises:
        ArgumentError: it was begun before this process was forked.
        BaseException: what `function` or `items` raised, in its place.
    """
    source, failure, ended = iter(items), None, False
    pending: deque[Future[R]] = deque()
    process, own = os.getpid(), set[int]()
    pool = ThreadPoolExecutor(threads, "tokenflow", lambda: own.add(get_ident()))
    try:
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
            yield pending.popleft().result()
    finally:
        if os.getpid() == process:
            # The garbage collector may close this in one of the threads, which cannot wait for itself.
            pool.shutdown(wait=get_ident() not in own, cancel_futures=True)
    if failure is not None:
        raise failure


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
