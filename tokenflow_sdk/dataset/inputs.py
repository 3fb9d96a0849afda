"""Which pictures a job reads: its shards, found without reading pictures, and the rows of each."""

from __future__ import annotations

import glob
import hashlib
import itertools
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, TypeAlias

from tokenflow_sdk.arguments import integer
from tokenflow_sdk.dataset.keys import require_distinct_paths, require_new_stem
from tokenflow_sdk.dataset.rows import ENDINGS, Cell, Picture, Row, parquet_cells, read_picture, tar_rows
from tokenflow_sdk.dataset.storage import Entry, Storage, as_text
from tokenflow_sdk.dataset.walking import Listed, walk
from tokenflow_sdk.errors import ArgumentError, DatasetError, ImageReadError
from tokenflow_sdk.pipeline import map_ahead

__all__ = ["InputOptions", "Row", "Shard", "find_shards", "read_shard"]

Kind = Literal["files", "tar", "parquet"]
Reading: TypeAlias = "Callable[[Callable[[], Picture]], Picture]"
_TAR = (".tar", ".tar.gz", ".tgz")
_PARQUET = (".parquet", ".parq", ".pq")
_LOOKUPS = 16
"""Files that are looked up at once: a service takes its time for each."""
_MOST_NAMED = 1_000_000
_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}")
_SHOWN = 5


@dataclass(frozen=True)
class InputOptions:
    """How inputs are read.

    Args:
        shard_size: pictures of a directory in one shard.
        image_column: of Parquet files: bytes, paths, or the struct of bytes and path that `datasets` writes.
        key_column: of Parquet files, texts or integers; None: keys are the file's name without its ending and the row's number,
            as `train/0`. So are those of rows without a key.

    Raises:
        ArgumentError: `shard_size` is none.
    """

    shard_size: int = 10_000
    image_column: str = "image"
    key_column: str | None = None

    def __post_init__(self) -> None:
        hint = "Give 1 to 10,000,000; 10,000 is usual."
        integer("shard_size", self.shard_size, 1, 10_000_000, "is no number of pictures for a shard.", hint)


@dataclass(frozen=True)
class Shard:
    """A part of a job's input, which becomes one output file.

    Args:
        index: number of the shard, from 0 on.
        kind: `files` of a directory, a `tar`, or a `parquet` file.
        where: the directory or file, with its full address.
        fingerprint: SHA-256 over the names and sizes of what it holds, the same wherever the directory lies.
        pattern: of a directory's files, those that fit; empty: all below it.
        first: of a directory's files, the path of the first, relative to it.
        names: of pictures that were named one by one, as they were named.
        count: pictures in it; None: not known before it is read.
    """

    index: int
    kind: Kind
    where: str
    fingerprint: str
    pattern: str = ""
    first: str = ""
    names: tuple[str, ...] = ()
    count: int | None = None

    def to_json(self) -> dict[str, Any]:
        """The fields that are not as usual, as `json.dumps` takes them. Names may hold lone surrogates, which it escapes."""
        return {field.name: value for field in fields(self) if (value := getattr(self, field.name)) != field.default}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Shard:
        """The shard that `to_json` gave."""
        return cls(**{**values, "names": tuple(values.get("names", ()))})


def find_shards(inputs: Sequence[str], options: InputOptions | None = None, output: Storage | None = None) -> Iterator[Shard]:
    """The shards of a job's inputs, in order, the same each time. Memory does not grow with the number of pictures.

    Args:
        inputs: directories, whose pictures are sorted and cut into shards; tars and Parquet files, a shard each; pictures;
            patterns (`photos/**/*.jpg`), and lists (`{00000..01023}.tar`, `{a,b}.tar`) whose files must all be there.
        options: how they are read.
        output: where the job writes. Tars and Parquet files in it, which a pattern may fit, are no inputs.

    Raises:
        DatasetError: an input does not exist, cannot be listed, or holds no pictures; or pictures of two would have one key.
        StorageError: a storage failed; it may work later.
        ArgumentError: no input, one given twice, a list that is too long, or an address that cannot be one.
        MissingPackageError: fsspec, or what it needs for a scheme, is not installed.
    """
    options = options or InputOptions()
    named = _checked_names(inputs)
    entries = list(map_ahead(_look_up, named, _LOOKUPS, may_hang=True))
    if missing := [name for name, entry in zip(named, entries, strict=True) if entry is None and not _is_pattern(name)]:
        shown = ", ".join(map(as_text, missing[:_SHOWN])) + (", ..." if len(missing) > _SHOWN else "")
        what = "does not exist" if len(missing) == 1 else f"do not exist ({len(missing)} of {len(named)})"
        raise DatasetError(f"{shown} {what}.", "Check the paths; a pattern, e.g. *.tar, takes those that there are.")
    shards = _shards(named, entries, options.shard_size)
    own = () if output is None else (_real(output.address) + (os.sep if output.is_local else "/"),)
    stems = dict[str, str]()
    for index, shard in enumerate(each for each in shards if each.kind == "files" or not _real(each.where).startswith(own)):
        if shard.kind == "parquet" and options.key_column is None:
            require_new_stem(stems, shard.where)
        yield replace(shard, index=index)
    pairs = zip(named, entries, strict=True)
    require_distinct_paths([_place(name, entry) for name, entry in pairs if entry is None or entry.is_directory])


