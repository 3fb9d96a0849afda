"""Walks a directory in one fixed order, from any path on, in memory that does not grow with it."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

from tokenflow_sdk.dataset.storage import Entry, Storage

__all__ = ["Listed", "walk"]

_WINDOW = 100_000
"""Most names of a local directory in memory at once. For the next ones it is listed again."""


class Listed(NamedTuple):
    """A file below a directory, and its size in bytes."""

    path: str
    size: int


def walk(storage: Storage, endings: tuple[str, ...], pattern: str = "", first: str = "") -> Iterator[Listed]:
    """The files in a directory and below it, in the order of their paths' parts.

    Hidden files and directories, whose names begin with a dot, are left out, and links to directories.

    Args:
        storage: the directory.
        endings: those of the files, in lower case.
        pattern: that the paths fit, e.g. `2024/**/*.jpg`; empty: all.
        first: the path to begin at.

    Raises:
        DatasetFileError, StorageError: a directory cannot be listed.
    """
    wanted = tuple(pattern.split("/")) if pattern else ("**",)
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
            known = entry if entry.size is not None else storage.find(name)
            # What has gone meanwhile is found missing when it is read.
            yield Listed(name, (known.size or 0) if known else 0)


def _listed(
    storage: Storage, directory: tuple[str, ...], endings: tuple[str, ...], wanted: Sequence[str], first: Sequence[str]
) -> Iterator[tuple[tuple[str, ...], Entry]]:
    """What of one directory is wanted, with its path, sorted, from the first part of `first` on."""

    def is_wanted(entry: Entry) -> bool:
        if entry.name.startswith(".") or not (entry.is_directory or entry.name.lower().endswith(endings)):
            return False
        return _fits((*directory, entry.name), wanted, entry.is_directory)

    place = "/".join(directory)
    key: Callable[[Entry], tuple[str, bool]] = lambda entry: (entry.name, entry.is_directory)  # noqa: E731
    least: tuple[object, ...] = (first[0], len(first) > 1) if first else ("",)
    while True:
        rest = (entry for entry in storage.scan(place) if key(entry) >= least and is_wanted(entry))
        # The whole listing of a place that is not local is in memory anyway, and costs requests.
        window = heapq.nsmallest(_WINDOW, rest, key) if storage.is_local else sorted(rest, key=key)
        yield from (((*directory, entry.name), entry) for entry in window)
        if not storage.is_local or len(window) < _WINDOW:
            return
        least = (*key(window[-1]), True)


def _fits(path: Sequence[str], pattern: Sequence[str], is_directory: bool) -> bool:
    """Whether a path fits a pattern; of a directory, whether something below it could."""
    if not path:
        return is_directory or all(part == "**" for part in pattern)
    if not pattern:
        return False
    if pattern[0] == "**":
        return _fits(path, pattern[1:], is_directory) or _fits(path[1:], pattern, is_directory)
    return fnmatchcase(path[0], pattern[0]) and _fits(path[1:], pattern[1:], is_directory)
