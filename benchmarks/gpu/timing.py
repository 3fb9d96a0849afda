"""Measures the times of several sides that take turns, and reports progress and errors."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from time import perf_counter

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from tokenflow_sdk.errors import EngineRefusedError, TokenFlowError

__all__ = ["Call", "Pace", "Times", "alternate", "bar", "console", "outcome", "say_why"]

Call = Callable[[], float]
"""A call that is timed. It returns the seconds that do not count."""

LEAST_ROUNDS = 5
"""Least number of calls for a median, however slow they are."""

console = Console(stderr=True, highlight=False)


@dataclass(frozen=True)
class Times:
    """The seconds of each timed call of a side."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return median(self.seconds)

    @property
    def p95(self) -> float:
        """The 95th percentile: one of the times, not interpolated between two."""
        return float(np.quantile(self.seconds, 0.95, method="higher"))


@dataclass(frozen=True)
class Pace:
    """How long to measure: `rounds` calls of each side, or fewer, but at least `LEAST_ROUNDS`, after `seconds`."""

    rounds: int = 50
    seconds: float = 30.0


def alternate(
    calls: Mapping[str, Call], synchronize: Callable[[], None], pace: Pace, advance: Callable[[], None] = lambda: None
) -> dict[str, Times | str]:
    """Time the sides in turns, in every second round in the opposite order. Gives the times of each, or why it has none.

    Args:
        calls: by side.
        synchronize: waits until the device is idle. It is called before and after each call; the wait after it counts.
        pace: when to stop. One more round comes first, and is not counted.
        advance: called after each round.
    """
    taken: dict[str, list[float]] = {side: [] for side in calls}
    failed: dict[str, str] = {}
    began = perf_counter()
    for number in range(pace.rounds + 1):
        for side in list(calls)[:: 1 if number % 2 else -1]:
            if side not in failed:
                try:
                    seconds = _timed(calls[side], synchronize)
                except Exception as error:
                    failed[side] = say_why(error)
                else:
                    taken[side] += [seconds] if number else []
        advance()
        if number >= LEAST_ROUNDS and perf_counter() - began > pace.seconds:
            break
    return {side: failed[side] if side in failed else Times(tuple(taken[side])) for side in calls}


def _timed(call: Call, synchronize: Callable[[], None]) -> float:
    synchronize()
    began = perf_counter()
    left_out = call()
    synchronize()
    return perf_counter() - began - left_out


def outcome(error: Exception) -> dict[str, str]:
    """What a row says about a side that failed: `wrong` results, or `why` it has no figures."""
    return {"wrong": error.message} if isinstance(error, EngineRefusedError) else {"why": say_why(error)}


def say_why(error: Exception) -> str:
    """Describe an error in one line, for a table. Unexpected errors are printed with their traceback as well."""
    if isinstance(error, TokenFlowError):
        return error.message
    console.print("This failed:", markup=False)
    traceback.print_exception(error, file=sys.stderr)
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:200]}" if text else type(error).__name__


@contextmanager
def bar(title: str, total: int | None = None, shown: bool = True) -> Iterator[Callable[[], None]]:
    """Print what is being done, with a progress bar if this is a terminal; yields a function that advances the bar by one.

    Set `shown` to False if the work shows its own progress.
    """
    console.print(title, markup=False)
    count = (TextColumn("  {task.completed} of {task.total}"),) if total else (TextColumn("  "),)
    clock = (TimeElapsedColumn(), TimeRemainingColumn()) if total else (TimeElapsedColumn(),)
    hidden = not shown or not console.is_terminal
    with Progress(*count, BarColumn(), *clock, console=console, transient=True, disable=hidden) as progress:
        task = progress.add_task("", total=total)
        yield lambda: progress.advance(task)
