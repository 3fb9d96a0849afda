"""Reads whole rows back from a job's own output: what `--retry-errors` keeps, and what `--verify` compares."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from tokenflow_sdk.dataset.outputs import FORMATS, METADATA_KEY, Record, Stamp
from tokenflow_sdk.dataset.rows import tar_members
from tokenflow_sdk.dataset.storage import Storage
from tokenflow_sdk.errors import DatasetError, TokenFlowError
from tokenflow_sdk.pictures.codes import Codes

__all__ = ["read_records"]

_PLAIN = ("key", "width", "height", "sha256", "error")


def read_records(output: Storage, name: str) -> Iterator[Record]:
    """The records of one output file, in order, as they were written.

    Raises:
        DatasetError: the file is not there or damaged.
        StorageError: the storage failed.
    """
    read: Callable[[Storage], Iterator[Record]] = _of_tar if name.endswith(FORMATS["webdataset"]) else _of_parquet
    try:
        yield from read(Storage(output.path(name)))
    except (TokenFlowError, MemoryError):
        raise
    except Exception as error:  # pyarrow's, json's and NumPy's of damaged files
        raise DatasetError(f"{output.path(name)} is damaged: {str(error).rstrip('.')}.", "Delete it; it is made again.") from error


def _of_parquet(file: Storage) -> Iterator[Record]:
    import pyarrow.parquet as pq

    with file.open() as opened, pq.ParquetFile(opened) as parquet:
        stamp = Stamp.from_json(parquet.schema_arrow.metadata[METADATA_KEY.encode()])
        # A batch's arrays are in memory as a whole.
        row = 4 * stamp.length + sum(4 * int(np.prod(shape)) for shape in stamp.shapes.values())
        for batch in parquet.iter_batches(max(1, min(1000, 2**26 // row)), use_threads=False):
            plain = [batch.column(each).to_pylist() for each in _PLAIN]
            there = batch.column("codes").is_valid().to_pylist()
            lists = {
                each: iter(batch.column(each).flatten().to_numpy().reshape(sum(there), -1)) for each in ("codes", *stamp.shapes)
            }
            for *fields, has_codes in zip(*plain, there, strict=True):
                record = dict(zip(_PLAIN, fields, strict=True))
                codes = _codes(stamp, next(lists["codes"]), record["sha256"]) if has_codes else None
                extra = {each: next(lists[each]).reshape(shape) for each, shape in stamp.shapes.items()} if has_codes else {}
                yield Record(codes=codes, extra=extra, **record)


def _codes(stamp: Stamp, indices: Any, sha256: str) -> Codes:
    preparation = replace(stamp.preparation, source=sha256[:16])
    return Codes(indices, stamp.patch_nums, stamp.codebook_size, stamp.variant, stamp.codebook_id, preparation)


def _of_tar(file: Storage) -> Iterator[Record]:
    """A row's `.json` stands before its other members."""
    row: dict[str, Any] | None = None
    for member, read in tar_members(file):
        content = read()
        if isinstance(content, TokenFlowError):
            raise content
        ending = member.name.rpartition("/")[2].partition(".")[2]
        if ending == "json":
            if row is not None:
                yield Record(**row)
            row = {**json.loads(content), "codes": None, "extra": {}}
        elif row is not None and ending == "tfc":
            row["codes"] = Codes.from_bytes(content)
        elif row is not None:
            row["extra"][ending.removesuffix(".npy")] = np.load(io.BytesIO(content), allow_pickle=False)
    if row is not None:
        yield Record(**row)
