"""Shows the progress of a long job: on a terminal a bar for each step, elsewhere lines in the log `tokenflow_export`."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from tokenflow_sdk.cli.console import stderr
from tokenflow_sdk.steps import StepLog

__all__ = ["ProgressSteps"]


class ProgressSteps:
    """The steps of a job, as a context manager. A step ends when the next one starts."""

    def __init__(self, console: Console | None = None) -> None:
        console = console or stderr
        shows = console.is_terminal and not console.is_dumb_terminal and not stderr.silenced
        self._log = StepLog("tokenflow_export")
        self._progress = Progress(
            SpinnerColumn(finished_text="✓"),
            TextColumn("{task.description:<40}", markup=False),
            BarColumn(bar_width=24),
            TimeElapsedColumn(),
            console=console,
            disable=not shows,
        )
        self._task: TaskID | None = None

    def start(self, description: str, total: float | None = None) -> None:
        """Start a step. Give `total` if `fraction` will be called."""
        self._finish()
        self._log.start(description)
        self._task = self._progress.add_task(description, total=total)

    def fraction(self, done: float) -> None:
        """Set the share of the current step that is done, from 0 to 1."""
        if self._task is not None:
            self._progress.update(self._task, completed=done)
            self._log.fraction(done)

    def _finish(self) -> None:
        if self._task is not None:
            self._progress.update(self._task, total=1.0, completed=1.0)
            self._task = None

    def __enter__(self) -> ProgressSteps:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if kind is None:
            self._finish()
        self._log.close()
        self._progress.stop()
