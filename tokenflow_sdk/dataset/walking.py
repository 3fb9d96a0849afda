"""Walks a directory in one fixed order, from any path on, in memory that does not grow with it."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

from tokenflow_sdk.dataset.storage import Entry, Storage
from tokenflow_sdk.errors import DatasetFileError

__all__ = ["Listed", "walk"]

_WINDOW = 100_000
"""Most names of a local directory in memory at once. For the next ones it is listed again."""


class Listed(NamedTuple):
    """A file below a directory, and its size in bytes."""

    path: str
    size: int


def walk(
    storage: Storage, endings: tuple[str, ...], pattern: str = "", first: str = "", sizes: bool = True
) -> Iterator[Listed]:
    """The files in a directory and below it, in the order of their paths' parts.

    Hidden files and directories, whose names begin with a dot, are left out, and links to directories.

    Args:
        storage: the directory.
        endings: those of the files, in lower case.
        pattern: that the paths fit, e.g. `2024/**/*.jpg`; empty: all.
        first: the path to begin at.
        sizes: whether sizes are asked for where a listing lacks them, which takes a while for each file; else they are 0.

    Raises:
        DatasetFileError, StorageError: a directory cannot be listed.
    """
    wanted = pattern.split("/") if pattern else []
    places = [_listed(storage, (), endings, wanted, tuple(first.split("/")) if first else ())]
    rest = tuple(first.split("/"))
    while places:
        found = next(places[-1], None)
        if found is None:
            places.pop()
            continue
        path, entry = found
        if entry.is_directory:
            # The path to begin at is the first in each of its directories.
            inside = rest[len(path) :] if rest[: len(path)] == path else ()
            places.append(_listed(storage, path, endings, wanted, inside))
        else:
            rest, name = (), "/".join(path)
            yield Listed(name, _size(storage, name) if sizes and entry.size is None else entry.size or 0)


def _size(storage: Storage, name: str) -> int:
    """The bytes of a file; 0 if it has gone, or is a link that leads nowhere, which its reading says."""
    try:
        found = storage.find(name)
    except DatasetFileError:
        found = None
    return (found.size or 0) if found else 0


def _listed(
    storage: Storage, directory: tuple[str, ...], endings: tuple[str, ...], wanted: Sequence[str], first: Sequence[str]
) -> Iterator[tuple[tuple[str, ...], Entry]]:
    """What of one directory is wanted, with its path, sorted, from the first part of `first` on."""

    def is_wanted(entry: Entry) -> bool:
        if entry.name.startswith(".") or not (entry.is_directory or entry.name.lower().endswith(endings)):
            return False
        return not wanted or _fits((*directory, entry.name), wanted, entry.is_directory)

    place = "/".join(directory)
    # A service may have a file and a directory of one name.
    least = (first[0], int(len(first) > 1)) if first else ("", 0)
    while True:
        rest = (entry for entry in storage.scan(place) if entry >= least and is_wanted(entry))
        # The whole listing of a place that is not local is in memory anyway, and costs requests.
        window = heapq.nsmallest(_WINDOW, rest) if storage.is_local else sorted(rest)
        yield from (((*directory, entry.name), entry) for entry in window)
        if not storage.is_local or len(window) < _WINDOW:
            return
        least = (window[-1].name, window[-1].is_directory + 1)
        window.clear()


def _fits(path: Sequence[str], pattern: Sequence[str], is_directory: bool) -> bool:
    """Whether a path fits a pattern; of a directory, whether something below it could."""
    if not path:
        return is_directory or all(part == "**" for part in pattern)
    if not pattern:
        return False
    if pattern[0] == "**":
        return _fits(path, pattern[1:], is_directory) or _fits(path[1:], pattern, is_directory)
    return fnmatchcase(path[0], pattern[0]) and _fits(path[1:], pattern[1:], is_directory)
