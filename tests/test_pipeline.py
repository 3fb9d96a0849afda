from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from tests.support.waiting import comes_true
from tokenflow_sdk.errors import ArgumentError, ArrayError, ImageReadError
from tokenflow_sdk.pictures.codes import Codes
from tokenflow_sdk.pipeline import Pipeline, Prepared, map_ahead


def own_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("tokenflow")]


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert own_threads() == []


def test_order_is_kept_and_calls_run_at_once() -> None:
    together = threading.Barrier(3)

    def slow_first(i: int) -> int:
        if i < 3:
            together.wait(60)
        time.sleep(0.02 if i % 3 == 0 else 0)
        return i * i

    assert list(map_ahead(slow_first, range(40), 3)) == [i * i for i in range(40)]
    assert list(map_ahead(str, (), 3)) == []


def test_one_call_at_a_time_needs_no_thread() -> None:
    calls = map_ahead(lambda i: threading.current_thread(), range(3), 1)
    assert set(calls) == {threading.current_thread()}


def test_items_are_read_when_results_are_asked_for_and_not_far_ahead() -> None:
    read: list[int] = []

    def endless() -> Iterator[int]:
        while True:
            read.append(len(read))
            yield read[-1]

    results = map_ahead(lambda i: i, endless(), 2)
    assert read == []
    for i in range(20):
        assert next(results) == i
        assert len(read) <= i + 4
    results.close()
    assert own_threads() == []


def test_a_result_that_is_ready_does_not_wait_for_more_than_one_item() -> None:
    asked = []

    def camera() -> Iterator[int]:
        for i in range(9):
            asked.append(i)
            if i:
                time.sleep(0.05)
            yield i

    results = map_ahead(lambda i: i, camera(), 4)
    for i in range(3):
        assert next(results) == i
        assert asked[-1] <= i + 1
    results.close()


def test_what_items_raise_comes_after_the_results_before_it() -> None:
    def items() -> Iterator[int]:
        yield from range(3)
        raise OSError("the disk is gone")

    found = []
    with pytest.raises(OSError, match="the disk is gone"):
        found.extend(map_ahead(lambda i: i, items(), 2))
    assert found == [0, 1, 2]


def test_an_interrupt_is_raised_at_once() -> None:
    going = threading.Event()

    def items() -> Iterator[int]:
        yield from range(2)
        raise KeyboardInterrupt

    results = map_ahead(lambda i: going.wait(60), items(), 2)
    threading.Timer(0.05, going.set).start()
    with pytest.raises(KeyboardInterrupt):
        next(results)
    assert own_threads() == []


def test_calls_that_may_hang_come_in_order_and_nothing_waits_for_one_that_does() -> None:
    going, begun = threading.Event(), list[int]()

    def hang(i: int) -> int:
        begun.append(i)
        if i in (3, 4):
            going.wait()
        return 10 // (5 - i)

    assert list(map_ahead(hang, range(3), 2, may_hang=True)) == [2, 2, 3]
    assert own_threads() == []
    begun.clear()
    results = map_ahead(hang, range(100), 2, may_hang=True)
    assert [next(results) for _ in range(3)] == [2, 2, 3]
    assert comes_true(lambda: len(begun) == 5)
    results.close()
    going.set()
    assert comes_true(lambda: own_threads() == [])
    assert sorted(begun) == [0, 1, 2, 3, 4]
    with pytest.raises(ZeroDivisionError):
        list(map_ahead(hang, range(9), 2, may_hang=True))
    assert comes_true(lambda: own_threads() == [])


def test_what_a_call_raises_comes_in_its_place_and_ends_the_rest() -> None:
    def halve(i: int) -> float:
        return 10 / (3 - i)

    found = []
    with pytest.raises(ZeroDivisionError):
        found.extend(map_ahead(halve, range(100), 2))
    assert found == [10 / 3, 5, 10]


def let_it_drop(holding: threading.Event, dropped: threading.Event) -> None:
    """Let a thread that is held drop an iterator: nothing may be raised where nobody sees it, and all threads must end."""
    unraisable: list[object] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.unraisablehook", unraisable.append)
        holding.set()
        assert dropped.wait(60)
    assert unraisable == []
    while own_threads():
        time.sleep(0.01)


def test_a_thread_may_be_the_one_that_drops_the_last_reference() -> None:
    second, holding, dropped = threading.Event(), threading.Event(), threading.Event()

    def items() -> Iterator[int]:
        yield 0
        second.set()
        yield 1

    def drop(i: int) -> int:
        if i == 0:
            second.wait(60)
        else:
            holding.wait(60)
            held.clear()
            dropped.set()
        return i

    held = [map_ahead(drop, items(), 2)]
    assert next(held[0]) == 0
    let_it_drop(holding, dropped)


def test_a_forked_child_is_told_to_begin_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def read_in_child() -> str:
        results = map_ahead(str, range(9), 2)
        next(results)
        with monkeypatch.context() as patch:
            patch.setattr(os, "getpid", lambda: -1)
            try:
                next(results)
            except ArgumentError as error:
                return str(error)
        return ""

    assert "before this process was forked" in read_in_child()
    while own_threads():  # here they are, and end when nobody has the iterator
        time.sleep(0.01)


