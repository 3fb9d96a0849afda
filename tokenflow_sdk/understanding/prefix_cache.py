"""The prefix cache: pages of prompts' prefixes that other prompts may begin with, e.g. an image, or a conversation so far.

A prefix is known by the digest of all its tokens and images. The cache holds forks of block tables, so pages stay while anybody
uses them; those that only the cache holds are given back when others need room, least recently used first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from tokenflow_sdk.model.kv_cache import PageTable

__all__ = ["PrefixCache"]


class PrefixCache:
    """Block tables by the digest of their prefix. Not safe for several threads: its owner locks."""

    def __init__(self) -> None:
        self._tables: OrderedDict[bytes, PageTable] = OrderedDict()

    def __len__(self) -> int:
        return len(self._tables)

    def find(self, digests: Iterable[bytes]) -> PageTable | None:
        """A fork of the table of the first digest that is here, or None; the caller releases it."""
        for digest in digests:
            if digest in self._tables:
                self._tables.move_to_end(digest)
                return self._tables[digest].fork()
        return None

    def put(self, digest: bytes, table: PageTable, length: int) -> None:
        """Keep a fork of the first `length` tokens of `table` under `digest`, unless that digest is here already."""
        if digest not in self._tables:
            self._tables[digest] = table.fork(length)
        self._tables.move_to_end(digest)

    def evict(self) -> bool:
        """Release the least recently used table; False if there is none."""
        if not self._tables:
            return False
        self._tables.popitem(last=False)[1].release()
        return True
