"""The pictures in a tar or Parquet file, one after the other, in bounded memory."""

from __future__ import annotations

import gzip
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from tokenflow_sdk.dataset.parquet import open_parquet
from tokenflow_sdk.dataset.storage import Storage, as_text
from tokenflow_sdk.errors import (
    ArgumentError,
    DatasetError,
    DatasetFileError,
    ImageReadError,
    StorageError,
    TokenFlowError,
)
from tokenflow_sdk.pictures.images import SUFFIXES

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["ENDINGS", "MAX_BYTES", "Cell", "Picture", "Row", "parquet_cells", "read_picture", "tar_members", "tar_rows"]

MAX_BYTES = 256 * 2**20
"""Most bytes of one picture's file."""
ENDINGS = tuple(sorted(SUFFIXES))
_BATCH_BYTES = 32 * 2**20
# As WebDataset splits names: up to the first dot of the last part.
_KEY = re.compile(r"(?:\./)*((?:.*/|)[^./][^./]*)\.([^/]*)", re.DOTALL)


Picture: TypeAlias = "bytes | TokenFlowError"
"""A picture's file, or why it cannot be read."""


class Row(NamedTuple):
    """One picture of a shard: its key, and its file's bytes or why they cannot be read."""

    key: str
    data: Picture


class Cell(NamedTuple):
    """One row of a Parquet file: its key, and the picture's bytes, its address, or why it has neither."""

    key: str
    value: bytes | str | TokenFlowError


def read_picture(storage: Storage, name: str, size: int | None = None) -> Picture:
    """A picture's file, or what is wrong with it or its address. Raises StorageError where the storage is at fault."""
    try:
        return storage.read(name, MAX_BYTES, size)
    except (DatasetFileError, ArgumentError) as error:
        return ImageReadError(error.message, error.hint)


def tar_rows(storage: Storage) -> Iterator[Row]:
    """The pictures of a tar in WebDataset's form: of the members with one key, the first that has a picture's ending.

    It is read as a stream, once.

    Raises:
        DatasetError: it is damaged, ends half-way, holds files but no pictures, or holds two members of one name.
        StorageError, DatasetFileError: it cannot be read.
    """
    tar = storage.address
    last, endings, members = "", set[str](), 0
    for member, read in tar_members(storage):
        members += not member.isdir()
        found = _KEY.fullmatch(member.name)
        if member.isdir() or found is None or not member.name.lower().endswith(ENDINGS):
            continue
        key, ending = as_text(found[1]), found[2]
        if key != last:
            last, endings = key, {ending}
            yield Row(key, read())
        elif ending in endings:
            raise DatasetError(f"{tar} holds {as_text(member.name)} twice.", "Give the pictures names of their own.")
        else:
            endings.add(ending)
    if members and not last:
        raise DatasetError(f"{tar} holds {members} files, but no pictures.", f"Known endings: {' '.join(ENDINGS)}.")


def tar_members(storage: Storage) -> Iterator[tuple[tarfile.TarInfo, Callable[[], bytes | TokenFlowError]]]:
    """The members of a tar, each with a function that reads it, which must be called before the next is asked for.

    Raises:
        DatasetError: it is damaged, or ends half-way; also from the functions.
        StorageError, DatasetFileError: it cannot be read.
    """
    with storage.open() as opened, _naming_damage(storage.address):
        file: Any = gzip.GzipFile(fileobj=opened) if opened.peek(2).startswith(b"\x1f\x8b") else opened
        with tarfile.open(fileobj=file, mode="r|", tarinfo=_Member, encoding="utf-8", errors="surrogateescape") as archive:
            while (member := archive.next()) is not None:
                archive.members.clear()  # type: ignore[attr-defined] # it would keep them all
                yield member, partial(_content, archive, member, storage.address)
        # Its checksum stands at the end.
        while file is not opened and file.read(2**20):
            pass


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo, tar: str) -> bytes | TokenFlowError:
    name = f"{as_text(member.name)} in {tar}"
    if not member.isfile():
        return ImageReadError(f"{name} is a link or a device, not a file.", "Pack the picture itself: tar --dereference.")
    if member.size > MAX_BYTES:
        return ImageReadError(f"{name} is larger than {MAX_BYTES:,} bytes.", "Give a smaller file.")
    with _naming_damage(tar):
        file = archive.extractfile(member)
        assert file is not None
        return file.read()


@contextmanager
def _naming_damage(tar: str) -> Iterator[None]:
    try:
        yield
    except StorageError:
        raise
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        again = "Fetch or make it again."
        raise DatasetError(f"{tar} ends half-way, or is damaged: {error}.", again) from error


