"""Pages of beginnings that may come again: of a picture, of a conversation so far.

A beginning is named by a digest of all its tokens and pictures. The cache holds a fork of its table, so its pages stay while
somebody uses them; those that nobody else uses are given back when others need room, least recently used first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from tokenflow_sdk.model.kv_cache import PageTable

__all__ = ["PrefixCache"]


class PrefixCache:
    """Digests and tables. Not safe for several threads: its owner locks."""

    def __init__(self) -> None:
        self._tables: OrderedDict[bytes, PageTable] = OrderedDict()

    def __len__(self) -> int:
        return len(self._tables)

    def find(self, digests: Iterable[bytes]) -> PageTable | None:
        """A fork of the first of some beginnings that is here; the caller releases it."""
        for digest in digests:
            if digest in self._tables:
                self._tables.move_to_end(digest)
                return self._tables[digest].fork()
        return None

    def put(self, digest: bytes, table: PageTable, length: int) -> None:
        """Keep a fork of the first `length` tokens of `table` under `digest`; no other if one is here already."""
        if digest not in self._tables:
            self._tables[digest] = table.fork(length)
        self._tables.move_to_end(digest)

    def evict(self) -> bool:
        """Let go of the least recently used table; whether there was one."""
        if not self._tables:
            return False
        self._tables.popitem(last=False)[1].release()
        return True
