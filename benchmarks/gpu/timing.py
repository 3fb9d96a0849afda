"""Times of several sides that take turns."""

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
"""Does the work and waits for it; gives the seconds of it that do not count."""

LEAST_ROUNDS = 5
"""Fewer give no median worth the name, however slow the calls are."""

console = Console(stderr=True, highlight=False)


@dataclass(frozen=True)
class Times:
    """Seconds of each timed call."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return median(self.seconds)

    @property
    def p95(self) -> float:
        """What 95 % of the calls did not exceed: one of the times, never between two."""
        return float(np.quantile(self.seconds, 0.95, method="higher"))


@dataclass(frozen=True)
class Pace:
    """How long to measure: up to `rounds` calls of each side; fewer, but `LEAST_ROUNDS`, once `seconds` have passed."""

    rounds: int = 50
    seconds: float = 30.0


def alternate(
    calls: Mapping[str, Call], synchronize: Callable[[], None], pace: Pace, advance: Callable[[], None] = lambda: None
) -> dict[str, Times | str]:
    """Times of each side, or why it has none. Sides take turns, every second round in the opposite order.

    Args:
        calls: by side.
        synchronize: waits until the device is idle; called before and after each call, inside the time.
        pace: when to stop. One round more comes first and is not counted.
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
    """What a row says of a side that has no figures: `wrong`, or `why` there are none."""
    return {"wrong": error.message} if isinstance(error, EngineRefusedError) else {"why": say_why(error)}


def say_why(error: Exception) -> str:
    """One line for a table. What is no error that a user can mend is shown in full on the terminal as well."""
    if isinstance(error, TokenFlowError):
        return error.message
    console.print("This failed:", markup=False)
    traceback.print_exception(error, file=sys.stderr)
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:200]}" if text else type(error).__name__


@contextmanager
def bar(title: str, total: int | None = None, shown: bool = True) -> Iterator[Callable[[], None]]:
    """Say what is being done, with a bar on a terminal; gives what moves it by one. Not `shown`: for what shows its own."""
    console.print(title, markup=False)
    count = (TextColumn("  {task.completed} of {task.total}"),) if total else (TextColumn("  "),)
    clock = (TimeElapsedColumn(), TimeRemainingColumn()) if total else (TimeElapsedColumn(),)
    hidden = not shown or not console.is_terminal
    with Progress(*count, BarColumn(), *clock, console=console, transient=True, disable=hidden) as progress:
        task = progress.add_task("", total=total)
        yield lambda: progress.advance(task)
