"""`Codes`: the code indices of one picture, coarse to fine."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from tokenflow_sdk import tfc
from tokenflow_sdk.errors import ArgumentError, ArrayError, CodebookMismatchError, CodesRangeError, CodesReadError
from tokenflow_sdk.files import write_atomic

__all__ = ["Codes"]


@dataclass(frozen=True, eq=False, repr=False)
class Codes:
    """The code indices of one picture: whole scales, coarse to fine, row-major in each (spec section 2). Immutable.

    Args:
        indices: 1-D integers in [0, codebook_size), the first n >= 1 scales; kept as a read-only int32 array.
        patch_nums: sides of all the tokenizer's scales, also those that are absent here.
        codebook_size: entries of the codebook.
        variant: the tokenizer's name, e.g. `clipb_256`.
        codebook_id: the codebook's SHA-256 in hex; its first 16 digits are kept, as in a file.

    Raises:
        ArrayError: indices are not a 1-D integer array.
        CodesRangeError: an index outside the codebook, or a length that is no whole number of scales.
        ArgumentError: sizes or names that no file could hold.
    """

    indices: NDArray[np.int32]
    patch_nums: tuple[int, ...]
    codebook_size: int
    variant: str
    codebook_id: str
    n_scales: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "patch_nums", tuple(int(side) for side in self.patch_nums))
        object.__setattr__(self, "codebook_id", self.codebook_id[:16].lower())
        problem = self.header.problem()
        if problem:
            raise ArgumentError(f"Codes cannot have {problem}.", "Make them with Tokenizer.encode or Codes.load.")
        array = np.asarray(self.indices)
        if array.ndim != 1 or array.dtype.kind not in "iu":
            raise ArrayError(
                f"Code indices must be a 1-D integer array, not {array.dtype}{list(array.shape)}.",
                "Give one row, e.g. indices[0].astype(np.int32).",
            )
        outside = np.flatnonzero((array < 0) | (array >= self.codebook_size))
        if len(outside):
            raise CodesRangeError(
                f"Code {array[outside[0]]} at position {outside[0]} is outside the codebook.",
                f"Codes of {self.variant} are 0 .. {self.codebook_size - 1}.",
            )
        ends = np.cumsum(np.square(self.patch_nums))
        if len(array) not in ends:
            raise CodesRangeError(
                f"{len(array)} codes are no whole number of {self.variant}'s scales.",
                f"Valid lengths are {', '.join(map(str, ends))}.",
            )
        array = array.astype(np.int32)
        array.flags.writeable = False
        object.__setattr__(self, "indices", array)
        object.__setattr__(self, "n_scales", int(np.searchsorted(ends, len(array))) + 1)

    @property
    def header(self) -> tfc.Header:
        """What a file says before its codes."""
        return tfc.Header(self.variant, self.codebook_id, self.codebook_size, self.patch_nums)

    @property
    def complete(self) -> bool:
        """Whether every scale of the tokenizer is present."""
        return self.n_scales == len(self.patch_nums)

    def scale(self, i: int) -> NDArray[np.int32]:
        """Scale `i` (from 0; negative from the finest present) as a read-only int32 map [s, s].

        Raises:
            ArgumentError: there is no such scale here.
        """
        if not -self.n_scales <= i < self.n_scales:
            raise ArgumentError(f"There is no scale {i} in codes of {self.n_scales} scales.", f"Use 0 .. {self.n_scales - 1}.")
        side = self.patch_nums[i % self.n_scales]
        start = sum(s * s for s in self.patch_nums[: i % self.n_scales])
        return self.indices[start : start + side * side].reshape(side, side)

    def truncate(self, n_scales: int) -> Codes:
        """The `n_scales` coarsest scales: a coarser picture, still decodable.

        Raises:
            ArgumentError: fewer than 1 or more than are present.
        """
        if not 1 <= n_scales <= self.n_scales:
            raise ArgumentError(
                f"Codes of {self.n_scales} scales cannot be cut to {n_scales}.", f"Give 1 .. {self.n_scales} scales."
            )
        length = sum(side * side for side in self.patch_nums[:n_scales])
        return Codes(self.indices[:length], self.patch_nums, self.codebook_size, self.variant, self.codebook_id)

    def padded(self) -> NDArray[np.int32]:
        """int32 [L] for the decode graph: all scales, -1 throughout the absent ones."""
        full = np.full(sum(side * side for side in self.patch_nums), -1, np.int32)
        full[: len(self.indices)] = self.indices
        return full

    def require(self, variant: str, codebook_id: str, codebook_size: int, patch_nums: tuple[int, ...]) -> None:
        """Check that these codes belong to a tokenizer.

        Raises:
            CodebookMismatchError: they were made with another codebook or other scales.
        """
        theirs = tfc.Header(variant, codebook_id[:16].lower(), codebook_size, patch_nums)
        mine = self.header
        if (mine.codebook_id, mine.codebook_size, mine.patch_nums) != (theirs.codebook_id, codebook_size, theirs.patch_nums):
            raise CodebookMismatchError(
                f"These codes were made by {self.variant} (codebook {self.codebook_id}), not by {variant} "
                f"(codebook {theirs.codebook_id}).",
                "Decode them with the bundle that encoded them; `tokenflow info` shows the codebook of files and bundles.",
            )

    def to_bytes(self) -> bytes:
        """The content of a `.tfc` file (docs/tfc-format.md)."""
        return tfc.pack(self.header, self.indices)

    @classmethod
    def from_bytes(cls, data: bytes) -> Codes:
        """Read the content of a `.tfc` file; one cut at a scale's end gives the scales before it.

        Raises:
            CorruptCodesError: not a `.tfc` file, damaged, or cut inside a scale.
        """
        header, indices = tfc.unpack(data)
        return cls(indices, header.patch_nums, header.codebook_size, header.variant, header.codebook_id)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a `.tfc` file, whole or not at all.

        Raises:
            OutputError: it cannot be written.
        """
        write_atomic(path, self.to_bytes())

    @classmethod
    def load(cls, source: str | os.PathLike[str] | BinaryIO | bytes) -> Codes:
        """Read a `.tfc` file from a path, an open binary file or bytes.

        Raises:
            CodesReadError: the file cannot be read.
            CorruptCodesError: not a `.tfc` file, damaged, or cut inside a scale.
        """
        if isinstance(source, bytes):
            return cls.from_bytes(source)
        try:
            if isinstance(source, (str, os.PathLike)):
                with Path(source).open("rb") as file:
                    return cls.from_bytes(file.read(tfc.MAX_BYTES + 1))
            return cls.from_bytes(source.read(tfc.MAX_BYTES + 1))
        except OSError as error:
            raise CodesReadError(
                f"{source} cannot be read: {error.strerror}.", "Check the path and its permissions."
            ) from error

    def __len__(self) -> int:
        return len(self.indices)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Codes):
            return NotImplemented
        return self.header == other.header and np.array_equal(self.indices, other.indices)

    def __hash__(self) -> int:
        return hash((self.header, self.indices.tobytes()))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        if copy is False and dtype is not None and np.dtype(dtype) != self.indices.dtype:
            raise ValueError("a cast of codes needs a copy")
        return self.indices.astype(dtype or np.int32, copy=bool(copy))

    def __repr__(self) -> str:
        scales = f"{self.n_scales} scales" if self.complete else f"{self.n_scales} of {len(self.patch_nums)} scales"
        finest = self.patch_nums[self.n_scales - 1]
        return (
            f"Codes({self.variant}: {len(self)} codes in {scales} up to {finest} x {finest}, "
            f"{len(self.to_bytes()):,} bytes, codebook {self.codebook_id})"
        )
