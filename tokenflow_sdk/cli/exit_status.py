"""The exit status of a command, and the errors and warnings that it prints."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

from tokenflow_sdk.cli.console import stderr, stdout
from tokenflow_sdk.cli.option_names import as_options
from tokenflow_sdk.cli.signals import Stopped, stopped_by_signals
from tokenflow_sdk.errors import MissingPackageError, TokenFlowError

__all__ = ["naming_missing_packages", "refuse", "run"]

_LOGGERS = ("tokenflow_sdk", "tokenflow_export")


def run(command: Callable[[], int], verbosity: int = 0, interrupted: str = "interrupted") -> int:
    """Run a command, and print a mistake that the user can mend as one sentence instead of a traceback.

    Args:
        command: gives its exit status.
        verbosity: -1 prints results and errors only, 0 also progress and warnings, 1 also details.
        interrupted: printed on Ctrl-C, SIGTERM and SIGHUP.

    Returns:
        The status of the command, 2 after such a mistake, 130 after Ctrl-C, 143 after SIGTERM, 129 after SIGHUP.
    """
    try:
        with stopped_by_signals(), warnings.catch_warnings(), _logging(verbosity):
            warnings.showwarning = _print_warning
            return command()
    except TokenFlowError as error:
        return refuse(error)
    except KeyboardInterrupt as stop:
        with suppress(OSError):  # the terminal may be gone
            stderr.print(interrupted, style="yellow")
        return stop.status if isinstance(stop, Stopped) else 130


def refuse(error: TokenFlowError) -> int:
    """Print a mistake that the user can mend, and give the exit status that it has."""
    stderr.print(f"error: {as_options(error)}", style="red", soft_wrap=True)
    return 2


@contextmanager
def naming_missing_packages(packages: Collection[str], install: str) -> Iterator[None]:
    """Within the block, a missing package of an extra is named.

    Args:
        packages: that the extra brings, by the names that they are imported by.
        install: the command that installs them.

    Raises:
        MissingPackageError: one of them is not installed.
    """
    try:
        yield
    except ImportError as error:
        package = (error.name or "").split(".")[0]
        if package not in packages:
            raise
        raise MissingPackageError(f"{package} is not installed.", f"Run `{install}`.") from error


@contextmanager
def _logging(verbosity: int) -> Iterator[None]:
    """Print what the SDK and the exporter log. On a terminal bars show the steps instead, except with more verbosity."""
    level = {-1: logging.ERROR, 1: logging.DEBUG}.get(verbosity, logging.WARNING if stderr.shows_progress else logging.INFO)
    handler, before = _Handler(), [(logger, logger.level) for logger in map(logging.getLogger, _LOGGERS)]
    stdout.silenced = stderr.silenced = verbosity < 0
    for logger, _ in before:
        logger.setLevel(level)
        logger.addHandler(handler)
    try:
        yield
    finally:
        stdout.silenced = stderr.silenced = False
        for logger, former in before:
            logger.removeHandler(handler)
            logger.setLevel(former)


class _Handler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        text = as_options(record.getMessage())
        if record.levelno >= logging.WARNING:
            stderr.print(f"{record.levelname.lower()}: {text}", style="yellow", soft_wrap=True)
        else:
            stderr.print(text, soft_wrap=True)
        if record.exc_info:  # a fault of the program, as no user's mistake is logged
            stderr.print(logging.Formatter().formatException(record.exc_info), soft_wrap=True, markup=False, highlight=False)


def _print_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    stderr.print(f"warning: {as_options(message)}", style="yellow", soft_wrap=True)