def _real(address: str) -> str:
    """An address without local links."""
    return address if "://" in address else os.path.realpath(address)


def _checked_names(inputs: Sequence[str]) -> list[str]:
    """The inputs, their lists written out."""
    named = list(itertools.islice((name for given in inputs for name in _written_out(given)), _MOST_NAMED + 1))
    if not named:
        raise ArgumentError("No input was given.", "Give directories, tars, Parquet files or pictures.")
    if len(named) > _MOST_NAMED:
        raise ArgumentError(f"The inputs are more than {_MOST_NAMED:,} names.", "Give a directory or a pattern.")
    seen = set[str]()
    for name in named:
        if name in seen:
            raise ArgumentError(f"{as_text(name)} was given twice.", "Give each input once.")
        seen.add(name)
    return named


def _written_out(name: str) -> Iterator[str]:
    """The names that a list in braces stands for, as in a shell. A local file may have such a name itself."""
    found = _BRACES.search(name)
    if found is None or ("://" not in name and os.path.lexists(name)):
        yield name
        return
    choices: Iterable[str] = (found[3] or "").split(",")
    if found[1]:
        first, last = int(found[1]), int(found[2])
        ends = found[1], found[2]
        digits = max(map(len, ends)) if any(end.startswith("0") and end != "0" for end in ends) else 1
        step = 1 if last >= first else -1
        choices = (f"{number:0{digits}}" for number in range(first, last + step, step))
    for choice in choices:
        yield from _written_out(name[: found.start()] + choice + name[found.end() :])


def _is_pattern(name: str) -> bool:
    return glob.has_magic(name) and not name.startswith(("http://", "https://"))


def _look_up(name: str) -> Entry | None:
    """What lies at an address. Only local patterns are looked up: files may have such names."""
    return None if "://" in name and _is_pattern(name) else Storage(name).find()


def _shards(named: Sequence[str], entries: Sequence[Entry | None], size: int) -> Iterator[Shard]:
    """The shards of inputs, which are numbered later."""
    pictures: list[Listed] = []
    for name, entry in zip(named, entries, strict=True):
        kind = _kind(name)
        if entry is not None and not entry.is_directory and kind == "files":
            pictures.append(Listed(name, entry.size or 0))
            if len(pictures) == size:
                yield _of_pictures(pictures)
                pictures = []
            continue
        if pictures:
            yield _of_pictures(pictures)
            pictures = []
        if entry is None or entry.is_directory:
            yield from _of_directory(*_place(name, entry), size)
        else:
            yield _of_file(kind, Storage(name), entry.size)
    if pictures:
        yield _of_pictures(pictures)


def _kind(name: str) -> Kind:
    lower = (name.partition("?")[0] if "://" in name else name).lower()  # after it, addresses have signatures
    return "tar" if lower.endswith(_TAR) else "parquet" if lower.endswith(_PARQUET) else "files"


def _of_pictures(pictures: Sequence[Listed]) -> Shard:
    """A shard of pictures that were named one by one."""
    names = tuple(picture.path for picture in pictures)
    return Shard(0, "files", os.getcwd(), _fingerprint(pictures), names=names, count=len(names))  # noqa: PTH109


def _of_file(kind: Kind, storage: Storage, size: int | None) -> Shard:
    return Shard(0, kind, storage.address, _fingerprint([Listed(storage.name, size or 0)]))


def _place(name: str, entry: Entry | None) -> tuple[Storage, str]:
    """The directory of an input, and the pattern below it; empty if it is the directory itself."""
    return _base(name) if entry is None else (Storage(name), "")


def _base(pattern: str) -> tuple[Storage, str]:
    """The directory before a pattern's first `*`, `?` or `[`, and the pattern from there on."""
    parts = (pattern if "://" in pattern else pattern.replace(os.sep, "/")).split("/")
    at = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    base = "/".join(parts[:at])
    return Storage(base or ("/" if at else ".")), "/".join(parts[at:])


def _of_directory(storage: Storage, pattern: str, size: int) -> Iterator[Shard]:
    """The shards of a directory's pictures; with a pattern also of the tars and Parquet files that fit it."""
    found, pictures = False, list[Listed]()
    for listed in walk(storage, (*ENDINGS, *_TAR, *_PARQUET) if pattern else ENDINGS, pattern):
        found, kind = True, _kind(listed.path)
        if kind != "files":
            yield _of_file(kind, Storage(storage.path(listed.path)), listed.size)
            continue
        pictures.append(listed)
        if len(pictures) == size:
            yield _of_listed(storage, pattern, pictures)
            pictures = []
    if pictures:
        yield _of_listed(storage, pattern, pictures)
    if not found:
        raise _nothing(storage, pattern)


