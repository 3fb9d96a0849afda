"""What pictures are made from: their names in error messages, arrays of other libraries, and several pictures at once."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tokenflow_sdk.arguments import items
from tokenflow_sdk.errors import ArgumentError, ArrayError
from tokenflow_sdk.files import is_directory

__all__ = ["ImageSource", "describe", "kept", "several", "to_array"]

ImageSource: TypeAlias = "str | os.PathLike[str] | bytes | bytearray | memoryview | BinaryIO | Image.Image | NDArray[np.uint8]"
_FILES = (str, bytes, bytearray, memoryview, os.PathLike)


def describe(source: object) -> str:
    """A short name of an image or file source for error messages.

    Example:
        >>> describe("photo.jpg"), describe(b"1234"), describe(np.zeros((480, 640, 3), np.uint8))
        ('photo.jpg', '<4 bytes>', '<array uint8[480, 640, 3]>')
    """
    if isinstance(source, (str, os.PathLike)):
        return os.fspath(source)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return f"<{len(source)} bytes>"
    if isinstance(source, np.ndarray):
        return f"<array {source.dtype}{list(source.shape)}>"
    if isinstance(source, Image.Image):
        return str(getattr(source, "filename", "") or f"<{source.mode} image {source.width}x{source.height}>")
    return str(getattr(source, "name", f"<{type(source).__name__}>"))


def to_array(source: Any) -> Any:
    """An array of another library, which has `__dlpack__` or `__array__`, as a NumPy array; anything else as it is.

    Raises:
        ArrayError: NumPy cannot read it: it is on a GPU, say, or of a type that NumPy lacks.
    """
    if isinstance(source, (np.ndarray, Image.Image, *_FILES)) or hasattr(source, "read"):
        return source
    how = np.from_dlpack if hasattr(source, "__dlpack__") else np.asarray if hasattr(source, "__array__") else None
    if how is None:
        return source
    try:
        found = how(source)
    except (TypeError, ValueError, RuntimeError, BufferError) as error:
        raise ArrayError(
            f"A {type(source).__name__} cannot become a NumPy array: {error}.",
            "Give a u8 array in host memory: of a PyTorch tensor, tensor.detach().cpu().",
        ) from error
    return found


def several(method: str, images: Iterable[ImageSource]) -> Iterator[ImageSource]:
    """The pictures of an argument that must be several: an iterable of pictures, or one array of them.

    Args:
        method: of `Tokenizer`, whose argument it is.
        images: what was given.

    Raises:
        ArgumentError: it is one picture, or not iterable.
    """
    given: Any = to_array(images)
    stack = isinstance(given, np.ndarray) and (given.ndim == 4 or given.dtype == object)
    one = isinstance(given, (np.ndarray, Image.Image, *_FILES)) or hasattr(given, "read")
    hint = f"Use encode(image), or give a list: {method}([image])."
    name = describe(given) if isinstance(given, (str, os.PathLike)) else None
    if isinstance(name, str) and is_directory(Path(name)):
        raise ArgumentError(
            f"{method} takes several pictures, and {name} is a directory.",
            f"Give the pictures in it: {method}(pathlib.Path({name!r}).glob('*.jpg')).",
        )
    if one and not stack:
        raise ArgumentError(f"{method} takes several pictures, and {describe(given)} is one.", hint)
    return items("images", given, hint)


def kept(source: ImageSource) -> ImageSource | None:
    """A picture that the caller may change from now on; None: of such a picture only what was read is sure.

    Files are read later: who changes those changes the picture.
    """
    if isinstance(source, (str, bytes, os.PathLike)):
        return source
    if isinstance(source, (bytearray, memoryview)):
        return bytes(source)
    array = to_array(source)
    return array.copy() if isinstance(array, np.ndarray) else None
