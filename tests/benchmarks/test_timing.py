from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.gpu import timing
from benchmarks.gpu.timing import LEAST_ROUNDS, Pace, Times, alternate, say_why
from tokenflow_sdk.errors import ArgumentError


class Clock:
    """Seconds that pass when somebody says so."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []

    def work(self, name: str, seconds: float, left_out: float = 0.0) -> Callable[[], float]:
        def call() -> float:
            self.log.append(name)
            self.now += seconds
            return left_out

        return call

    def synchronize(self) -> None:
        self.log.append("wait")
        self.now += 0.25


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(timing, "perf_counter", lambda: found.now)
    return found


def test_sides_take_turns_in_both_orders(clock: Clock) -> None:
    advanced: list[int] = []
    calls = {"a": clock.work("a", 1.0), "b": clock.work("b", 2.0)}
    found = alternate(calls, clock.synchronize, Pace(3, 1000), lambda: advanced.append(1))
    assert [name for name in clock.log if name != "wait"] == ["b", "a", "a", "b", "b", "a", "a", "b"]
    # Waiting for the device before a call does not count, after it does.
    assert found == {"a": Times((1.25,) * 3), "b": Times((2.25,) * 3)}
    assert len(advanced) == 4


def test_what_does_not_count_is_left_out(clock: Clock) -> None:
    found = alternate({"a": clock.work("a", 5.0, left_out=3.0)}, clock.synchronize, Pace(2, 1000))
    assert found == {"a": Times((2.25, 2.25))}


def test_slow_calls_are_fewer_but_enough(clock: Clock) -> None:
    found = alternate({"a": clock.work("a", 100.0)}, clock.synchronize, Pace(50, 30))
    times = found["a"]
    assert isinstance(times, Times)
    assert len(times.seconds) == LEAST_ROUNDS


def test_a_side_that_fails_ends_alone(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    calls = 0

    def breaks() -> float:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise RuntimeError("out of memory\nand more lines")
        return 0.0

    found = alternate({"a": clock.work("a", 1.0), "b": breaks}, clock.synchronize, Pace(6, 1000))
    assert found["b"] == "RuntimeError: out of memory"
    assert calls == 3
    assert found["a"] == Times((1.25,) * 6)
    assert "and more lines" in capsys.readouterr().err


def test_reasons_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert say_why(ArgumentError("What is wrong.", "What mends it.")) == "What is wrong."
    assert capsys.readouterr().err == ""
    assert say_why(ValueError()) == "ValueError"


@given(st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=80))
def test_median_and_percentile(seconds: list[float]) -> None:
    """Against what they mean: half of the calls, and 19 of 20, took no longer."""
    times = Times(tuple(seconds))
    assert times.median == np.median(seconds)
    assert times.p95 in seconds
    within = sum(value <= times.p95 for value in seconds)
    assert within >= 0.95 * (len(seconds) - 1) + 1 - 1e-9
    assert times.median <= times.p95
