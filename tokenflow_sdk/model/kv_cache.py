"""Pages of keys and values: who holds which. Bookkeeping only, no tensors, so it can be tested anywhere.

A pool hands out page numbers and counts who refers to each. A `PageTable` is one sequence: the pages its tokens fill, in order.
Tables are forked to share a prefix; the first append to a shared page that still has room copies that page (copy on write).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tokenflow_sdk.bundle.model_config import pages_for
from tokenflow_sdk.errors import PagesExhausted

__all__ = ["Append", "PagePool", "PageTable"]


class PagePool:
    """Free pages and reference counts.

    Args:
        pages: pages in the pool.
        page_size: tokens in a page.
    """

    def __init__(self, pages: int, page_size: int) -> None:
        self.pages = pages
        self.page_size = page_size
        self._free = deque(range(pages))
        self._counts = [0] * pages

    @property
    def free(self) -> int:
        """Pages that nobody holds."""
        return len(self._free)

    def allocate(self, count: int) -> list[int]:
        """Take `count` free pages, each held once; all or none.

        Raises:
            PagesExhausted: there are fewer.
        """
        if count > len(self._free):
            raise PagesExhausted(count, len(self._free), self.pages)
        taken = [self._free.popleft() for _ in range(count)]
        for page in taken:
            self._counts[page] = 1
        return taken

    def retain(self, pages: Iterable[int]) -> None:
        """Hold pages once more."""
        for page in pages:
            assert self._counts[page] > 0, "a free page cannot be shared"
            self._counts[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """Let go of pages; those that nobody holds any more become free."""
        for page in pages:
            assert self._counts[page] > 0, "a page was released twice"
            self._counts[page] -= 1
            if self._counts[page] == 0:
                self._free.append(page)

    def shared(self, page: int) -> bool:
        """Whether more than one table holds the page."""
        return self._counts[page] > 1


@dataclass(frozen=True)
class Append:
    """Where new tokens go: token i into slot `offsets[i]` of page `pages[i]`, after copying each `copies` pair (from, to)."""

    pages: NDArray[np.int64]
    offsets: NDArray[np.int64]
    copies: tuple[tuple[int, int], ...]


class PageTable:
    """One sequence's pages. Release it exactly once, or fork it and release each."""

    def __init__(self, pool: PagePool) -> None:
        self.pool = pool
        self.pages: list[int] = []
        self.length = 0

    def pages_needed(self, count: int) -> int:
        """Free pages that appending `count` tokens takes, a copied page among them."""
        return pages_for(self.length + count, self.pool.page_size) - len(self.pages) + (count > 0 and self._shares_last)

    @property
    def _shares_last(self) -> bool:
        """Whether the page that the next token goes into is there already, and others hold it too."""
        return bool(self.length % self.pool.page_size) and self.pool.shared(self.pages[-1])

    def append(self, count: int) -> Append:
        """Make room for `count` more tokens; on failure nothing changes.

        Raises:
            PagesExhausted: the pool has too few free pages.
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
        """A table of the same tokens, or of the first `length` of them, sharing their pages."""
        other = PageTable(self.pool)
        other.length = self.length if length is None else length
        other.pages = self.pages[: pages_for(other.length, self.pool.page_size)]
        self.pool.retain(other.pages)
        return other

    def release(self) -> None:
        """Give every page back."""
        pages, self.pages, self.length = self.pages, [], 0
        self.pool.release(pages)

    def block_table_row(self, width: int) -> NDArray[np.int32]:
        """The page numbers as a block table row, int32 [width]; unused places name page 0, which nobody may then read."""
        row = np.zeros(width, np.int32)
        count = min(width, len(self.pages))
        row[:count] = self.pages[:count]
        return row
