"""Refuses inputs of one job whose pictures would have the same keys, as far as that can be told without reading them."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from itertools import pairwise, starmap

from tokenflow_sdk.dataset.rows import ENDINGS
from tokenflow_sdk.dataset.storage import Storage, as_text
from tokenflow_sdk.dataset.walking import walk
from tokenflow_sdk.errors import DatasetError

__all__ = ["require_distinct_paths", "require_new_stem"]

_MOST_COMPARED = 10
"""Directories that are compared: each keeps up to 100,000 names in memory."""


def require_new_stem(stems: dict[str, str], where: str) -> None:
    """Remember a Parquet file whose keys are its name without the ending, and the row's number.

    Args:
        stems: those seen so far, each with its file's address.
        where: the file's address.

    Raises:
        DatasetError: another file has this name, or it was given twice.
    """
    stem = as_text(Storage(where).name).rpartition(".")[0]
    if stem in stems:
        what = f"{as_text(stems[stem])} and {as_text(where)} would both give the key {stem}/0."
        raise DatasetError(what, "Give --key-column, or begin a job for each.")
    stems[stem] = where


def require_distinct_paths(places: Sequence[tuple[Storage, str]]) -> None:
    """Compare directories whose pictures' keys are their paths. They are listed beside each other, which takes little memory.

    Args:
        places: each a directory and a pattern below it, empty for all. More than ten are not compared.

    Raises:
        DatasetError: two hold a picture of the same path.
        StorageError: a storage failed; it may work later.
    """

    def paths(storage: Storage, pattern: str) -> Iterator[tuple[list[str], str]]:
        return ((file.path.split("/"), storage.address) for file in walk(storage, ENDINGS, pattern, sizes=False))

    if not 1 < len(places) <= _MOST_COMPARED:
        return
    for (path, one), (following, other) in pairwise(heapq.merge(*starmap(paths, places))):
        if path == following:
            hint = "Give the directory above both, or begin a job for each."
            if one == other:
                hint = "Give patterns that do not overlap."
            key = as_text("/".join(path))
            raise DatasetError(f"{as_text(one)} and {as_text(other)} would both give the key {key}.", hint)
