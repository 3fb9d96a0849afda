"""Input files of the commands: which files to read, and processing file by file."""

from __future__ import annotations

import glob
import itertools
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from tokenflow_sdk.cli.console import PlainConsole, stderr, stdout
from tokenflow_sdk.cli.option_names import as_options
from tokenflow_sdk.cli.outputs import STDIO
from tokenflow_sdk.cli.progress import progress_bar
from tokenflow_sdk.errors import ArgumentError, CodesReadError, ImageReadError, TokenFlowError
from tokenflow_sdk.files import file_status, is_directory
from tokenflow_sdk.pictures.images import SUFFIXES

__all__ = [
    "check_match",
    "code_files",
    "image_files",
    "input_bytes",
    "process_files",
]

_SHOWN = 10
"""Most names in a message."""


def image_files(paths: Sequence[Path]) -> dict[Path, Path]:
    """The image files that paths, directories and patterns name, as `_find`, and what else directories hold is printed."""
    return _find(paths, SUFFIXES, "pictures", ImageReadError)


def code_files(paths: Sequence[Path]) -> dict[Path, Path]:
    """The files of codes that paths, directories and patterns name, as `_find`."""
    return _find(paths, frozenset((".tfc",)), "files of codes (.tfc)", CodesReadError)


def _find(paths: Sequence[Path], endings: frozenset[str], what: str, problem: type[TokenFlowError]) -> dict[Path, Path]:
    """The files to read: a directory stands for the files in it and below it that have one of the endings.

    Where no file has the name of a path, it is a pattern, as `photos/**/*.jpg`, which shells do not replace within quotes.
    One that fits nothing stays, for `check_match`, as a file that cannot be read: the others are processed.

    Returns:
        For each file the directory of its result, relative to the output: as it lies in the directory or pattern that named it.

    Raises:
        ArgumentError: a file occurs twice.
        TokenFlowError: of the kind `problem`: a directory cannot be read, or has no such files.
    """
    found: dict[Path, Path] = {}
    for path in paths:
        if is_directory(path):
            named = {file: file.parent.relative_to(path) for file in _files_below(path, endings, what, problem)}
        elif _is_pattern(path):
            named = _matches(path) or {path: Path()}
        else:
            named = {path: Path()}
        for file, place in named.items():
            if file in found:
                raise ArgumentError(f"{file} was given twice.", "Give each file once.")
            found[file] = place
    return found


def check_match(path: Path, problem: type[TokenFlowError]) -> None:
    """Refuse a pattern that fits no file, left by `image_files` and `code_files` in the place of files. Raises `problem`."""
    if _is_pattern(path):
        raise problem(f"No file matches {path}.", "Check the pattern and the directory that it begins with.")


def _is_pattern(path: Path) -> bool:
    return path != STDIO and file_status(path) is None and glob.has_magic(str(path))


def _matches(pattern: Path) -> dict[Path, Path]:
    """The files that a pattern fits, and where they lie below the directories before its first `*`, `?` or `[`."""
    base = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), pattern.parts))
    try:
        matches = [Path(match) for match in sorted(glob.glob(str(pattern), recursive=True))]  # noqa: PTH207
        return {match: match.parent.relative_to(base) for match in matches if not is_directory(match)}
    except (OSError, ValueError, re.error):  # no pattern after all, which reading it reports
        return {}


def _files_below(directory: Path, endings: frozenset[str], what: str, problem: type[TokenFlowError]) -> list[Path]:
    files: list[Path] = []
    hidden: list[Path] = []

    def failed(error: OSError) -> None:
        raise problem(f"{error.filename or directory} cannot be read: {error.strerror}.", "Check its permissions.") from error

    for place, inside, names in os.walk(directory, onerror=failed):
        hidden += [Path(place, name) for name in inside if name.startswith(".")]
        inside[:] = sorted(name for name in inside if not name.startswith("."))
        files += [Path(place, name) for name in sorted(names)]
    # Beside each file that macOS copies to another file system it writes its metadata, to a file with this prefix.
    metadata = [path for path in files if path.name.startswith("._")]
    found = [path for path in files if path.suffix.lower() in endings and not path.name.startswith("._")]
    if not found:
        raise problem(
            f"{directory} holds no {what}.", f"Known endings: {' '.join(sorted(endings))}. Hidden ones are not searched."
        )
    if endings == SUFFIXES:
        left = {*files} - {*metadata, *found}
        others = [path for path in files if path in left and path.suffix.lower() != ".tfc"]
        _say_left_out(directory, others, "their endings are not those of pictures; name them to read them all the same")
    _say_left_out(directory, metadata, "metadata of macOS")
    _say_left_out(directory, hidden, "hidden directories")
    return found


def _say_left_out(directory: Path, paths: Sequence[Path], why: str) -> None:
    if paths:
        names = ", ".join(str(path.relative_to(directory)) for path in paths[:_SHOWN]) + (
            ", ..." if len(paths) > _SHOWN else ""
        )
        stderr.note(f"{directory}: {len(paths)} left out ({why}): {names}", soft_wrap=True)


def input_bytes(kind: type[TokenFlowError], limit: int = -1) -> bytes:
    """The content of stdin.

    Args:
        kind: the error to raise.
        limit: most bytes to read; -1: all.

    Raises:
        TokenFlowError: of this kind: stdin is closed or cannot be read.
    """
    try:
        if sys.stdin is not None:
            return sys.stdin.buffer.read(limit)
        why = "it is closed"
    except OSError as error:
        why = str(error.strerror)
    raise kind(f"The standard input cannot be read: {why}.", "Check where it is redirected from.")


def process_files(
    inputs: Sequence[Path],
    process: Callable[[Sequence[Path]], Iterable[str | TokenFlowError | None]],
    verb: str,
    lines: PlainConsole = stdout,
    several: bool | None = None,
) -> int:
    """Process files with a progress bar. A file that fails does not stop the others.

    Args:
        inputs: files to process.
        process: takes the files, and yields for each, in order, the line to print, the error that it failed with, or None if it
            was skipped.
        verb: label of the progress bar, e.g. `encoding`.
        lines: where the lines go.
        several: whether they are some of several; None: if they are more than one.

    Returns:
        The exit status: 0, or 1 if some of several files failed.

    Raises:
        TokenFlowError: the only input failed.
    """
    failed, several = 0, len(inputs) > 1 if several is None else several
    with progress_bar(verb, len(inputs), brief=True) as done:
        for count, outcome in enumerate(process(inputs), 1):
            done(count)
            if outcome is None:
                continue
            if isinstance(outcome, str):
                lines.note(outcome, soft_wrap=True)
            elif not several:
                raise outcome
            else:
                failed += 1
                stderr.print(f"error: {as_options(outcome)}", style="red", soft_wrap=True)
    if failed:
        stderr.print(f"{failed} of {len(inputs)} failed", style="red")
    return 1 if failed else 0
