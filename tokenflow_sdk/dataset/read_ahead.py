"""Reads rows in a thread of its own, some ahead of those who use them."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from typing import Generic, TypeVar

__all__ = ["read_ahead"]

T = TypeVar("T")


def read_ahead(items: Iterable[T], size: Callable[[T], int], limit: int, stop: threading.Event) -> Generator[T, None, None]:
    """Yield the items of an iterable that a thread reads.

    Args:
        items: read by the thread, and closed by it.
        size: bytes of an item.
        limit: bytes that are read ahead; one item more may be.
        stop: looked at while nothing is ready; then the iteration ends early.

    Raises:
        BaseException: what `items` raised, after those before it.
    """
    reader = _Reader(items, size, limit)
    thread = threading.Thread(target=reader.run, name="tokenflow-read", daemon=True)
    thread.start()
    try:
        yield from reader.items(stop)
    finally:
        reader.close()
        # Not where it waits for a network: it ends by itself then.
        thread.join(0.2)


class _Reader(Generic[T]):
    def __init__(self, items: Iterable[T], size: Callable[[T], int], limit: int) -> None:
        self._source, self._size, self._limit = items, size, limit
        self._ready: deque[T] = deque()
        self._held = 0
        self._ended = self._closed = False
        self._error: BaseException | None = None
        self._changed = threading.Condition()

    def run(self) -> None:
        source = iter(self._source)
        try:
            if isinstance(source, Generator):
                with closing(source):
                    self._read(source)
            else:
                self._read(source)
        except BaseException as error:  # raised by the thread that waits for it
            self._error = error
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def _read(self, source: Iterator[T]) -> None:
        for item in source:
            with self._changed:
                self._changed.wait_for(lambda: self._held < self._limit or self._closed)
                if self._closed:
                    return
                self._ready.append(item)
                self._held += self._size(item)
                self._changed.notify_all()

    def items(self, stop: threading.Event) -> Generator[T, None, None]:
        while True:
            with self._changed:
                while not (self._ready or self._ended):
                    self._changed.wait(0.2)
                    if stop.is_set():
                        return
                if not self._ready:
                    break
                item = self._ready.popleft()
                self._held -= self._size(item)
                self._changed.notify_all()
            yield item
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
