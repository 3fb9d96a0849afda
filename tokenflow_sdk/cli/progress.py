"""Shows how far a command is: a bar on a terminal, elsewhere lines in the log."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from tokenflow_sdk.cli.console import stderr
from tokenflow_sdk.steps import StepLog

__all__ = ["make_bars", "progress_bar"]


def make_bars() -> Progress:
    """Progress bars on stderr, which show nothing where it is no terminal."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=stderr, transient=True, disable=not stderr.shows_progress)


@contextmanager
def progress_bar(step: str, total: int, brief: bool = False) -> Iterator[Callable[[int], None]]:
    """Show the progress of a step (`brief`: see `StepLog`). Yields a function that takes how many of `total` are done."""
    with StepLog("tokenflow_sdk") as log, make_bars() as bars:
        log.start(step, brief)
        task = bars.add_task(step, total=total)

        def done(count: int) -> None:
            bars.update(task, completed=count)
            log.fraction(count / total if total else 1.0)

        yield done
