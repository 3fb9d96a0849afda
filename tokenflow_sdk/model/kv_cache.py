"""Page allocation of the key/value cache: which pages hold the tokens of which sequence. Bookkeeping only, no tensors.

A `PagePool` hands out page numbers and counts the references to each. A `PageTable` lists the pages of one sequence in order.
Forking a table shares the pages of a prefix; appending to a partly filled page that is shared copies it first (copy on write).
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tokenflow_sdk.bundle.model_config import pages_for
from tokenflow_sdk.errors import PagesExhausted

__all__ = ["Append", "PagePool", "PageTable"]


class PagePool:
    """Free pages, and a reference count for each page in use.

    Args:
        pages: number of pages.
        page_size: tokens in a page.
    """

    def __init__(self, pages: int, page_size: int) -> None:
        self.pages = pages
        self.page_size = page_size
        self._free = deque(range(pages))
        self._counts = [0] * pages

    @property
    def free(self) -> int:
        """Number of free pages."""
        return len(self._free)

    def allocate(self, count: int) -> list[int]:
        """Take `count` free pages, with one reference each.

        Raises:
            PagesExhausted: fewer pages are free; none is taken.
        """
        if count > len(self._free):
            raise PagesExhausted(count, len(self._free), self.pages)
        taken = [self._free.popleft() for _ in range(count)]
        for page in taken:
            self._counts[page] = 1
        return taken

    def retain(self, pages: Iterable[int]) -> None:
        """Add a reference to each page."""
        for page in pages:
            assert self._counts[page] > 0, "a free page cannot be shared"
            self._counts[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """Drop a reference to each page; pages without references become free."""
        for page in pages:
            assert self._counts[page] > 0, "a page was released twice"
            self._counts[page] -= 1
            if self._counts[page] == 0:
                self._free.append(page)

    def references(self, page: int) -> int:
        """Number of references to a page; 0 if it is free."""
        return self._counts[page]

    def held_only_by(self, tables: Iterable[PageTable]) -> int:
        """Number of pages that these tables hold and nobody else."""
        held = Counter(page for table in tables for page in table.pages)
        return sum(self._counts[page] == count for page, count in held.items())

    def shared(self, page: int) -> bool:
        """Whether the page has more than one reference."""
        return self._counts[page] > 1


@dataclass(frozen=True)
class Append:
    """Where the keys and values of appended tokens are to be written, after the copies.

    Args:
        pages: page number of each token, int64 [tokens].
        offsets: place of each token in its page, int64 [tokens].
        copies: pages to copy before writing, as pairs (source, target).
    """

    pages: NDArray[np.int64]
    offsets: NDArray[np.int64]
    copies: tuple[tuple[int, int], ...]


class PageTable:
    """The pages of one sequence, in order, and its length in tokens.

    A table and each of its forks must be released exactly once.

    Args:
        pool: where pages are taken from.

    Example:
        >>> pool = PagePool(pages=4, page_size=2)
        >>> table = PageTable(pool)
        >>> table.append(3).pages.tolist()
        [0, 0, 1]
        >>> fork = table.fork()
        >>> fork.append(1).copies
        ((1, 2),)
        >>> pool.free
        1
    """

    def __init__(self, pool: PagePool) -> None:
        self.pool = pool
        self.pages: list[int] = []
        self.length = 0

    def pages_needed(self, count: int) -> int:
        """Number of free pages that appending `count` tokens takes, including a page for copy on write."""
        return pages_for(self.length + count, self.pool.page_size) - len(self.pages) + (count > 0 and self._shares_last)

    @property
    def _shares_last(self) -> bool:
        """Whether the next token goes into a partly filled page that is shared."""
        return bool(self.length % self.pool.page_size) and self.pool.shared(self.pages[-1])

    def append(self, count: int) -> Append:
        """Allocate space for `count` more tokens.

        Raises:
            PagesExhausted: the pool has too few free pages; the table is unchanged.
        """
        size = self.pool.page_size
        fresh = self.pool.allocate(self.pages_needed(count))
        copies: tuple[tuple[int, int], ...] = ()
        if count and self._shares_last:
            copies = ((self.pages[-1], fresh[0]),)
            self.pool.release([self.pages[-1]])
            self.pages[-1] = fresh.pop(0)
        self.pages += fresh
        slots = np.arange(self.length, self.length + count)
        self.length += count
        return Append(np.asarray(self.pages, np.int64)[slots // size], slots % size, copies)

    def fork(self, length: int | None = None) -> PageTable:
        """A new table of the first `length` tokens (None: all), which shares their pages."""
        other = PageTable(self.pool)
        other.length = self.length if length is None else length
        other.pages = self.pages[: pages_for(other.length, self.pool.page_size)]
        self.pool.retain(other.pages)
        return other

    def release(self) -> None:
        """Drop the references to all pages and empty the table."""
        pages, self.pages, self.length = self.pages, [], 0
        self.pool.release(pages)

    def block_table_row(self, width: int) -> NDArray[np.int32]:
        """The table's row of a block table: page numbers int32 [width], filled up with 0 or cut to `width`.

        The filling must not be read, so a step's `context` must not exceed the tokens that the row covers.
        """
        row = np.zeros(width, np.int32)
        count = min(width, len(self.pages))
        row[:count] = self.pages[:count]
        return row
