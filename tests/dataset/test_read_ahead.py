from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from tests.support.mutations import no_hang
from tokenflow_sdk.dataset.read_ahead import read_ahead


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert [thread.name for thread in threading.enumerate() if thread.name == "tokenflow-read"] == []


def test_items_come_in_order_and_what_is_raised_after_them() -> None:
    def items() -> Iterator[int]:
        yield from range(5)
        raise OSError("the network is gone")

    found = []
    with pytest.raises(OSError, match="network"):
        found.extend(read_ahead(items(), lambda item: 1, 2, threading.Event()))
    assert found == list(range(5))
    assert list(read_ahead((), lambda item: 1, 2, threading.Event())) == []


def test_what_is_no_exception_is_raised_too() -> None:
    class Panic(BaseException):
        """As pyo3's."""

    def items() -> Iterator[int]:
        yield 1
        raise Panic

    rows = read_ahead(items(), lambda item: 1, 2, threading.Event())
    with no_hang(), pytest.raises(Panic):
        list(rows)


def test_no_more_is_read_ahead_than_the_limit() -> None:
    read: list[int] = []

    def items() -> Iterator[int]:
        for i in range(100):
            read.append(i)
            yield i

    rows = read_ahead(items(), lambda item: 10, 30, threading.Event())
    for i in range(20):
        assert next(rows) == i
        time.sleep(0.002)
        assert len(read) <= i + 6
    rows.close()
    assert len(read) < 30


def test_a_reader_that_waits_for_ever_does_not_hold_up_the_end() -> None:
    stop, go_on = threading.Event(), threading.Event()

    def items() -> Iterator[int]:
        yield 1
        go_on.wait(10)

    rows = read_ahead(items(), lambda item: 1, 10, stop)
    assert next(rows) == 1
    stop.set()
    assert list(rows) == []
    assert any(thread.name == "tokenflow-read" for thread in threading.enumerate())
    go_on.set()
    while any(thread.name == "tokenflow-read" for thread in threading.enumerate()):
        time.sleep(0.01)


def test_closing_closes_what_is_read() -> None:
    closed = threading.Event()

    def items() -> Iterator[int]:
        try:
            while True:
                yield 1
        finally:
            closed.set()

    rows = read_ahead(items(), lambda item: 1, 3, threading.Event())
    next(rows)
    rows.close()
    assert closed.wait(5)
