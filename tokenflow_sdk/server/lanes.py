"""`Lanes`: calls of an engine beside the event loop, each with as many of the waiting pictures as one call takes."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from time import perf_counter
from typing import Any, NamedTuple

from tokenflow_sdk.server.metrics import Metrics

__all__ = ["Lanes", "Operation"]


class Operation(NamedTuple):
    """A function of several items, which gives as many results in their order, and its name in the metrics."""

    name: str
    run: Callable[[list[Any]], Iterable[Any]]


@dataclass(eq=False)
class _Waiting:
    """An item that waits. Two are never equal: items are arrays, which cannot be compared."""

    operation: Operation
    item: Any
    result: asyncio.Future[Any]
    since: float


class Lanes:
    """Runs operations on single items in threads. Items that wait for the same operation share a call. One event loop uses it.

    Where a call takes several items, it also waits a moment for more; where it takes one, as on a CPU, calls run side by side.

    Args:
        count: calls at once.
        limit: most items in a call.
        wait: seconds that an item may wait for others although a lane is free.
        metrics: told of waiting, calls and their sizes.
    """

    def __init__(self, count: int, limit: int, wait: float, metrics: Metrics) -> None:
        self._free, self._limit, self._metrics = count, limit, metrics
        self._wait = wait if limit > 1 else 0.0
        self._waiting: deque[_Waiting] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self._lock = threading.Lock()
        """Of `_free`, which `run_here` changes from other threads."""
        self._pool = ThreadPoolExecutor(count, "tokenflow-lane")
        metrics.gauge("tokenflow_queue_depth", "Pictures that wait for the engine.", lambda: len(self._waiting))

    async def run(self, operation: Operation, item: Any) -> Any:
        """The operation's result for one item. Cancelling it takes the item back if no call has it yet."""
        result: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        waiting = _Waiting(operation, item, result, perf_counter())
        self._waiting.append(waiting)
        self._fill()
        try:
            return await result
        except asyncio.CancelledError:
            if waiting in self._waiting:
                self._waiting.remove(waiting)
            raise

    def run_here(self, operation: Operation, item: Any, loop: asyncio.AbstractEventLoop) -> Any:
        """The operation's result for one item, run by this thread, which is not the event loop's; None where it should wait: no
        lane is free, others wait, or calls take several items. For who has the item in a thread: a change of thread takes time.
        """
        with self._lock:
            if not self._free or self._waiting or self._limit > 1:
                return None
            self._free -= 1
        began = perf_counter()
        self._note(operation, [began], began)
        try:
            [found] = operation.run([item])
            return found
        finally:
            self._metrics.observe("engine", perf_counter() - began)
            with self._lock:
                self._free += 1
            if self._waiting:
                loop.call_soon_threadsafe(self._fill)

    def close(self) -> None:
        """End the threads after the calls that run."""
        self._pool.shutdown(wait=True)

    def _fill(self) -> None:
        """Begin calls in the lanes that are free, or set a timer where others are waited for first."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        loop = asyncio.get_running_loop()
        while self._waiting:
            if (left := self._patience()) > 0:
                self._timer = loop.call_later(left, self._fill)
                return
            with self._lock:
                if not self._free:
                    return
                self._free -= 1
            batch = self._taken()
            began = perf_counter()
            self._note(batch[0].operation, [each.since for each in batch], began)
            try:
                self._pool.submit(self._call, loop, batch, began)
            except RuntimeError as error:  # closed; those that wait are told so
                self._hand_over(batch, [error] * len(batch))

    def _note(self, operation: Operation, since: list[float], began: float) -> None:
        """Tell the metrics of a call's items, which have waited since then."""
        for each in since:
            self._metrics.observe("queue", began - each)
        self._metrics.batches.labels(operation.name).observe(len(since))

    def _patience(self) -> float:
        """Seconds that the item that has waited longest waits for others; none where a call is full."""
        first = self._waiting[0]
        full = sum(each.operation is first.operation for each in self._waiting) >= self._limit
        return 0.0 if full else first.since + self._wait - perf_counter()

    def _taken(self) -> list[_Waiting]:
        """The item that has waited longest, and those after it for the same operation, as many as a call takes."""
        operation = self._waiting[0].operation
        batch = [each for each in self._waiting if each.operation is operation][: self._limit]
        taken = set(batch)
        self._waiting = deque(each for each in self._waiting if each not in taken)
        return batch

    def _call(self, loop: asyncio.AbstractEventLoop, batch: list[_Waiting], began: float) -> None:
        """Run the operation in a thread, and hand its results to the event loop in one step, which wakes it once."""
        results = _results(batch[0].operation, [each.item for each in batch])
        loop.call_soon_threadsafe(self._done, batch, results, perf_counter() - began)

    def _done(self, batch: list[_Waiting], results: list[Any], seconds: float) -> None:
        self._metrics.observe("engine", seconds)
        self._hand_over(batch, results)
        self._fill()

    def _hand_over(self, batch: list[_Waiting], results: list[Any]) -> None:
        """Free a call's lane, and give its results to who waits for them."""
        with self._lock:
            self._free += 1
        for each, found in zip(batch, results, strict=True):
            if each.result.done():
                continue
            if isinstance(found, BaseException):
                each.result.set_exception(found)
            else:
                each.result.set_result(found)


def _results(operation: Operation, items: list[Any]) -> list[Any]:
    """A result or an error for each item. Where several fail together, each is run again alone: whatever the error was, it must
    not fail those that only shared the call.
    """
    try:
        found = list(operation.run(items))
        if len(found) != len(items):
            raise RuntimeError(f"{operation.name} gave {len(found)} results for {len(items)} items")
        return found
    except BaseException as error:  # of a thread, whose waiters would wait for ever
        return [error] if len(items) == 1 else [found for each in items for found in _results(operation, [each])]
