"""`Codes`: the code indices of one image, which can be truncated, compared and stored as a `.tfc` file."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tokenflow_sdk.arguments import file_path, instance, integer, integer_row, items
from tokenflow_sdk.errors import ArgumentError, CodebookMismatchError, CodesRangeError, CodesReadError
from tokenflow_sdk.files import write_atomic
from tokenflow_sdk.pictures import tfc
from tokenflow_sdk.pictures.preparation import Preparation
from tokenflow_sdk.pictures.scales import Scales
from tokenflow_sdk.pictures.sources import describe
from tokenflow_sdk.pictures.vocabulary import CodesConfig, Vocabulary

__all__ = ["Codes"]


@dataclass(frozen=True, eq=False, repr=False)
class Codes:
    """The code indices of one image: whole scales, coarse to fine, each in row-major order (docs/model.md, section 2).

    Immutable, including its array, and hashable. Two `Codes` are equal if their indices, variant, codebook and scales are.
    NumPy functions take them as the array `indices`, and `torch.as_tensor(codes)` as a tensor of its own: PyTorch has no
    read-only tensors, and warns of one made from `indices` itself.

    Args:
        indices: 1-D integers in [0, codebook_size), the coarsest n >= 1 scales; stored as a read-only int32 array.
        patch_nums: sides of all scales of the tokenizer, including those that `indices` lacks.
        codebook_size: number of codebook entries K.
        variant: the tokenizer's name, e.g. `clipb_256`.
        codebook_id: the codebook's SHA-256 in hex, of which the first 16 digits are kept, as in a file. Codes from an encoder
            and from a file therefore compare equal.
        preparation: how the picture was prepared; None: not known, as of codes that were drawn. Equality ignores it. A file
            leaves it out where the variant's name is too long for both.

    Raises:
        ArrayError: indices are not a 1-D integer array.
        CodesRangeError: an index is outside the codebook, or the length is not that of whole scales.
        ArgumentError: sizes or names that the file format cannot hold.

    Example:
        >>> codes = Codes(np.array([2, 0, 1, 3, 0]), patch_nums=(1, 2), codebook_size=4, variant="demo", codebook_id="ab" * 32)
        >>> codes.scale(1)
        array([[0, 1],
               [3, 0]], dtype=int32)
        >>> codes.truncate(1).complete
        False
        >>> Codes.from_bytes(codes.to_bytes()) == codes
        True
    """

    indices: NDArray[np.int32]
    patch_nums: tuple[int, ...]
    codebook_size: int
    variant: str
    codebook_id: str
    preparation: Preparation | None = None
    n_scales: int = field(init=False)
    """Number of scales present."""

    def __post_init__(self) -> None:
        header = _checked_header(self)
        array = _checked_indices(self.indices, header)
        object.__setattr__(self, "patch_nums", header.patch_nums)
        object.__setattr__(self, "codebook_size", header.codebook_size)
        object.__setattr__(self, "codebook_id", header.codebook_id)
        object.__setattr__(self, "indices", _immutable(array))
        object.__setattr__(self, "n_scales", header.scales.ends.index(len(array)) + 1)

    @property
    def header(self) -> tfc.Header:
        """The header of these codes' `.tfc` file."""
        return tfc.Header(self.variant, self.codebook_id, self.codebook_size, self.patch_nums, self.preparation)

    @property
    def scales(self) -> Scales:
        """All scales of the tokenizer, including those that are absent here."""
        return self.header.scales

    @property
    def complete(self) -> bool:
        """Whether every scale of the tokenizer is present."""
        return self.n_scales == len(self.patch_nums)

    @property
    def scale_ends(self) -> list[int]:
        """Byte offsets in the `.tfc` file at which each scale present ends and the file may be cut; the last is its size."""
        return tfc.scale_ends(self.header)[: self.n_scales]

    def scale(self, i: int) -> NDArray[np.int32]:
        """The codes of one scale, a read-only int32 view [s, s].

        Args:
            i: scale number, 0 is the coarsest; negative numbers count from the finest scale present.

        Raises:
            ArgumentError: there is no such scale.
        """
        n = self.n_scales
        i = integer("i", i, -n, n - 1, f"is no scale of codes of {n} scales.", f"Use 0 .. {n - 1}.") % n
        scales = self.scales
        return self.indices[scales.starts[i] : scales.ends[i]].reshape(scales.sides[i], scales.sides[i])

    def truncate(self, n_scales: int) -> Codes:
        """The `n_scales` coarsest scales, which decode to a coarser image. Shares the array.

        Args:
            n_scales: number of scales to keep.

        Raises:
            ArgumentError: `n_scales` is less than 1 or more than are present.
        """
        problem = f"is no number of scales to which codes of {self.n_scales} can be cut."
        n_scales = integer("n_scales", n_scales, 1, self.n_scales, problem, f"Give 1 .. {self.n_scales}.")
        return self if n_scales == self.n_scales else self._of(self.header, self.indices[: self.scales.ends[n_scales - 1]])

    def padded(self) -> NDArray[np.int32]:
        """The indices of all scales as the decode graph reads them: a new int32 array [L], -1 in absent scales."""
        full = np.full(self.scales.total, -1, np.int32)
        full[: len(self.indices)] = self.indices
        return full

    def require(self, variant: str, codebook_id: str, codebook_size: int, patch_nums: tuple[int, ...]) -> None:
        """Check that these codes were made with a tokenizer's codebook and scales.

        Args:
            variant: the tokenizer's name, for the error message only.
            codebook_id: the codebook's SHA-256 in hex, or its first 16 digits.
            codebook_size: number of codebook entries.
            patch_nums: sides of the scales.

        Raises:
            CodebookMismatchError: the codebook or the scales differ.
        """
        theirs = _header(variant, codebook_id, codebook_size, patch_nums)
        if replace(self.header, variant=variant) != theirs:
            raise CodebookMismatchError(
                f"These codes were made by {_tokenizer(self.header)}, not by {_tokenizer(theirs)}.",
                "Decode them with the bundle that encoded them; `tokenflow info` shows the codebook of files and bundles.",
            )

    def to_ids(
        self,
        offset: int,
        *,
        image_start: int | None = None,
        image_end: int | None = None,
        scale_end: int | None = None,
    ) -> NDArray[np.int64]:
        """The codes as ids of a language model's vocabulary: code k becomes `offset + k`.

        Args:
            offset: id of code 0.
            image_start, image_end: ids of the tokens before and after the picture; None: there is none.
            scale_end: id of the token after each scale, also the last; None: there is none.

        Returns:
            A new int64 array [n].

        Raises:
            ArgumentError: an id is negative, stands for a code, or stands for two things.
        """
        return Vocabulary(self.codebook_size, offset, image_start, image_end, scale_end).write(self.indices, self.scales)

    @classmethod
    def from_ids(
        cls,
        ids: ArrayLike,
        config: CodesConfig,
        offset: int,
        *,
        image_start: int | None = None,
        image_end: int | None = None,
        scale_end: int | None = None,
    ) -> Codes:
        """The codes that `to_ids` gave as these ids; fewer whole scales are codes too.

        Args:
            ids: integers [n].
            config: of the tokenizer: `tokenizer.config`.
            offset, image_start, image_end, scale_end: as in `to_ids`.

        Raises:
            ArrayError: the ids are no 1-D integer array.
            CodesRangeError: they are not what `to_ids` gives: a token is missing, out of its place, or no code.
            ArgumentError: see `to_ids`.
        """
        c = instance("config", config, CodesConfig, "Give tokenizer.config.")
        vocabulary = Vocabulary(c.codebook_size, offset, image_start, image_end, scale_end)
        return cls(vocabulary.read(ids, Scales(c.patch_nums)), c.patch_nums, c.codebook_size, c.variant, c.codebook_sha256)

    def to_bytes(self) -> bytes:
        """Serialize to the content of a `.tfc` file (docs/reference/tfc-format.md)."""
        return tfc.pack(self.header, self.indices)

    @classmethod
    def from_bytes(cls, data: bytes | bytearray | memoryview) -> Codes:
        """Parse the content of a `.tfc` file. A file cut at the end of a scale gives the scales before the cut.

        Raises:
            CorruptCodesError: not a `.tfc` file, damaged, or cut inside a scale.
        """
        instance("data", data, (bytes, bytearray, memoryview), "Give bytes; Codes.load takes paths and files.")
        return cls._parse(bytes(data), describe(data))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a `.tfc` file atomically.

        Raises:
            OutputError: the file cannot be written.
        """
        write_atomic(path, self.to_bytes())

    @classmethod
    def load(cls, source: str | os.PathLike[str] | BinaryIO | bytes | bytearray | memoryview) -> Codes:
        """Read a `.tfc` file. A file cut at the end of a scale gives the scales before the cut.

        Args:
            source: a path, an open binary file, which is read to its end, or the content as bytes.

        Raises:
            CodesReadError: the file cannot be read.
            CorruptCodesError: not a `.tfc` file, damaged, or cut inside a scale.
            ArgumentError: `source` is of another type.
        """
        if isinstance(source, (bytes, bytearray, memoryview)):
            return cls.from_bytes(source)
        if isinstance(source, os.PathLike):
            source = file_path("source", source)
        return cls._parse(_read(source), describe(source))

    @classmethod
    def _parse(cls, data: bytes, name: str) -> Codes:
        return cls._of(*tfc.unpack(data, name))

    @classmethod
    def _of(cls, header: tfc.Header, indices: NDArray[np.int32]) -> Codes:
        return cls(indices, header.patch_nums, header.codebook_size, header.variant, header.codebook_id, header.preparation)

    def __len__(self) -> int:
        return len(self.indices)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Codes):
            return NotImplemented
        return self.header == other.header and np.array_equal(self.indices, other.indices)

    def __hash__(self) -> int:
        return hash((self.header, self.indices.tobytes()))

    def __reduce__(self) -> tuple[Any, ...]:
        # By default, pickle and deepcopy would restore the array writable.
        return type(self).from_bytes, (self.to_bytes(),)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        wanted = self.indices.dtype if dtype is None else np.dtype(dtype)
        if copy is False and wanted != self.indices.dtype:
            raise ValueError("a cast of codes needs a copy")
        return self.indices.astype(wanted, copy=bool(copy))

    def __dlpack__(self, **options: Any) -> Any:
        """A copy for another library, such as PyTorch, which may write into it."""
        return self.indices.copy().__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.indices.__dlpack_device__()

    def __repr__(self) -> str:
        scales = f"{self.n_scales} scales" if self.complete else f"{self.n_scales} of {len(self.patch_nums)} scales"
        finest = self.patch_nums[self.n_scales - 1]
        return (
            f"Codes({self.variant}: {len(self)} codes of {self.header.bits} bits in {scales} up to {finest} x {finest}, "
            f"{self.scale_ends[-1]:,} bytes, codebook {self.codebook_id})"
        )


def _tokenizer(header: tfc.Header) -> str:
    sides = " ".join(map(str, header.patch_nums))
    return f"{header.variant} (codebook {header.codebook_id} of {header.codebook_size}, scales {sides})"


def _header(variant: object, codebook_id: object, codebook_size: object, patch_nums: Iterable[object]) -> tfc.Header:
    """A header of values of the right types; which values the format allows, `Header.problem` says."""
    hint = "Give those of a tokenizer: its config has them."
    wrong = "is no size."
    return tfc.Header(
        instance("variant", variant, str, hint),
        instance("codebook_id", codebook_id, str, hint)[:16].lower(),
        integer("codebook_size", codebook_size, 0, 2**63, wrong, hint),
        tuple(integer("patch_nums", side, 0, 2**63, wrong, hint) for side in items("patch_nums", patch_nums, hint)),
    )


def _checked_header(codes: Codes) -> tfc.Header:
    hint = "Make them with Tokenizer.encode or Codes.load."
    header = _header(codes.variant, codes.codebook_id, codes.codebook_size, codes.patch_nums)
    problem = header.problem()
    preparation: object = codes.preparation
    if not (preparation is None or isinstance(preparation, Preparation)):
        problem = f"the preparation {preparation!r}"
    if problem:
        raise ArgumentError(f"Codes cannot have {problem}.", hint)
    return header


def _checked_indices(indices: ArrayLike, header: tfc.Header) -> NDArray[np.integer[Any]]:
    hint = "Give one row, e.g. indices[0].astype(np.int32)."
    array = integer_row("Code indices", indices, hint)
    outside = np.flatnonzero((array < 0) | (array >= header.codebook_size))
    if len(outside):
        raise CodesRangeError(
            f"Code {array[outside[0]]} at position {outside[0]} is outside the codebook.",
            f"Codes of {header.variant} are 0 .. {header.codebook_size - 1}.",
        )
    lengths = header.scales.ends
    if len(array) not in lengths:
        below, above = [n for n in lengths if n < len(array)][-1:], [n for n in lengths if n > len(array)][:1]
        near = " or ".join(f"{n} ({lengths.index(n) + 1} of {len(lengths)} scales)" for n in below + above)
        raise CodesRangeError(f"{len(array)} codes are no whole number of {header.variant}'s scales.", f"Give {near}.")
    return array


def _immutable(array: NDArray[np.integer[Any]]) -> NDArray[np.int32]:
    """The values as int32 over `bytes`, so that the array cannot be made writable; not copied if they already are."""
    owner: object = array
    while isinstance(owner, np.ndarray):
        owner = owner.base
    if isinstance(owner, bytes) and array.dtype == np.int32 and array.flags.c_contiguous and array.flags.aligned:
        return array.astype(np.int32, copy=False)
    return np.frombuffer(array.astype(np.int32).tobytes(), np.int32)


def _read(source: str | os.PathLike[str] | BinaryIO) -> bytes:
    """The content of a file, up to one byte more than the largest valid file has."""
    limit = tfc.MAX_BYTES + 1
    if not isinstance(source, (str, os.PathLike)) and not hasattr(source, "read"):
        raise ArgumentError(
            f"Codes cannot be loaded from {type(source).__name__}.", "Give a path, an open binary file or bytes."
        )
    try:
        if isinstance(source, (str, os.PathLike)):
            with Path(source).open("rb") as file:
                return file.read(limit)
        data = bytearray()
        # Pipes and sockets may return fewer bytes than requested.
        while len(data) < limit and (part := source.read(limit - len(data))):
            data += part
        return bytes(data)
    except (OSError, ValueError, TypeError) as error:
        named = isinstance(source, (str, os.PathLike))
        hint = "Check the path and its permissions." if named else "Give a file that is open in binary mode ('rb')."
        why = getattr(error, "strerror", None) or error
        raise CodesReadError(f"{describe(source)} cannot be read: {why}.", hint) from error
