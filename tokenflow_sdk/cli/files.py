"""Input and output files of the commands: which files to read, where results go, and processing file by file."""

from __future__ import annotations

import glob
import io
import itertools
import os
import re
import stat
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from PIL import Image, PngImagePlugin, UnidentifiedImageError
from rich.console import Console

from tokenflow_sdk.cli.console import stderr, stdout
from tokenflow_sdk.cli.option_names import as_options
from tokenflow_sdk.cli.progress import progress_bar
from tokenflow_sdk.errors import ArgumentError, CodesReadError, ImageReadError, OutputError, TokenFlowError
from tokenflow_sdk.files import file_status, is_directory, write_atomic
from tokenflow_sdk.pictures.images import SUFFIXES
from tokenflow_sdk.pictures.tfc import MAGIC

__all__ = [
    "STDIO",
    "check_outputs",
    "code_files",
    "image_files",
    "image_format",
    "input_bytes",
    "make_directory",
    "output_paths",
    "process_files",
    "save_image",
    "write",
]

STDIO = Path("-")
"""Names stdin as an input, and stdout as an output."""
_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif", ".ppm", ".tga")
"""Endings of images that are written. In its other formats Pillow cannot write RGB, changes the size, or writes a document."""
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
        elif path != STDIO and file_status(path) is None and glob.has_magic(str(path)):
            named = _matches(path) or {path: Path()}
        else:
            named = {path: Path()}
        for file, place in named.items():
            if file in found:
                raise ArgumentError(f"{file} was given twice.", "Give each file once.")
            found[file] = place
    return found


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
    if paths and not stderr.silenced:
        names = ", ".join(str(path.relative_to(directory)) for path in paths[:_SHOWN]) + (
            ", ..." if len(paths) > _SHOWN else ""
        )
        stderr.print(f"{directory}: {len(paths)} left out ({why}): {names}", soft_wrap=True)


def output_paths(inputs: Mapping[Path, Path], output: Path | None, suffix: str) -> list[Path]:
    """The path of each input's result. Creates the directories that they lie in.

    Args:
        inputs: input files, and for each the directory of its result, relative to the output.
        output: a file name or `STDIO`, for a single input; otherwise a directory. None: `STDIO` if that is the input, else the
            current directory.
        suffix: ending of the results' names in a directory, e.g. `.tfc`.

    Raises:
        ArgumentError: two results would have the same path, or several inputs would go into one file.
        OutputError: a directory cannot be created.
    """
    if output is None and list(inputs) == [STDIO]:
        output = STDIO
    if output is not None and (output == STDIO or (output.suffix and not is_directory(output))):
        if len(inputs) > 1:
            raise ArgumentError(f"{len(inputs)} results cannot go into the one file {output}.", "Give -o a directory.")
        return [output]
    directory = output or Path()
    paths: dict[Path, Path] = {}
    for path, place in inputs.items():
        result = directory / place / f"{'stdin' if path == STDIO else path.stem}{suffix}"
        if result in paths:
            raise ArgumentError(
                f"{paths[result]} and {path} would both be written to {result}.", "Encode them into two directories."
            )
        paths[result] = path
    for parent in dict.fromkeys([directory, *(result.parent for result in paths)]):
        make_directory(parent)
    return list(paths)


def make_directory(directory: Path) -> None:
    """Create an output directory, and those above it.

    Raises:
        OutputError: it cannot be created.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise OutputError(f"{directory} cannot be made: {why}.", "Choose another -o.") from error


def check_outputs(inputs: Iterable[Path], outputs: Iterable[Path], *, codes: bool, force: bool) -> None:
    """Refuse to write results over files that may be wanted still.

    Args:
        inputs: files that are read. None of them is ever replaced, under whatever name.
        outputs: files to be written.
        codes: whether codes are written, which replace only codes and empty files; images replace everything but codes.
        force: replace files of the other kind too.

    Raises:
        OutputError: an output is one of the inputs, or a file of the other kind.
    """
    read = {(status.st_dev, status.st_ino) for path in inputs if (status := file_status(path)) is not None}
    for output in outputs:
        status = file_status(output)
        if output == STDIO or status is None:
            continue
        if (status.st_dev, status.st_ino) in read:
            raise OutputError(f"{output} is an input, which would be replaced.", "Choose another -o.")
        if not force and stat.S_ISREG(status.st_mode) and status.st_size and _holds_codes(output) != codes:
            what = "not a file of codes" if codes else "a file of codes"
            raise OutputError(f"{output} exists and is {what}.", "Choose another -o, or replace it with --force.")


def _holds_codes(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            if file.read(len(MAGIC)) == MAGIC:
                return True
        with Image.open(path):
            return False
    except UnidentifiedImageError:
        return path.suffix.lower() == ".tfc"
    except Exception:  # a damaged image, or a file that may not be read
        return False


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
    lines: Console = stdout,
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
                if not stderr.silenced:
                    lines.print(outcome, soft_wrap=True)
            elif not several:
                raise outcome
            else:
                failed += 1
                stderr.print(f"error: {as_options(outcome)}", style="red", soft_wrap=True)
    if failed:
        stderr.print(f"{failed} of {len(inputs)} failed", style="red")
    return 1 if failed else 0


def image_format(output: Path) -> str:
    """Pillow's name of the format that an output's ending says; PNG for `STDIO`.

    Raises:
        ArgumentError: the ending is that of no image format, or of one that is not written.
    """
    Image.init()
    found = "PNG" if output == STDIO else Image.EXTENSION.get(output.suffix.lower(), "")
    if found not in Image.SAVE or output.suffix.lower() not in ("", *_ENDINGS):
        raise ArgumentError(f"{output} has no ending of a picture format.", "Use .png, .jpg or .webp.")
    return found


def save_image(image: Image.Image, output: Path, texts: Mapping[str, str] | None = None) -> None:
    """Write an image in the format that the file name's ending says, PNGs with `texts`. Raises as `image_format`, `write`."""
    buffer, chosen = io.BytesIO(), image_format(output)
    chunks = PngImagePlugin.PngInfo()
    for key, text in (texts or {}).items():
        chunks.add_text(key, text)
    try:
        image.save(buffer, chosen, **({"pnginfo": chunks} if chosen == "PNG" else {}))
    except (OSError, ValueError) as error:
        raise OutputError(f"{output} cannot be written as {chosen}: {error}.", "Use .png.") from error
    write(buffer.getvalue(), output)


def write(data: bytes, output: Path) -> None:
    """Write a result to a file or, for `STDIO`, to stdout.

    Raises:
        OutputError: it cannot be written.
        ArgumentError: stdout is a terminal.
    """
    if output != STDIO:
        write_atomic(output, data)
        return
    if stdout.is_terminal:
        raise ArgumentError("The result is no text to show on a terminal.", "Redirect the output, or give -o a file.")
    stdout.write_bytes(data)
