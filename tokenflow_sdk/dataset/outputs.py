"""What a job writes: Parquet files, or WebDataset's tars of `.tfc` files, the same bytes each time."""

from __future__ import annotations

import io
import json
import math
import re
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tokenflow_sdk.dataset.parquet import import_pyarrow
from tokenflow_sdk.errors import DatasetError, OutputError
from tokenflow_sdk.files import reason
from tokenflow_sdk.pictures.codes import Codes
from tokenflow_sdk.pictures.preparation import Preparation
from tokenflow_sdk.pictures.scales import Scales

__all__ = ["DONE", "FORMATS", "METADATA_KEY", "PLAIN", "STATE", "Format", "Record", "Stamp", "Writer", "open_writer"]

Format = Literal["parquet", "webdataset"]
FORMATS: dict[Format, str] = {"parquet": ".parquet", "webdataset": ".tar"}
"""The formats, and the endings of their files."""
STATE = "__tokenflow__"
"""Directory of a job's state in its output. `datasets`, pandas, pyarrow and Spark read past a directory with such a name."""
DONE = f"{STATE}/done"
"""Records of shards that are done, each named as the shard's file."""
PLAIN = ("key", "width", "height", "sha256", "error")
"""Columns that are no lists."""
METADATA_KEY = "tokenflow"
"""Of the stamp, in the schema metadata of a Parquet file."""
_VERSION = 1
_GROUP_ROWS, _GROUP_BYTES = 1000, 64 * 2**20
"""Most rows of one row group, and about its largest size."""
_LONGEST_NAME = 200


@dataclass(frozen=True)
class Record:
    """One row of the output: a picture's codes, or why it has none.

    Args:
        key: of the picture, text that UTF-8 can write.
        codes: of the scales that the stamp says; None if there is an error.
        width, height: of the picture in pixels; None if not known.
        sha256: of the picture's file, in hex; None if it could not be read.
        error: the error's class and message, e.g. `CorruptImageError: ...`; None if there is none.
        extra: by name, float16 arrays of the shapes that the stamp says; empty if there is an error.
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

    @cached_property
    def length(self) -> int:
        """Codes of one picture."""
        return Scales(self.patch_nums).ends[self.scales - 1]

    @property
    def rows_at_once(self) -> int:
        """Rows of one row group, which is in memory until it is whole."""
        row = 4 * self.length + 2 * sum(map(math.prod, self.shapes.values()))
        return max(1, min(_GROUP_ROWS, _GROUP_BYTES // row))

    def to_json(self) -> str:
        """As it stands in a file's metadata."""
        return json.dumps({"version": _VERSION, **asdict(self), "preparation": str(self.preparation)})

    @classmethod
    def from_json(cls, text: str | bytes) -> Stamp:
        """The stamp that `to_json` gave.

        Raises:
            DatasetError: it is none, or of a newer SDK.
        """
        try:
            values = json.loads(text)
            version, preparation = values.pop("version"), Preparation.parse(values["preparation"])
            if version > _VERSION:
                hint = "Upgrade with `pip install --upgrade tokenflow-sdk`."
                raise DatasetError(f"The codes have format version {version}; this SDK reads version {_VERSION}.", hint)
            assert preparation is not None
            shapes = {name: tuple(shape) for name, shape in values["shapes"].items()}
            return cls(**{**values, "preparation": preparation, "patch_nums": tuple(values["patch_nums"]), "shapes": shapes})
        except (ValueError, TypeError, KeyError, AttributeError, AssertionError) as error:
            raise DatasetError("The codes' stamp is damaged.", "Make them again with `tokenflow tokenize`.") from error


class Writer(ABC):
    """Writes one file, row by row. A context manager: at its end the file is whole, unless an exception ended it."""

    def __init__(self, path: Path, stamp: Stamp) -> None:
        self._path, self._stamp = path, stamp
        self._keys = set[str]()

    def add(self, record: Record) -> None:
        """Add a row.

        Raises:
            DatasetError: a row has this key already.
            OutputError: the file cannot be written.
        """
        if record.key in self._keys:
            raise DatasetError(
                f"Two pictures of this shard have the key {record.key!r}.",
                "Give each a key of its own: in a tar the name up to the first dot, in a Parquet file the key column.",
            )
        self._keys.add(record.key)
        with self._named():
            self._write(record)

    def close(self) -> None:
        """Write the end of the file. Raises OutputError: it cannot be written."""
        try:
            with self._named():
                self._end()
        finally:
            self._abandon()

    @abstractmethod
    def _write(self, record: Record) -> None: ...

    @abstractmethod
    def _end(self) -> None: ...

    @abstractmethod
    def _abandon(self) -> None:
        """Close what is open. Without its end no reader takes the file for whole."""

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            hint = "Choose another output, or check its directory and the free space."
            raise OutputError(f"{self._path} cannot be written: {reason(error)}.", hint) from error

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is None:
            self.close()
        else:
            self._abandon()