def pipeline(
    lanes: int = 2, batch: int = 2, workers: int = 2, reading: Callable[[int], object] = id
) -> tuple[Pipeline, list[int]]:
    sizes: list[int] = []
    busy, most = [], []

    def prepare(image: object) -> Prepared:
        if not isinstance(image, str):
            raise ArrayError(f"{image!r} is no picture.", "Give one.")
        if image == "missing":
            raise ImageReadError("missing cannot be read.", "Look for it.")
        reading(int(image))
        return Prepared(np.full((1, 1, 3), int(image), np.uint8), None)

    def encode(pictures: object) -> list[Codes]:
        busy.append(1)
        most.append(len(busy))
        assert len(busy) <= lanes
        time.sleep(0.002)
        sizes.append(len(pictures))
        busy.pop()
        return [Codes(picture.pixels[0, 0, :1], (1,), 256, "demo", "ab" * 32) for picture in pictures]

    return Pipeline(prepare, encode, batch, workers, lanes), sizes


def numbers(found: list[object]) -> list[object]:
    return [int(each.indices[0]) if isinstance(each, Codes) else type(each).__name__ for each in found]


def test_errors_of_pictures_stand_in_their_places() -> None:
    made, sizes = pipeline()
    images = ["1", "missing", "3", "4", 5, "missing", "7"]
    found = list(made.codes(images, raising=False))
    assert numbers(found) == [1, "ImageReadError", 3, 4, "ArrayError", "ImageReadError", 7]
    assert sorted(sizes) == [1, 1, 2]
    found = []
    with pytest.raises(ImageReadError):
        found.extend(made.codes(images, raising=True))
    assert numbers(found) == [1]


def test_an_array_that_cannot_be_taken_is_an_error_in_its_place() -> None:
    class OnGpu:
        def __array__(self) -> object:
            raise TypeError("copy it to the host first")

    images = ["1", OnGpu(), "3"]
    assert numbers(list(pipeline()[0].codes(images, raising=False))) == [1, "ArrayError", 3]


def test_the_engine_has_no_more_calls_at_once_than_lanes() -> None:
    made, sizes = pipeline(lanes=1, batch=3)
    assert numbers(list(made.codes(map(str, range(20)), raising=True))) == list(range(20))
    assert sorted(sizes) == [2, *[3] * 6]


def test_pictures_before_a_failing_source_are_encoded() -> None:
    def images() -> Iterator[str]:
        yield from ("1", "2", "3")
        raise RuntimeError("the camera is gone")

    found: list[object] = []
    with pytest.raises(RuntimeError, match="camera"):
        found.extend(pipeline()[0].codes(images(), raising=True))
    assert numbers(found) == [1, 2, 3]


def test_the_first_batch_is_read_side_by_side_and_before_the_others() -> None:
    together, first, begun = threading.Barrier(2), threading.Event(), []

    def reading(i: int) -> None:
        begun.append(i)
        (together if i < 4 else first).wait(60)

    results = pipeline(batch=4, reading=reading)[0].codes(map(str, range(40)), raising=True)
    found = [next(results)]
    assert set(begun) <= set(range(6))  # the batch, and a picture of the next for each worker
    first.set()
    assert numbers(found + list(results)) == list(range(40))


def test_a_slow_picture_holds_up_no_other_batch() -> None:
    others, waited = threading.Event(), []
    made, sizes = pipeline(lanes=1, batch=2, reading=lambda i: None if i else waited.append(others.wait(60)))

    def encode(pictures: list[Prepared]) -> list[Codes]:
        found = made.encode(pictures)
        if len(sizes) == 2:
            others.set()
        return found

    results = made._replace(encode=encode).codes(map(str, range(8)), raising=True)
    assert numbers(list(results)) == list(range(8))
    assert waited == [True]


def test_no_more_pictures_are_read_ahead_than_a_few_batches_hold() -> None:
    asked: list[int] = []

    def endless() -> Iterator[str]:
        while True:
            asked.append(len(asked))
            yield str(asked[-1] % 256)

    results = pipeline(batch=4)[0].codes(endless(), raising=True)
    for i in range(30):
        assert numbers([next(results)]) == [i]
        assert len(asked) <= i + 7 * 4  # six batches, and the one that is given out
    results.close()


def test_closing_drops_pictures_whose_reading_has_not_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    closed, begun, shutdown = threading.Event(), [], ThreadPoolExecutor.shutdown

    def reading(i: int) -> None:
        begun.append(i)
        if i >= 4:
            closed.wait(60)

    def drop_then_wait(pool: ThreadPoolExecutor, wait: bool = True, *, cancel_futures: bool = False) -> None:
        shutdown(pool, wait=False, cancel_futures=cancel_futures)
        closed.set()
        shutdown(pool, wait=wait)

    results = pipeline(batch=4, workers=1, reading=reading)[0].codes(map(str, range(40)), raising=True)
    next(results)
    monkeypatch.setattr(ThreadPoolExecutor, "shutdown", drop_then_wait)
    results.close()
    assert max(begun) <= 4


def test_a_thread_that_reads_a_picture_may_drop_the_last_reference() -> None:
    holding, dropped = threading.Event(), threading.Event()

    def reading(i: int) -> None:
        if i == 4:
            holding.wait(60)
            held.clear()
            dropped.set()

    held = [pipeline(batch=4, workers=1, reading=reading)[0].codes(map(str, range(40)), raising=True)]
    assert numbers([next(held[0])]) == [0]
    let_it_drop(holding, dropped)
