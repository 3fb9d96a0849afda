from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tokenflow_sdk.errors import PagesExhausted
from tokenflow_sdk.model.kv_cache import PagePool, PageTable


def test_tokens_fill_pages_in_order() -> None:
    table = PageTable(PagePool(4, 3))
    first = table.append(2)
    second = table.append(5)
    assert (first.pages.tolist(), first.offsets.tolist()) == ([0, 0], [0, 1])
    assert (second.pages.tolist(), second.offsets.tolist()) == ([0, 1, 1, 1, 2], [2, 0, 1, 2, 0])
    assert first.copies == second.copies == ()
    assert table.block_table_row(5).tolist() == [0, 1, 2, 0, 0]
    assert table.block_table_row(2).tolist() == [0, 1]


def test_a_shared_page_with_room_is_copied_on_write() -> None:
    pool = PagePool(4, 4)
    table = PageTable(pool)
    table.append(6)
    fork = table.fork()
    assert pool.free == 2
    assert fork.append(1).copies == ((1, 2),)
    assert table.append(1).copies == ()
    assert (table.pages, fork.pages) == ([0, 1], [0, 2])
    fork.release()
    table.release()
    assert pool.free == 4


def test_full_shared_pages_are_not_copied() -> None:
    table = PageTable(PagePool(4, 4))
    table.append(4)
    fork = table.fork()
    assert fork.append(1).copies == ()
    assert fork.pages == [0, 1]
    assert table.append(0).copies == ()


def test_exhaustion_changes_nothing() -> None:
    pool = PagePool(3, 4)
    table = PageTable(pool)
    table.append(6)
    fork = table.fork()
    with pytest.raises(PagesExhausted) as caught:
        fork.append(5)
    assert (caught.value.needed, caught.value.free, caught.value.total) == (2, 1, 3)
    assert (fork.pages, fork.length, pool.free) == ([0, 1], 6, 1)


class CacheMachine(RuleBasedStateMachine):
    """Random appends, forks and releases against a model that keeps every token's value in plain lists."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(12, 3)
        self.memory = np.full((12, 3), -1)
        self.tables: list[tuple[PageTable, list[int]]] = []
        self.next = 0

    @rule()
    def begin(self) -> None:
        self.tables.append((PageTable(self.pool), []))

    @precondition(lambda self: self.tables)
    @rule(data=st.data(), count=st.integers(0, 8))
    def append(self, data: st.DataObject, count: int) -> None:
        table, tokens = data.draw(st.sampled_from(self.tables))
        before = table.length, list(table.pages), self.pool.free
        try:
            slots = table.append(count)
        except PagesExhausted:
            assert (table.length, table.pages, self.pool.free) == before
            return
        for source, target in slots.copies:
            self.memory[target] = self.memory[source]
        values = list(range(self.next, self.next + count))
        self.next += count
        self.memory[slots.pages, slots.offsets] = values
        tokens += values

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        table, tokens = data.draw(st.sampled_from(self.tables))
        self.tables.append((table.fork(), list(tokens)))

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        chosen = data.draw(st.sampled_from(self.tables))
        self.tables.remove(chosen)
        chosen[0].release()

    @invariant()
    def every_sequence_reads_back(self) -> None:
        for table, tokens in self.tables:
            found = self.memory[table.pages].ravel()[: table.length] if table.pages else []
            assert list(found) == tokens

    @invariant()
    def no_page_is_lost(self) -> None:
        held = {page for table, _ in self.tables for page in table.pages}
        assert self.pool.free == 12 - len(held)


# 200 runs of 50 steps: 10,000 random operations.
CacheMachine.TestCase.settings = settings(max_examples=200, stateful_step_count=50, deadline=None)
TestCache = CacheMachine.TestCase


def test_a_fork_of_the_first_tokens_shares_their_pages_only() -> None:
    pool = PagePool(6, 4)
    table = PageTable(pool)
    table.append(10)
    short = table.fork(5)
    assert (short.length, short.pages) == (5, table.pages[:2])
    table.release()
    assert pool.free == 4
    short.release()
    assert pool.free == 6


def test_pages_that_only_some_tables_hold() -> None:
    pool = PagePool(6, 4)
    table = PageTable(pool)
    table.append(10)
    short = table.fork(5)
    assert [pool.held_only_by(tables) for tables in ([], [short], [table], [table, short])] == [0, 0, 1, 3]
    table.release()
    assert pool.held_only_by([short]) == 2


def test_needs_is_what_append_takes() -> None:
    pool = PagePool(20, 4)
    table = PageTable(pool)
    table.append(6)
    for owner in (table, table.fork()):
        for count in (0, 1, 2, 3, 7):
            needed, free = owner.pages_needed(count), pool.free
            owner.append(count)
            assert free - pool.free == needed