def open_writer(path: Path, stamp: Stamp, form: Format) -> Writer:
    """A writer of a local file, which is replaced if it exists. Equal stamps and records give equal bytes.

    Args:
        path: of the file.
        stamp: of the job.
        form: `parquet` or `webdataset`.

    Raises:
        OutputError: it cannot be written.
        MissingPackageError: pyarrow is not installed.
    """
    return _Parquet(path, stamp) if form == "parquet" else _Tar(path, stamp)


class _Parquet(Writer):
    def __init__(self, path: Path, stamp: Stamp) -> None:
        super().__init__(path, stamp)
        pa, pq = import_pyarrow(", or write WebDataset's tars")
        self._pa = pa
        # Not lists of a fixed size: most versions of pyarrow write or read none of them that are null.
        index = pa.uint16() if stamp.codebook_size <= 2**16 else pa.int32()
        columns = [
            ("key", pa.string()),
            ("codes", pa.list_(index)),
            ("width", pa.int32()),
            ("height", pa.int32()),
            ("sha256", pa.string()),
            ("error", pa.string()),
            *((name, pa.list_(pa.float16())) for name in stamp.shapes),
        ]
        self._schema = pa.schema(columns, {METADATA_KEY: stamp.to_json()})
        self._rows: list[Record] = []
        with self._named():
            self._file = path.open("wb")
            # Of codes, of which Parquet stores 32 bits each, only a dictionary needs half as much; every reader knows it.
            coded = ["codes.list.element", "error"]
            self._writer = pq.ParquetWriter(self._file, self._schema, compression="zstd", use_dictionary=coded)

    def _write(self, record: Record) -> None:
        self._rows.append(record)
        if len(self._rows) == self._stamp.rows_at_once:
            self._flush()

    def _flush(self) -> None:
        pa, rows = self._pa, self._rows
        columns = {name: pa.array([getattr(row, name) for row in rows], self._schema.field(name).type) for name in PLAIN}
        lists: dict[str, list[NDArray[Any] | None]] = {
            name: [row.extra[name] if row.codes is not None else None for row in rows] for name in self._stamp.shapes
        }
        lists["codes"] = [None if row.codes is None else row.codes.indices for row in rows]
        columns |= {name: _lists(pa, self._schema.field(name).type, values) for name, values in lists.items()}
        arrays = [columns[name] for name in self._schema.names]
        self._writer.write_batch(pa.record_batch(arrays, schema=self._schema))
        self._rows = []

    def _end(self) -> None:
        if self._rows:
            self._flush()
        self._writer.close()
        self._file.close()  # writes what is left

    def _abandon(self) -> None:
        self._writer.is_open = False  # it would write the end when it is collected
        with suppress(OSError):
            self._file.close()


def _lists(pa: Any, kind: Any, values: list[NDArray[Any] | None]) -> Any:
    """A column of lists, null where there is None."""
    dtype = kind.value_type.to_pandas_dtype()
    present = (value.reshape(-1).astype(dtype, copy=False) for value in values if value is not None)
    flat = np.concatenate([np.empty(0, dtype), *present])
    ends = np.cumsum([0, *(0 if value is None else value.size for value in values)], dtype=np.int32)
    missing = pa.array([value is None for value in values])
    return pa.ListArray.from_arrays(pa.array(ends), pa.array(flat), type=kind, mask=missing)


class _Tar(Writer):
    """A row is `<name>.json` with its other columns, and where there is no error `<name>.tfc` and `<name>.<extra>.npy`."""

    def __init__(self, path: Path, stamp: Stamp) -> None:
        super().__init__(path, stamp)
        self._names = set[str]()
        with self._named():
            self._file = path.open("wb")
            self._archive = tarfile.TarFile(fileobj=self._file, mode="w", format=tarfile.PAX_FORMAT)

    def _write(self, record: Record) -> None:
        name = self._name_of(record.key)
        columns = {each: getattr(record, each) for each in PLAIN}
        self._member(f"{name}.json", json.dumps(columns).encode())
        if record.codes is None:
            return
        self._member(f"{name}.tfc", record.codes.to_bytes())
        for extra, shape in self._stamp.shapes.items():
            content = io.BytesIO()
            np.save(content, record.extra[extra].reshape(shape))
            self._member(f"{name}.{extra}.npy", content.getvalue())

    def _name_of(self, key: str) -> str:
        """A name without dots in its last part, after which WebDataset looks for the ending; one that is safe to extract."""
        parts = [part for part in re.sub(r"[\x00-\x1f\\:]", "_", key).split("/") if part not in ("", ".", "..")] or ["_"]
        parts[-1] = parts[-1].replace(".", "_")
        base = "/".join(part.encode()[:_LONGEST_NAME].decode(errors="ignore") for part in parts)
        names = (base if number == 1 else f"{base}_{number}" for number in count(1))
        name = next(name for name in names if name not in self._names)
        self._names.add(name)
        return name

    def _member(self, name: str, content: bytes) -> None:
        member = tarfile.TarInfo(name)
        member.size = len(content)
        self._archive.addfile(member, io.BytesIO(content))
        self._archive.members.clear()  # type: ignore[attr-defined] # it would keep them all

    def _end(self) -> None:
        self._archive.close()
        self._file.close()  # writes what is left

    def _abandon(self) -> None:
        with suppress(OSError):
            self._file.close()
