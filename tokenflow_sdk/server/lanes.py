"""`Lanes`: calls of an engine beside the event loop, each with as many of the waiting pictures as one call takes."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
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
        self._arrived = asyncio.Event()
        self._pool = ThreadPoolExecutor(count, "tokenflow-lane")
        self._running: set[asyncio.Task[None]] = set()
        metrics.gauge("tokenflow_queue_depth", "Pictures that wait for the engine.", lambda: len(self._waiting))

    async def run(self, operation: Operation, item: Any) -> Any:
        """The operation's result for one item. Cancelling it takes the item back if no call has it yet."""
        result: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        waiting = _Waiting(operation, item, result, perf_counter())
        self._waiting.append(waiting)
        self._arrived.set()
        if self._free:
            self._free -= 1
            task = asyncio.create_task(self._lane())
            self._running.add(task)
            task.add_done_callback(self._running.discard)
        try:
            return await result
        except asyncio.CancelledError:
            if waiting in self._waiting:
                self._waiting.remove(waiting)
            raise

    def close(self) -> None:
        """End the threads after the calls that run."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    async def _lane(self) -> None:
        """Make calls until nothing waits."""
        try:
            while self._waiting:
                while (left := self._patience()) > 0:
                    self._arrived.clear()
                    with suppress(asyncio.TimeoutError):
                        await asyncio.wait_for(self._arrived.wait(), left)
                if batch := self._taken():
                    await self._call(batch)
        finally:
            self._free += 1

    def _patience(self) -> float:
        """Seconds that the item that has waited longest waits for others; none where a call is full, or nothing waits."""
        if not self._waiting:
            return 0.0
        first = self._waiting[0]
        full = sum(each.operation is first.operation for each in self._waiting) >= self._limit
        return 0.0 if full else first.since + self._wait - perf_counter()

    def _taken(self) -> list[_Waiting]:
        """The item that has waited longest, and those after it for the same operation, as many as a call takes."""
        if not self._waiting:
            return []
        operation = self._waiting[0].operation
        batch = [each for each in self._waiting if each.operation is operation][: self._limit]
        taken = set(batch)
        self._waiting = deque(each for each in self._waiting if each not in taken)
        return batch

    async def _call(self, batch: list[_Waiting]) -> None:
        operation, began = batch[0].operation, perf_counter()
        for each in batch:
            self._metrics.observe("queue", began - each.since)
        self._metrics.batches.labels(operation.name).observe(len(batch))
        loop = asyncio.get_running_loop()
        try:
            results = await loop.run_in_executor(self._pool, operation.run, [each.item for each in batch])
        except Exception as error:
            if len(batch) > 1:
                # Whatever it was, it must not fail those that only shared the call.
                for each in batch:
                    await self._call([each])
            elif not batch[0].result.done():
                batch[0].result.set_exception(error)
        else:
            for each, found in zip(batch, results, strict=True):
                if not each.result.done():
                    each.result.set_result(found)
        finally:
            self._metrics.observe("engine", perf_counter() - began)
