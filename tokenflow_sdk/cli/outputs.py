"""Results of the commands: the files that -o names, what may be replaced, and writing."""

from __future__ import annotations

import io
import os
import stat
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from PIL import ExifTags, Image, PngImagePlugin, UnidentifiedImageError

from tokenflow_sdk.cli.console import stdout
from tokenflow_sdk.errors import ArgumentError, OutputError
from tokenflow_sdk.files import file_status, is_directory, write_atomic
from tokenflow_sdk.pictures.tfc import MAGIC

__all__ = [
    "STDIO",
    "Output",
    "check_outputs",
    "image_format",
    "make_directory",
    "output_file",
    "output_paths",
    "save_image",
    "write",
]

STDIO = Path("-")
"""Names stdin as an input, and stdout as an output."""
_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif", ".ppm", ".tga")
"""Endings of images that are written. In its other formats Pillow cannot write RGB, changes the size, or writes a document."""
_SOFTWARE = "tokenflow-sdk"
"""Value of the mark `Software` in images that are written: a text chunk of PNGs, the EXIF tag elsewhere."""


@dataclass(frozen=True)
class Output:
    """What -o names: a path, and whether it is written as a directory's, which a `Path` forgets."""

    path: Path
    directory: bool = False

    @classmethod
    def of(cls, path: Path, text: str) -> Output:
        """Of a path, and of how it was written: `results/` and `results/.` are directories."""
        return cls(path, os.path.basename(text) in ("", os.curdir))  # noqa: PTH119 - a `Path` has no empty name


def output_file(output: Output, *, codes: bool) -> Path | None:
    """The one file that -o names, or `STDIO`. None: it names a directory, as every name without an ending of images or codes.

    Args:
        output: the value of -o.
        codes: whether codes are written, or else images.

    Raises:
        ArgumentError: it ends as a file that is not written: an image for codes, codes for images, another format of images.
    """
    path, ending = output.path, output.path.suffix.lower()
    if path == STDIO:
        return path
    if output.directory or is_directory(path):
        return None
    if ending in ((".tfc",) if codes else _ENDINGS):
        return path
    if ending in (".tfc", *_ENDINGS, *Image.registered_extensions()):
        what, written = ("a file of codes", ".tfc") if codes else ("an image that can be written", ".png, .jpg or .webp")
        raise ArgumentError(
            f"{path} does not end as the name of {what}.", f"Use {written}, or a separator at the end for a directory: {path}/."
        )
    return None


def output_paths(inputs: Mapping[Path, Path], output: Output | None, *, codes: bool) -> list[Path]:
    """The path of each input's result. Creates the directories that they lie in.

    Args:
        inputs: input files, and for each the directory of its result, relative to the output.
        output: the value of -o: a file or `STDIO`, for a single input; otherwise a directory. None: `STDIO` if that is the
            input, else the current directory.
        codes: whether codes are written, or else images.

    Raises:
        ArgumentError: as `output_file`; two results would have the same path, or several inputs would go into one file.
        OutputError: a directory cannot be created.
    """
    if output is None:
        output = Output(STDIO if list(inputs) == [STDIO] else Path())
    if (file := output_file(output, codes=codes)) is not None:
        if len(inputs) > 1:
            raise ArgumentError(f"{len(inputs)} results cannot go into the one file {file}.", "Give -o a directory.")
        return [file]
    results = _results(inputs, output.path, ".tfc" if codes else ".png")
    for parent in dict.fromkeys([output.path, *(result.parent for result in results)]):
        make_directory(parent)
    return results


def _results(inputs: Mapping[Path, Path], directory: Path, suffix: str) -> list[Path]:
    """The results in a directory. They have their inputs' names with another ending, `a.tfc` for `a.jpg`.

    Where several would have one name, they keep the ending too: `a.jpg.tfc` and `a.png.tfc`.
    """
    places = {path: directory / place for path, place in inputs.items()}
    names = {path: "stdin" if path == STDIO else path.name for path in inputs}
    results = {path: place / f"{Path(names[path]).stem}{suffix}" for path, place in places.items()}
    whole = {path: place / f"{names[path]}{suffix}" for path, place in places.items()}
    while True:
        taken = Counter(results.values())
        # More than one round only where the longer name is that of another: `a.jpg.png` beside the two above.
        longer = {path: whole[path] for path, result in results.items() if taken[result] > 1 and result != whole[path]}
        if not longer:
            break
        results.update(longer)
    first: dict[Path, Path] = {}
    for path, result in results.items():
        if (other := first.setdefault(result, path)) is not path:
            raise ArgumentError(f"{other} and {path} would both be written to {result}.", "Write them into two directories.")
    return list(results.values())


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
        codes: whether codes are written, which replace only codes and empty files; images replace only empty files and
            images that say that they were written by tokenflow.
        force: replace other files too.

    Raises:
        OutputError: an output is one of the inputs, or a file that is not replaced.
    """
    read = {(status.st_dev, status.st_ino) for path in inputs if (status := file_status(path)) is not None}
    for output in outputs:
        status = file_status(output)
        if output == STDIO or status is None:
            continue
        if (status.st_dev, status.st_ino) in read:
            raise OutputError(f"{output} is an input, which would be replaced.", "Choose another -o.")
        if force or not stat.S_ISREG(status.st_mode) or not status.st_size:
            continue
        if (held := _held(output)) != ("codes" if codes else "result"):
            foreign = "is not a file of codes" if codes else "does not say that tokenflow wrote it"
            what = "is a file of codes" if held == "codes" else foreign
            raise OutputError(f"{output} exists and {what}.", "Choose another -o, or replace it with --force.")


def _held(path: Path) -> str:
    """What a file holds: `codes`, an image that is a `result` of tokenflow, or something `else`."""
    try:
        with path.open("rb") as file:
            if file.read(len(MAGIC)) == MAGIC:
                return "codes"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Pillow, about pixels that are not read
            with Image.open(path) as image:
                return "result" if _is_marked(image) else "else"
    except UnidentifiedImageError:
        return "codes" if path.suffix.lower() == ".tfc" else "else"
    except Exception:  # a damaged image, or a file that may not be read
        return "else"


def _is_marked(image: Image.Image) -> bool:
    if image.format != "PNG":
        return bool(image.getexif().get(ExifTags.Base.Software) == _SOFTWARE)
    # `info` has the chunks before the pixels, which are not read. Earlier versions wrote only `tokenflow_decoded`, and
    # `Generation` writes only `tokenflow`.
    return image.info.get("Software") == _SOFTWARE or any(str(key).startswith("tokenflow") for key in image.info)


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
    """Write an image in the format that the file name's ending says, PNGs with `texts`. Raises as `image_format`, `write`.

    It is marked as written by tokenflow where the format has a place for that: PNG, and those with EXIF.
    """
    buffer, chosen = io.BytesIO(), image_format(output)
    chunks, exif = PngImagePlugin.PngInfo(), Image.Exif()
    exif[ExifTags.Base.Software] = _SOFTWARE
    for key, text in {"Software": _SOFTWARE, **(texts or {})}.items():
        chunks.add_text(key, text)
    try:
        image.save(buffer, chosen, **({"pnginfo": chunks} if chosen == "PNG" else {"exif": exif}))
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
