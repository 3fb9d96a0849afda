"""Reads a bundle's `reference.npz` and a generator's `codebook.npy`, if dtypes and shapes are those of its config."""

from __future__ import annotations

import io
import math
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, Protocol, TypeVar

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from tokenflow_sdk.bundle.bundle import Bundle
from tokenflow_sdk.bundle.model_config import GeneratorConfig
from tokenflow_sdk.bundle.signatures import config_sizes
from tokenflow_sdk.errors import CorruptBundleError
from tokenflow_sdk.files import read_regular

__all__ = ["load_codebook", "load_reference"]

_MOST_BYTES = 2**31
"""Bound on a file of arrays, also unpacked: that of the largest released model has a twentieth of it."""
_UNREADABLE = (
    *(OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, EOFError, SyntaxError, MemoryError),
    *(RuntimeError, zipfile.BadZipFile, zlib.error, struct.error, tokenize.TokenError),
)
"""What NumPy and zipfile raise for damaged content."""


class _Reference(Protocol):
    """A dataclass with one field for each array; `layout` lists their names, dtypes and shapes, see `_Layout`."""

    layout: ClassVar[str]

    def __init__(self, **arrays: Any) -> None: ...


R = TypeVar("R", bound=_Reference)


class _Layout:
    """Expected arrays, as text: `name dtype dimension ...; ...`.

    A dimension is a number, a size of the config, or a name that stands for the same size wherever it is used.
    The dtype `int32<size` is int32 with values from 0 to below that size of the config.
    """

    def __init__(self, text: str, sizes: Mapping[str, int]) -> None:
        self._sizes = dict(sizes)
        self.arrays = {name: parts for name, *parts in (array.split() for array in text.split("; "))}

    def check(self, name: str, array: NDArray[Any]) -> None:
        """Raise ValueError unless an array is as expected."""
        kind, *dims = self.arrays[name]
        dtype, _, bound = kind.partition("<")
        shape = (
            tuple(
                int(dim) if dim.isdigit() else self._sizes.setdefault(dim, size)
                for dim, size in zip(dims, array.shape, strict=True)
            )
            if len(dims) == array.ndim
            else ()
        )
        if array.dtype != np.dtype(dtype) or array.shape != shape or array.size == 0:
            raise ValueError(f"{name} is {array.dtype}{list(array.shape)}, not {dtype}[{', '.join(dims)}]")
        if bound and not 0 <= array.min() <= array.max() < self._sizes[bound]:
            raise ValueError(f"{name} has values outside 0 .. {self._sizes[bound] - 1}")


def load_reference(bundle: Bundle[Any], kind: type[R]) -> R:
    """Load a bundle's `reference.npz`: inputs, and the outputs that engines must reproduce.

    Args:
        bundle: the bundle.
        kind: a dataclass with one field for each array of the file.

    Raises:
        CorruptBundleError: the bundle has no reference, or it is damaged or not of this bundle's sizes.
    """
    path, entry = bundle.asset_path("reference"), bundle.asset("reference")
    bundle.verify(entry)
    layout = _Layout(kind.layout, config_sizes(bundle.config))
    try:
        with zipfile.ZipFile(io.BytesIO(read_regular(path, _MOST_BYTES))) as archive:
            members = {member.filename.removesuffix(".npy"): member for member in archive.infolist()}
            if set(members) != set(layout.arrays) or sum(member.file_size for member in members.values()) > _MOST_BYTES:
                raise ValueError(f"it holds {', '.join(sorted(members)) or 'nothing'}")
            arrays = {}
            for name, member in members.items():
                with archive.open(member) as file:
                    arrays[name] = _read_array(io.BytesIO(file.read()))
                layout.check(name, arrays[name])
        return kind(**arrays)
    except _UNREADABLE as error:
        raise _corrupt(path, "reference file", error) from error


def load_codebook(bundle: Bundle[GeneratorConfig]) -> NDArray[np.float32]:
    """Load a generator's codebook, float32 [K, C]; the semantic and the pixel half of each row have unit length.

    Raises:
        CorruptBundleError: the bundle has no codebook, or the file is not a float32 array with K rows, each a code's features.
    """
    path = bundle.asset_path("codebook")
    features = next(spec for spec in bundle.graph("embed_image").inputs if spec.name == "features")
    layout = _Layout(f"codebook float32 codebook_size {features.shape[-1]}", config_sizes(bundle.config))
    try:
        codebook = _read_array(io.BytesIO(read_regular(path, _MOST_BYTES)))
        layout.check("codebook", codebook)
        if not np.isfinite(codebook).all():
            raise ValueError("it has values that are not finite")
    except _UNREADABLE as error:
        raise _corrupt(path, f"codebook of {bundle.config.codebook_size} entries", error) from error
    return codebook


def _read_array(file: BinaryIO) -> NDArray[Any]:
    """Read an array of plain numbers that fills a file in memory. Its header is believed if the file has that many bytes."""
    version = npy.read_magic(file)
    read_header = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}[version]
    shape, by_columns, dtype = read_header(file)
    data = file.read()
    if dtype.kind not in "iuf" or min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != len(data):
        raise ValueError(f"{len(data)} bytes are no {dtype}{list(shape)}")
    # A copy, because arrays over bytes cannot be written and may be misaligned.
    array: NDArray[Any] = np.frombuffer(data, dtype).reshape(shape, order="F" if by_columns else "C").copy()
    return array


def _corrupt(path: Path, what: str, error: BaseException) -> CorruptBundleError:
    return CorruptBundleError(
        f"{path} is no {what}: {error}.", "Export the bundle again with `tokenflow export`, or fetch it again."
    )
