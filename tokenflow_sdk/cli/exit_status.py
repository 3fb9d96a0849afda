"""The exit status of a command, and the errors and warnings that it prints."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import TextIO

from tokenflow_sdk.cli.console import stderr
from tokenflow_sdk.cli.signals import Stopped, stopped_by_signals
from tokenflow_sdk.errors import TokenFlowError

__all__ = ["run"]


def run(command: Callable[[], int], interrupted: str = "interrupted") -> int:
    """Run a command, and print a mistake that the user can mend as one sentence instead of a traceback.

    Args:
        command: gives its exit status.
        interrupted: printed on Ctrl-C, SIGTERM and SIGHUP.

    Returns:
        The status of the command, 2 after such a mistake, 130 after Ctrl-C, 143 after SIGTERM, 129 after SIGHUP.
    """
    try:
        with stopped_by_signals(), warnings.catch_warnings():
            warnings.showwarning = _print_warning
            return command()
    except TokenFlowError as error:
        stderr.print(f"error: {error}", style="red", soft_wrap=True)
        return 2
    except KeyboardInterrupt as stop:
        with suppress(OSError):  # the terminal may be gone
            stderr.print(interrupted, style="yellow")
        return stop.status if isinstance(stop, Stopped) else 130


def _print_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    stderr.print(f"warning: {message}", style="yellow", soft_wrap=True)
