"""Reads codes back from what `tokenflow tokenize` wrote."""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, overload

import numpy as np
from numpy.typing import NDArray

from tokenflow_sdk.arguments import file_path, integer, items, shown
from tokenflow_sdk.dataset.outputs import DONE, FORMATS, METADATA_KEY, PLAIN, STATE, Record, Stamp
from tokenflow_sdk.dataset.parquet import open_parquet
from tokenflow_sdk.dataset.rows import tar_members
from tokenflow_sdk.dataset.storage import Storage
from tokenflow_sdk.errors import ArgumentError, DatasetError
from tokenflow_sdk.pictures.codes import Codes

__all__ = ["code_shards", "read_codes", "read_records"]


def code_shards(path: str | os.PathLike[str]) -> list[str]:
    """The files of codes at a place, in order: of a job's output those of shards that are done, of another directory all.

    Args:
        path: a directory, an address that fsspec opens, or one file.

    Raises:
        DatasetError: there is nothing, or it holds no codes, or a file is missing that a job wrote.
        StorageError: the storage failed; it may work later.
        MissingPackageError: fsspec, or what it needs for a scheme, is not installed.
    """
    storage = Storage(file_path("path", path))
    place = storage.find()
    if place is None:
        raise DatasetError(f"{storage.address} does not exist.", "Give the output of `tokenflow tokenize`, or a file of it.")
    if not place.is_directory:
        return [storage.address]
    files = {entry.name for entry in storage.scan() if not entry.name.startswith(".")}
    files = {name for name in files if name.endswith(tuple(FORMATS.values()))}
    if storage.find(STATE) is not None:
        records = [entry.name for entry in storage.scan(DONE)] if storage.find(DONE) else []
        # Others, with a dot, are not whole yet, or were left by a process that was killed.
        done = {name.removesuffix(".json") for name in records if name.endswith(".json") and not name.startswith(".")}
        found = {name for name in files if name.rpartition(".")[0] in done}
        if missing := done - {name.rpartition(".")[0] for name in found}:
            hint = "Copy it again, or run `tokenflow tokenize --verify`."
            raise DatasetError(f"{storage.address} lacks the file of shard {min(missing)}, which is done.", hint)
        files = found
    if not files:
        raise DatasetError(
            f"{storage.address} holds no codes.", "Give the output of `tokenflow tokenize`, once a shard is done."
        )
    # Numbers have five digits, or more where there are more shards.
    return [storage.path(name) for name in sorted(files, key=lambda name: (len(name), name))]


@overload
def read_codes(
    path: str | os.PathLike[str] | Sequence[str],
    *,
    errors: Literal["skip", "raise"] = "skip",
    rank: int = 0,
    world_size: int = 1,
) -> Generator[tuple[str, Codes], None, None]: ...


@overload
def read_codes(
    path: str | os.PathLike[str] | Sequence[str], *, errors: Literal["yield"], rank: int = 0, world_size: int = 1
) -> Generator[tuple[str, Codes | DatasetError], None, None]: ...


def read_codes(
    path: str | os.PathLike[str] | Sequence[str],
    *,
    errors: Literal["skip", "raise", "yield"] = "skip",
    rank: int = 0,
    world_size: int = 1,
) -> Generator[Any, None, None]:
    """Read keys and codes of what `tokenflow tokenize` wrote, in order, in memory that does not grow with it.

    Args:
        path: a job's output, of which the shards that are done are read; an address that fsspec opens; one file, `.parquet`
            or `.tar`; or a list of files, e.g. those of `code_shards` in another order.
        errors: what becomes of a picture that has an error instead of codes: `skip` it, `raise` the error, or `yield` it.
        rank, world_size: give the rows of one of several readers: every `world_size`-th file, or every `world_size`-th row
            where there are fewer files than readers. The readers together get each row once.

    Yields:
        The key and the `Codes` of each picture; with `errors="yield"` a DatasetError in the place of codes.

    Raises:
        ArgumentError: an argument that cannot work.
        DatasetError: there is nothing, it is damaged, or not written by `tokenflow tokenize`.
        StorageError: the storage failed; it may work later.
        MissingPackageError: pyarrow, or fsspec, is not installed: `pip install 'tokenflow-sdk[dataset]'`.

    >>> for key, codes in read_codes("codes"): ...   # doctest: +SKIP
    """
    if not (isinstance(errors, str) and errors in ("skip", "raise", "yield")):
        raise ArgumentError(f"errors={shown(errors)} is no way to treat errors.", "Choose one of: skip, raise, yield.")
    world_size = integer("world_size", world_size, 1, None, "is no number of readers.", "Give 1 or more.")
    hint = f"Give 0 .. {world_size - 1}."
    rank = integer("rank", rank, 0, world_size - 1, f"is none of {world_size} readers.", hint)
    if isinstance(path, (str, os.PathLike)):
        return _read(code_shards(path), errors, rank, world_size)
    files = list(items("path", path, "Give a path, or a list of files."))
    return _read(files, errors, rank, world_size)


