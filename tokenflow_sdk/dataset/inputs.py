"""Which pictures a job reads: its shards, found without reading pictures, and the rows of each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from tokenflow_sdk.errors import TokenFlowError

__all__ = ["InputOptions", "Row", "Shard", "find_shards", "read_shard"]


@dataclass(frozen=True)
class InputOptions:
    """How inputs are read.

    Args:
        shard_size: pictures of a directory in one shard.
        image_column: of Parquet files: bytes, paths, or the struct of bytes and path that `datasets` writes.
        key_column: of Parquet files; None: keys are the file's name and the number of the row.
    """

    shard_size: int = 10_000
    image_column: str = "image"
    key_column: str | None = None


@dataclass(frozen=True)
class Shard:
    """A part of a job's input, which becomes one output file.

    Args:
        index: number of the shard, from 0 on.
        kind: `files` of a directory, a `tar`, or a `parquet` file.
        where: the directory, absolute, or the file.
        pattern: of a directory's files, those that fit; empty: all below it.
        first: of a directory's files, the path of the first, relative to it.
        names: of files that were named one by one.
        count: pictures in it; None: not known before it is read.
        fingerprint: SHA-256 over the names and sizes of what it holds, the same wherever the directory lies.
    """

    index: int
    kind: Literal["files", "tar", "parquet"]
    where: str
    fingerprint: str
    pattern: str = ""
    first: str = ""
    names: tuple[str, ...] = ()
    count: int | None = None

    def to_json(self) -> dict[str, Any]:
        """The fields that are not empty, as `json.dumps` takes them."""
        raise NotImplementedError

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Shard:
        """The shard that `to_json` gave."""
        raise NotImplementedError


class Row(NamedTuple):
    """One picture of a shard: its key, and its file's bytes or why they cannot be read."""

    key: str
    data: bytes | TokenFlowError


def find_shards(inputs: Sequence[str], options: InputOptions | None = None) -> Iterator[Shard]:
    """The shards of a job's inputs, in order, the same each time. Memory does not grow with the number of pictures.

    Raises:
        DatasetError: an input does not exist, cannot be listed, or holds no pictures.
        StorageError: a storage failed; it may work later.
        MissingPackageError: fsspec, or what it needs for a scheme, is not installed.
    """
    raise NotImplementedError


def read_shard(shard: Shard, options: InputOptions | None = None, threads: int = 1) -> Iterator[Row]:
    """The pictures of a shard, in order. `threads` read single files side by side.

    Raises:
        DatasetError: the shard is not as it was found, is damaged, or lacks the column.
        StorageError: a storage failed; it may work later.
        MissingPackageError: pyarrow or fsspec is not installed.
    """
    raise NotImplementedError
