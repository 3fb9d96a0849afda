"""What a job writes: Parquet files, or WebDataset's tars of `.tfc` files, the same bytes each time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from tokenflow_sdk.pictures.codes import Codes
from tokenflow_sdk.pictures.preparation import Preparation

__all__ = ["FORMATS", "Format", "Record", "Stamp", "Writer", "open_writer"]

Format = Literal["parquet", "webdataset"]
FORMATS: dict[Format, str] = {"parquet": ".parquet", "webdataset": ".tar"}
"""The formats, and the endings of their files."""


@dataclass(frozen=True)
class Record:
    """One row of the output: a picture's codes, or why it has none.

    Args:
        key: of the picture.
        codes: None if there is an error.
        width, height: of the picture; None if not known.
        sha256: of the picture's file, in hex; None if it could not be read.
        error: the error's class and message, e.g. `CorruptImageError: ...`; None if there is none.
        extra: by name, float16 arrays of the shape that the stamp says; empty if there is an error.
    """

    key: str
    codes: Codes | None
    width: int | None = None
    height: int | None = None
    sha256: str | None = None
    error: str | None = None
    extra: Mapping[str, NDArray[np.float16]] = field(default_factory=dict)


@dataclass(frozen=True)
class Stamp:
    """What made a job's codes, the same in all its files.

    Args:
        bundle_sha256: of the tokenizer's bundle.
        variant, codebook_id, codebook_size, patch_nums: of the tokenizer, as in `Codes`.
        scales: how many scales of each picture are kept.
        preparation: how pictures were prepared.
        shapes: of one row of each extra column, by its name.
    """

    bundle_sha256: str
    variant: str
    codebook_id: str
    codebook_size: int
    patch_nums: tuple[int, ...]
    scales: int
    preparation: Preparation
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def to_json(self) -> str:
        """As it stands in a file's metadata."""
        raise NotImplementedError

    @classmethod
    def from_json(cls, text: str) -> Stamp:
        """The stamp that `to_json` gave."""
        raise NotImplementedError


class Writer(Protocol):
    """Writes one file, in the order that records are added."""

    def add(self, record: Record) -> None:
        """Add a row. Raises DatasetError: a key occurs twice."""

    def close(self) -> None:
        """Write the end of the file. A writer that is not closed leaves a file that readers refuse."""

    def __enter__(self) -> Writer: ...
    def __exit__(self, *error: Any) -> None: ...


def open_writer(path: Path, stamp: Stamp, form: Format) -> Writer:
    """A writer of a local file, which must not exist or is replaced.

    Raises:
        OutputError: it cannot be written.
        MissingPackageError: pyarrow is not installed.
    """
    raise NotImplementedError