def _read(files: list[str], errors: str, rank: int, world_size: int) -> Generator[Any, None, None]:
    whole_files = len(files) >= world_size
    row = 0
    for file in files[rank::world_size] if whole_files else files:
        for record in read_records(Storage(file), extra=False):
            row += 1
            if not whole_files and (row - 1) % world_size != rank:
                continue
            if record.codes is not None:
                yield record.key, record.codes
            elif errors != "skip":
                hint = "Leave such rows out with errors='skip', or run them again: `tokenflow tokenize --retry-errors`."
                error = DatasetError(f"{record.key} of {file} has no codes: {record.error}", hint)
                if errors == "raise":
                    raise error
                yield record.key, error


def read_records(storage: Storage, name: str = "", extra: bool = True) -> Generator[Record, None, None]:
    """The rows of one file that a writer of `open_writer` wrote, in order.

    Args:
        storage, name: where it is; its ending says what it is.
        extra: whether the columns beside the codes are read too.

    Raises:
        DatasetError, StorageError, MissingPackageError: see `read_codes`.
    """
    file = Storage(storage.path(name))
    return _of_tar(file, extra) if file.address.endswith(FORMATS["webdataset"]) else _of_parquet(file, extra)


def _of_parquet(storage: Storage, extra: bool) -> Generator[Record, None, None]:
    # Else the column chunks of all row groups would be read at once, and kept.
    with open_parquet(storage, pre_buffer=False) as parquet:
        metadata = parquet.schema_arrow.metadata or {}
        if METADATA_KEY.encode() not in metadata:
            raise _foreign(storage)
        stamp = Stamp.from_json(metadata[METADATA_KEY.encode()])
        shapes = stamp.shapes if extra else {}
        for batch in parquet.iter_batches(stamp.rows_at_once, columns=[*PLAIN, "codes", *shapes], use_threads=False):
            yield from _of_batch(batch, stamp, shapes)


def _of_batch(batch: Any, stamp: Stamp, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[Record]:
    of = stamp.patch_nums, stamp.codebook_size, stamp.variant, stamp.codebook_id, stamp.preparation
    codes = _lists(batch.column("codes"), (stamp.length,))
    others = {name: _lists(batch.column(name), shape) for name, shape in shapes.items()}
    for row in batch.select(PLAIN).to_pylist():
        indices, extra = next(codes), {name: next(rows) for name, rows in others.items()}
        found = {name: value for name, value in extra.items() if value is not None}
        yield Record(**row, codes=None if indices is None else Codes(indices, *of), extra=found)


def _lists(column: Any, shape: tuple[int, ...]) -> Iterator[NDArray[Any] | None]:
    """The lists of a column, each as an array of this shape; None where there is none."""
    if set(column.value_lengths().to_pylist()) - {None, math.prod(shape)}:
        raise ValueError(f"a list that does not have {math.prod(shape)} values")
    rows = iter(column.flatten().to_numpy().reshape(-1, *shape))  # without those that are null
    return (next(rows) if valid else None for valid in column.is_valid().to_pylist())


def _of_tar(storage: Storage, extra: bool) -> Generator[Record, None, None]:
    """Of each row the `.json` stands first."""
    row: Record | None = None
    for member, read in tar_members(storage):
        name, _, ending = member.name.rpartition(".")
        if ending not in ("json", "tfc", "npy") or (ending == "npy" and not extra):
            continue
        content = read()
        if not isinstance(content, bytes):
            raise _foreign(storage)
        if ending == "json":
            if row is not None:
                yield row
            row = _of_json(storage, content)
        elif row is None:
            raise _foreign(storage)
        elif ending == "tfc":
            row = replace(row, codes=Codes.from_bytes(content))
        else:
            row = replace(row, extra={**row.extra, name.rpartition(".")[2]: _of_npy(storage, content)})
    if row is not None:
        yield row


def _of_json(storage: Storage, content: bytes) -> Record:
    try:
        columns = json.loads(content)
        return Record(codes=None, **{name: columns[name] for name in PLAIN})
    except (ValueError, TypeError, KeyError) as error:
        raise _foreign(storage) from error


def _of_npy(storage: Storage, content: bytes) -> NDArray[np.float16]:
    try:
        array: NDArray[np.float16] = np.load(io.BytesIO(content), allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise _foreign(storage) from error
    return array


def _foreign(storage: Storage) -> DatasetError:
    return DatasetError(
        f"{storage.address} was not written by `tokenflow tokenize`.",
        "Give its output; a Parquet file that another program has written again has lost what its codes are of.",
    )
