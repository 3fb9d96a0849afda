"""Input and output files of the commands: which files to read, where results go, and processing file by file."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from PIL import Image
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tokenflow_sdk.cli.console import stderr, stdout
from tokenflow_sdk.errors import ArgumentError, OutputError, TokenFlowError
from tokenflow_sdk.files import write_atomic
from tokenflow_sdk.pictures.images import pictures_in

__all__ = ["image_files", "output_paths", "process_files", "save_image"]


def image_files(paths: Sequence[Path]) -> list[Path]:
    """The paths, with each directory replaced by the image files in it.

    Raises:
        ArgumentError: a file occurs twice.
        ImageReadError: a directory has no image files.
    """
    found: list[Path] = []
    for path in paths:
        found += pictures_in(path) if path.is_dir() else [path]
    repeated = next((path for i, path in enumerate(found) if path in found[:i]), None)
    if repeated is not None:
        raise ArgumentError(f"{repeated} was given twice.", "Give each picture once.")
    return found


def output_paths(inputs: Sequence[Path], output: Path | None, suffix: str) -> list[Path]:
    """The path of each input's result. Creates the output directory.

    Args:
        inputs: input files.
        output: a file name, for a single input; otherwise a directory. None: the current directory.
        suffix: ending of the results' names in a directory, e.g. `.tfc`.

    Raises:
        ArgumentError: two results would have the same path, or several inputs would go into one file.
        OutputError: the directory cannot be created.
    """
    if output is not None and output.suffix and not output.is_dir():
        if len(inputs) > 1:
            raise ArgumentError(f"{len(inputs)} results cannot go into the one file {output}.", "Give -o a directory.")
        return [output]
    directory = output or Path()
    paths = [directory / f"{path.stem}{suffix}" for path in inputs]
    for i, path in enumerate(paths):
        if path in paths[:i]:
            raise ArgumentError(
                f"{inputs[paths.index(path)]} and {inputs[i]} would both be written to {path}.",
                "Encode them into two directories.",
            )
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{directory} cannot be made: {error.strerror}.", "Choose another -o.") from error
    return paths


def process_files(
    inputs: Sequence[Path],
    process: Callable[[Sequence[Path]], Iterable[str | TokenFlowError]],
    verb: str,
    batch_limit: int = 1,
) -> int:
    """Process files in batches with a progress bar. A file that fails does not stop the others.

    Args:
        inputs: files to process.
        process: takes a batch of files, and yields for each the line to print or the error that it failed with.
        verb: label of the progress bar, e.g. `encoding`.
        batch_limit: most files in one call of `process`.

    Returns:
        The exit status: 0, or 1 if some of several files failed.

    Raises:
        TokenFlowError: the only input failed.
    """
    failed = 0
    columns = (TextColumn(verb), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal) as progress:
        task = progress.add_task(verb, total=len(inputs))
        for start in range(0, len(inputs), batch_limit):
            for outcome in process(inputs[start : start + batch_limit]):
                progress.advance(task)
                if isinstance(outcome, str):
                    stdout.print(outcome, soft_wrap=True)
                elif len(inputs) == 1:
                    raise outcome
                else:
                    failed += 1
                    stderr.print(f"error: {outcome}", style="red", soft_wrap=True)
    if failed:
        stderr.print(f"{failed} of {len(inputs)} failed", style="red")
    return 1 if failed else 0


def save_image(image: Image.Image, output: Path) -> None:
    """Write an image in the format that the file name's ending says.

    Raises:
        ArgumentError: the ending is that of no image format.
        OutputError: the file cannot be written.
    """
    Image.init()
    image_format = Image.EXTENSION.get(output.suffix.lower())
    if image_format not in Image.SAVE:
        raise ArgumentError(f"{output} has no ending of a picture format.", "Use .png, .jpg or .webp.")
    buffer = io.BytesIO()
    image.save(buffer, image_format)
    write_atomic(output, buffer.getvalue())