def _of_listed(storage: Storage, pattern: str, pictures: Sequence[Listed]) -> Shard:
    first = pictures[0].path
    return Shard(0, "files", storage.address, _fingerprint(pictures), pattern, first, count=len(pictures))


def _nothing(storage: Storage, pattern: str) -> DatasetError:
    if pattern:
        return DatasetError(f"No picture, tar or Parquet file matches {as_text(storage.path(pattern))}.", "Check the pattern.")
    other = next(walk(storage, (*_TAR, *_PARQUET)), None)
    hint = f"Known endings: {' '.join(ENDINGS)}. Hidden ones are not searched."
    if other is not None:
        ending = next(ending for ending in (*_TAR, *_PARQUET) if other.path.lower().endswith(ending))
        hint = f"For the {ending} files in it give a pattern: '{as_text(storage.path(f'*{ending}'))}'."
    return DatasetError(f"{as_text(storage.address)} holds no pictures.", hint)


def _fingerprint(files: Iterable[Listed]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.path}\0{file.size}\0".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def read_shard(
    shard: Shard, options: InputOptions | None = None, threads: int = 1, reading: Reading = lambda read: read()
) -> Iterator[Row]:
    """The pictures of a shard, in order.

    Args:
        shard: of `find_shards`.
        options: those that it was found with.
        threads: that read single files side by side; services take many at once.
        reading: calls its argument, which reads a single file, and may call it again, or give the StorageError that it raised.

    Raises:
        DatasetError: the shard is not as it was found, is damaged, or lacks the column.
        StorageError: a storage failed; it may work later.
        MissingPackageError: pyarrow or fsspec is not installed.
    """
    options = options or InputOptions()
    storage = Storage(shard.where)
    if shard.kind == "files":
        files = _listed_again(shard)
        read = _named if shard.names else _listed
        found = map_ahead(lambda file: reading(lambda: read(storage, file)), files, threads, may_hang=True)
        yield from (Row(as_text(file.path), data) for file, data in zip(files, found, strict=True))
        return
    entry = storage.find()
    if entry is not None and _of_file(shard.kind, storage, entry.size).fingerprint != shard.fingerprint:
        raise _changed(shard)
    if shard.kind == "tar":
        yield from tar_rows(storage)
        return
    beside = os.path.dirname(storage.address) if storage.is_local else storage.address.rpartition("/")[0]  # noqa: PTH120
    cells = parquet_cells(storage, options.image_column, options.key_column)
    yield from map_ahead(lambda cell: _cell_row(beside, cell, reading), cells, threads, may_hang=True)


def _listed(storage: Storage, file: Listed) -> Picture:
    return read_picture(storage, file.path, file.size)


def _named(storage: Storage, file: Listed) -> Picture:
    return read_picture(_at(storage.address, file.path), "", file.size)


def _cell_row(beside: str, cell: Cell, reading: Reading) -> Row:
    """The row of a cell, which may hold the picture's address, relative to the Parquet file's directory."""
    if not isinstance(cell.value, str):
        return Row(cell.key, cell.value)
    if cell.value.startswith(("http://", "https://")):
        return Row(cell.key, ImageReadError(f"{cell.value} is an address, not a file.", "Download the pictures first."))
    place = _at(beside, cell.value)
    return Row(cell.key, reading(lambda: read_picture(place, "")))


def _at(directory: str, name: str) -> Storage:
    """A file that is named from a directory, or by its full address."""
    whole = "://" in name or os.path.isabs(name)  # noqa: PTH117
    return Storage(name if whole else f"{directory}/{name}")


_walks: dict[tuple[str, str, str], tuple[list[Listed], Iterator[Listed]]] = {}
"""Walks that may go on, after the file they gave last. A job reads shards in order, and a large directory is slow to list."""


def _listed_again(shard: Shard) -> list[Listed]:
    """The files of a shard, as they were found."""
    if shard.names:
        entries = ((name, _at(shard.where, name).find()) for name in shard.names)
        files = [Listed(name, (entry.size or 0) if entry else 0) for name, entry in entries]
        if _fingerprint(files) == shard.fingerprint:
            return files
        raise _changed(shard)
    assert shard.count is not None
    begun = _walks.pop((shard.where, shard.pattern, shard.first), ([], iter(())))
    # What was listed long ago may be old by now.
    for files, walked in (begun, ([], walk(Storage(shard.where), ENDINGS, shard.pattern, shard.first))):
        files += itertools.islice(walked, shard.count - len(files))
        if _fingerprint(files) == shard.fingerprint:
            if following := next(walked, None):
                for place in list(_walks)[:-1]:
                    _walks.pop(place, None)
                _walks[shard.where, shard.pattern, following.path] = [following], walked
            return files
    raise _changed(shard)


def _changed(shard: Shard) -> DatasetError:
    return DatasetError(
        f"{as_text(shard.where)} has changed since the job's shards were found: names or sizes differ.",
        "Put the files back, or begin a new job with another output.",
    )