class _Member(tarfile.TarInfo):
    """A member of a tar whose end is marked. For `tarfile` a tar that was cut after any member's header is whole."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> _Member:
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"{error} where a file or the mark of the end should begin") from error

    def _proc_member(self, archive: tarfile.TarFile) -> Any:
        # Headers of long names are read whole.
        if self.type in (b"x", b"g", b"X", b"L", b"K") and self.size > 2**20:
            raise tarfile.ReadError(f"a header of {self.size:,} bytes")
        return super()._proc_member(archive)  # type: ignore[misc]


def parquet_cells(storage: Storage, image_column: str, key_column: str | None) -> Iterator[Cell]:
    """The pictures of a Parquet file, in the order of its rows.

    Raises:
        DatasetError: it is damaged, or a column is not there or holds something else.
        StorageError, DatasetFileError: it cannot be read.
        MissingPackageError: pyarrow is not installed.
    """
    stem = as_text(storage.name).rpartition(".")[0]
    row = 0
    # Without the buffer, the whole column of a row group would be read at once.
    with open_parquet(storage, buffer_size=2**20, pre_buffer=False) as parquet:
        columns = _checked_columns(parquet.schema_arrow, image_column, key_column, storage.address)
        for batch in parquet.iter_batches(_rows_at_once(parquet), columns=columns, use_threads=False):
            images = batch.column(columns[0])
            keys = batch.column(columns[-1]) if key_column is not None else None
            for i in range(len(batch)):
                key = None if keys is None else keys[i].as_py()
                value = _value(images[i].as_py(), row, storage.address)
                yield Cell(f"{stem}/{row}" if key is None else _key_text(key), value)
                row += 1


def _rows_at_once(parquet: Any) -> int:
    groups = parquet.metadata
    size: int = sum(groups.row_group(i).total_byte_size for i in range(groups.num_row_groups))
    return max(1, min(1000, _BATCH_BYTES * int(groups.num_rows) // max(size, 1)))


def _checked_columns(schema: pa.Schema, image_column: str, key_column: str | None, name: str) -> list[str]:
    """The columns to read: of the pictures, and of the keys."""
    import pyarrow.types as kinds

    columns = list(dict.fromkeys([image_column, image_column if key_column is None else key_column]))
    for column in columns:
        if schema.names.count(column) != 1:
            raise DatasetError(
                f"{name} has {'two columns' if column in schema.names else 'no column'} {column!r}.",
                f"Choose of {', '.join(map(repr, schema.names))} with image_column= and key_column=.",
            )
    kind: Any = schema.field(image_column).type
    if kinds.is_struct(kind):
        parts = [kind.field(part) for part in ("bytes", "path") if kind.get_field_index(part) >= 0]
    else:
        parts = [schema.field(image_column)]
    if not parts or not all(_holds_text_or_bytes(part.type) for part in parts):
        hint = "Pictures are bytes, paths, or a struct of both."
        raise DatasetError(f"Column {image_column!r} of {name} holds {kind}.", hint)
    if key_column is not None:
        kind = schema.field(key_column).type
        if not (_holds_text_or_bytes(kind) or kinds.is_integer(kind)):
            raise DatasetError(f"Column {key_column!r} of {name} holds {kind}.", "Keys are texts or integers.")
    return columns


def _holds_text_or_bytes(kind: Any) -> bool:
    import pyarrow.types as kinds

    kind = kind.value_type if kinds.is_dictionary(kind) else kind
    texts = kinds.is_string, kinds.is_large_string, kinds.is_string_view
    contents = kinds.is_binary, kinds.is_large_binary, kinds.is_binary_view, kinds.is_fixed_size_binary
    return any(is_one(kind) for is_one in (*texts, *contents))


def _key_text(key: object) -> str:
    return key.decode("utf-8", "backslashreplace") if isinstance(key, bytes) else str(key)


def _value(value: Any, row: int, name: str) -> bytes | str | TokenFlowError:
    """The bytes or the path in a cell."""
    if isinstance(value, dict):
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    if value is None:
        return ImageReadError(f"Row {row} of {name} has no picture.", "Leave it out, or fill it.")
    if isinstance(value, bytes) and len(value) > MAX_BYTES:
        return ImageReadError(f"The picture in row {row} of {name} is larger than {MAX_BYTES:,} bytes.", "Give a smaller file.")
    picture: bytes | str = value
    return picture
