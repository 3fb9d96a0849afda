"""Input and output files of the commands: which files to read, where results go, and processing file by file."""

from __future__ import annotations

import io
import stat
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from PIL import Image, UnidentifiedImageError
from rich.console import Console

from tokenflow_sdk.cli.console import stderr, stdout
from tokenflow_sdk.cli.progress import progress_bar
from tokenflow_sdk.errors import ArgumentError, ImageReadError, OutputError, TokenFlowError
from tokenflow_sdk.files import file_status, is_directory, write_atomic
from tokenflow_sdk.pictures.images import pictures_in
from tokenflow_sdk.pictures.tfc import MAGIC

__all__ = [
    "STDIO",
    "check_outputs",
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


def image_files(paths: Sequence[Path]) -> list[Path]:
    """The paths, with each directory replaced by the image files in it. Prints which other files it has, and why not them.

    Of files of codes, which an earlier run may have written there, nothing is said.

    Raises:
        ArgumentError: a file occurs twice.
        ImageReadError: a directory cannot be read, or has no image files.
    """
    found: dict[Path, None] = {}
    for path in paths:
        for image in _images_in(path) if is_directory(path) else [path]:
            if image in found:
                raise ArgumentError(f"{image} was given twice.", "Give each picture once.")
            found[image] = None
    return list(found)


def _images_in(directory: Path) -> list[Path]:
    try:
        # Beside each file that macOS copies to another file system it writes its metadata, to a file with this prefix.
        images = [path for path in pictures_in(directory) if not path.name.startswith("._")]
        others = sorted(set(directory.iterdir()) - set(images))
    except ImageReadError:
        raise
    except OSError as error:
        raise ImageReadError(f"{directory} cannot be read: {error.strerror}.", "Check its permissions.") from error
    if not images:
        raise ImageReadError(f"{directory} holds no pictures.", "Those that begin with ._ are metadata of macOS.")
    metadata = [path for path in others if path.name.startswith("._")]
    directories = [path for path in others if is_directory(path)]
    explained = {*metadata, *directories}
    endings = [path for path in others if path not in explained and path.suffix.lower() != ".tfc"]
    for left_out, why in (
        (endings, "their endings are not those of pictures; name them to read them all the same"),
        (metadata, "metadata of macOS"),
        (directories, "directories in directories are not searched"),
    ):
        if left_out:
            names = ", ".join(path.name for path in left_out[:_SHOWN]) + (", ..." if len(left_out) > _SHOWN else "")
            stderr.print(f"{directory}: {len(left_out)} left out ({why}): {names}", soft_wrap=True)
    return images


def output_paths(inputs: Sequence[Path], output: Path | None, suffix: str) -> list[Path]:
    """The path of each input's result. Creates the output directory.

    Args:
        inputs: input files.
        output: a file name or `STDIO`, for a single input; otherwise a directory. None: `STDIO` if that is the input, else the
            current directory.
        suffix: ending of the results' names in a directory, e.g. `.tfc`.

    Raises:
        ArgumentError: two results would have the same path, or several inputs would go into one file.
        OutputError: the directory cannot be created.
    """
    if output is None and list(inputs) == [STDIO]:
        output = STDIO
    if output is not None and (output == STDIO or (output.suffix and not is_directory(output))):
        if len(inputs) > 1:
            raise ArgumentError(f"{len(inputs)} results cannot go into the one file {output}.", "Give -o a directory.")
        return [output]
    directory = output or Path()
    paths: dict[Path, Path] = {}
    for path in inputs:
        result = directory / f"{'stdin' if path == STDIO else path.stem}{suffix}"
        if result in paths:
            raise ArgumentError(
                f"{paths[result]} and {path} would both be written to {result}.", "Encode them into two directories."
            )
        paths[result] = path
    make_directory(directory)
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
    process: Callable[[Sequence[Path]], Iterable[str | TokenFlowError]],
    verb: str,
    batch_limit: int = 1,
    lines: Console = stdout,
    several: bool | None = None,
) -> int:
    """Process files in batches with a progress bar. A file that fails does not stop the others.

    Args:
        inputs: files to process.
        process: takes a batch of files, and yields for each the line to print or the error that it failed with.
        verb: label of the progress bar, e.g. `encoding`.
        batch_limit: most files in one call of `process`.
        lines: where the lines go.
        several: whether they are some of several; None: if they are more than one.

    Returns:
        The exit status: 0, or 1 if some of several files failed.

    Raises:
        TokenFlowError: the only input failed.
    """
    failed, several = 0, len(inputs) > 1 if several is None else several
    count = 0
    with progress_bar(verb, len(inputs), brief=True) as done:
        for start in range(0, len(inputs), batch_limit):
            for outcome in process(inputs[start : start + batch_limit]):
                done(count := count + 1)
                if isinstance(outcome, str):
                    if not stderr.silenced:
                        lines.print(outcome, soft_wrap=True)
                elif not several:
                    raise outcome
                else:
                    failed += 1
                    stderr.print(f"error: {outcome}", style="red", soft_wrap=True)
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


def save_image(image: Image.Image, output: Path) -> None:
    """Write an image in the format that the file name's ending says. Raises as `image_format` and `write`."""
    buffer, chosen = io.BytesIO(), image_format(output)
    try:
        image.save(buffer, chosen)
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
