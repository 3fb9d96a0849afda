"""The prefix cache: pages of prompts' prefixes that other prompts may begin with, e.g. an image, or a conversation so far.

A prefix is known by the digest of all its tokens and images. The cache holds forks of block tables, so pages stay while anybody
uses them; those that only the cache holds are given back when others need room, least recently used first. Prefixes of running
requests are kept as long as others can go: giving them up frees next to nothing, and the next request would compute them again.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable

from tokenflow_sdk.model.kv_cache import PageTable

__all__ = ["PrefixCache"]


class PrefixCache:
    """Block tables by the digest of their prefix. Not safe for several threads: its owner locks."""

    def __init__(self) -> None:
        self._tables: OrderedDict[bytes, PageTable] = OrderedDict()

    def __len__(self) -> int:
        return len(self._tables)

    def tables(self) -> list[PageTable]:
        """All tables. May be called while another thread changes the cache."""
        return list(self._tables.values())

    def find(self, digests: Iterable[bytes]) -> PageTable | None:
        """A fork of the table of the first digest that is here, or None; the caller releases it."""
        for digest in digests:
            if digest in self._tables:
                self._tables.move_to_end(digest)
                return self._tables[digest].fork()
        return None

    def length(self, digests: Iterable[bytes]) -> int:
        """Tokens in the table of the first digest that is here, or 0."""
        return next((self._tables[digest].length for digest in digests if digest in self._tables), 0)

    def put(self, digest: bytes, table: PageTable, length: int) -> None:
        """Keep a fork of the first `length` tokens of `table` under `digest`, unless that digest is here already."""
        if digest not in self._tables:
            self._tables[digest] = table.fork(length)
        self._tables.move_to_end(digest)

    def evict(self) -> bool:
        """Release the table that is missed least; False if releasing any would give nobody room.

        First come tables that no request uses, least recently used first: those that free pages at once, then those whose pages
        other tables of the cache hold as well. Then come those in use whose last page is filled in part, as whoever shares that
        page must copy it before writing to it.
        """
        held = Counter(page for table in self._tables.values() for page in table.pages)
        ranks: dict[bytes, tuple[bool, bool]] = {}
        for digest, table in self._tables.items():
            references, size = table.pool.references, table.pool.page_size
            # Who uses a prefix shares its full pages; of a page filled in part he may have a copy by now.
            last_full = table.pages[max(table.length // size - 1, 0)]
            used = references(last_full) > held[last_full]
            if not used or table.length % size:
                ranks[digest] = used, references(table.pages[-1]) > 1
        if not ranks:
            return False
        self._tables.pop(min(ranks, key=ranks.__getitem__)).release()
        return True
