"""The two rich consoles that all commands print to: results to stdout, progress and errors to stderr."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tokenflow_sdk.errors import OutputError
from tokenflow_sdk.steps import StepLog

__all__ = ["PlainConsole", "make_table", "stderr", "stdout"]


class PlainConsole(Console):
    """Prints text as it is: names of files and bundles may look like rich's markup or emoji codes."""

    silenced = False
    """Whether the user asked for results and errors only."""

    def __init__(self, **options: Any) -> None:
        super().__init__(highlight=False, markup=False, emoji=False, **options)

    @property
    def shows_progress(self) -> bool:
        """Whether lines can be drawn again, and should be."""
        return self.is_terminal and not self.is_dumb_terminal and not self.silenced

    def print(self, *objects: Any, **options: Any) -> None:
        """As `Console.print`. On stderr, failures are ignored, because they could be told to nobody.

        Raises:
            BrokenPipeError: the reader has gone.
            OutputError: stdout cannot be written.
        """
        try:
            super().print(*objects, **options)
        except BrokenPipeError:
            raise
        except OSError as error:
            if not self.stderr:
                raise _stdout_error(error) from error

    def note(self, *objects: Any, **options: Any) -> None:
        """Print what was written, skipped or left out, unless the console is silenced. Raises as `print`."""
        if not self.silenced:
            self.print(*objects, **options)

    def write(self, text: str) -> None:
        """Write text at once, without wrapping it or replacing tabs. Raises as `print`."""
        try:
            self.file.write(text)
            self.file.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            raise _stdout_error(error) from error

    def write_bytes(self, data: bytes) -> None:
        """Write to stdout as it is. Raises as `print`, also where stdout is closed."""
        if sys.stdout is None:
            raise _stdout_error(OSError(errno.EBADF, "it is closed"))
        try:
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            raise _stdout_error(error) from error

    @contextmanager
    def step(self, step: str, brief: bool = False) -> Iterator[None]:
        """Show that something is done which takes a while: with a spinner on a terminal, and in the log (see `StepLog`)."""
        # `Console.status` reads strings as markup, whatever the console's options.
        with StepLog("tokenflow_sdk") as log, self.status(Text(step)) if self.shows_progress else nullcontext():
            log.start(step, brief)
            yield

    def on_broken_pipe(self) -> None:
        """Leave the error to `main`; rich would exit with status 1."""
        # Rich calls this while it handles the error.
        raise


def _stdout_error(error: OSError) -> OutputError:
    # The interpreter would try to write the rest when it ends, and print a traceback.
    sys.stdout = None
    return OutputError(f"The standard output cannot be written: {error.strerror}.", "Check where it is redirected to.")


def make_table(*headers: str, title: str | None = None) -> Table:
    """A table that shows all that its cells hold: where it is wider than the console, lines and long words are broken."""
    table = Table(title=title)
    for header in headers:
        table.add_column(header, overflow="fold")
    return table


def _width() -> int | None:
    """Columns of stdout; None: rich asks $COLUMNS or the terminal. Piped output has none: 160 keep lines of tables whole."""
    columns = os.environ.get("COLUMNS", "")
    known = (columns.isdecimal() and int(columns) > 0) or (sys.stdout is not None and sys.stdout.isatty())
    return None if known else 160


stdout = PlainConsole(width=_width())
stderr = PlainConsole(stderr=True)
