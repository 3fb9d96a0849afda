"""The paged transformer over a graph that is a plain function: what it is fed, and what its pages hold."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.fake_graphs import UNDERSTANDER, FakeGraph, transformer_graph
from tokenflow_sdk.backends.session import Array, DeviceArray
from tokenflow_sdk.errors import PagesExhausted
from tokenflow_sdk.model.kv_cache import PageTable
from tokenflow_sdk.model.transformer import PagedTransformer, StepOutput

CONFIG = replace(UNDERSTANDER, layers=2, kv_heads=3, head_dim=5)


def numbered(feeds: Mapping[str, Array]) -> Mapping[str, Array]:
    """Hidden states are the inputs; keys hold the first value of the input, values the second, each layer ten more."""
    x = feeds["embeddings"]
    k, v = (np.broadcast_to(x[..., i, None, None], (*x.shape[:2], 3, 5)) for i in range(2))
    layers = 10 * np.arange(2, dtype=np.float32)[:, None, None, None, None]
    return {"hidden": x, "new_k": k + layers, "new_v": v + layers}


def make(pages: int = 8, page_size: int = 4, sizes: Mapping[str, int] = {}) -> tuple[PagedTransformer, FakeGraph]:
    graph = transformer_graph(CONFIG, numbered, sizes)
    return PagedTransformer.of(CONFIG, graph, pages, page_size), graph


def step(transformer: PagedTransformer, values: np.ndarray, *tables: PageTable) -> StepOutput:
    """`values` [B, Q] as keys, and a thousand more as values."""
    x = np.stack([values, values + 1000], axis=-1).astype(np.float32)
    numbers = np.zeros(values.shape, np.int32)
    return transformer.step(x, numbers, numbers, tables, [table.length for table in tables], width=3)


def held(transformer: PagedTransformer, table: PageTable) -> tuple[list[float], list[float]]:
    """Keys and values of the first layer; every head, value and layer is checked to agree with them."""
    found = []
    for pages in (transformer._k, transformer._v):
        by_layer = np.asarray(pages.slots).reshape(2, -1, transformer.pool.page_size, 3, 5)[:, table.pages]
        tokens = by_layer.reshape(2, -1, 3, 5)[:, : table.length]
        first = tokens[0, :, 0, 0]
        np.testing.assert_array_equal(tokens[0], np.broadcast_to(first[:, None, None], tokens[0].shape))
        np.testing.assert_array_equal(tokens[1], tokens[0] + 10)
        found.append(first.tolist())
    return found[0], found[1]


def test_a_step_feeds_what_it_was_given_and_the_pages() -> None:
    transformer, graph = make()
    tables = [PageTable(transformer.pool) for _ in range(2)]
    tables[0].append(6)
    tables[1].append(3)
    x = np.arange(12, dtype=np.float32).reshape(2, 3, 2)
    positions, visible = np.asarray([[6, 7, 8], [3, 4, 5]], np.int32), np.asarray([[1, 2, 3], [3, 3, 3]], np.int32)
    output = transformer.step(x, positions, visible, tables, [6, 2], width=4)
    (feeds,) = graph.feeds
    for name, expected in (
        ("embeddings", x),
        ("positions", positions),
        ("visible", visible),
        ("context", [6, 2]),
        ("block_tables", [[0, 1, 0, 0], [2, 0, 0, 0]]),
    ):
        np.testing.assert_array_equal(feeds[name], expected)
    assert feeds["k_pages"].shape == feeds["v_pages"].shape == (2 * 8, 4, 3, 5)
    assert not feeds["k_pages"].any()
    assert output.hidden is x
    assert output.new_k.shape == output.new_v.shape == (2, 2, 3, 3, 5)
    assert [table.length for table in tables] == [6, 3]


def test_a_narrow_block_table_shows_the_first_pages_only() -> None:
    transformer, graph = make()
    table = PageTable(transformer.pool)
    table.append(12)
    x = np.zeros((1, 1, 2), np.float32)
    numbers = np.zeros((1, 1), np.int32)
    transformer.step(x, numbers, numbers, [table], [4], width=1)
    assert graph.feeds[0]["block_tables"].tolist() == [[0]]


def test_every_token_of_every_row_is_counted() -> None:
    transformer, _ = make()
    tables = [PageTable(transformer.pool) for _ in range(3)]
    assert transformer.token_forwards == 0
    step(transformer, np.zeros((3, 2)), *tables)
    step(transformer, np.zeros((1, 5)), tables[0])
    assert transformer.token_forwards == 3 * 2 + 5


def test_what_is_stored_is_read_by_the_next_step() -> None:
    transformer, graph = make()
    a, b = PageTable(transformer.pool), PageTable(transformer.pool)
    transformer.store(step(transformer, np.asarray([[1, 2, 3], [4, 5, 6]]), a, b), [a, b])
    transformer.store(step(transformer, np.asarray([[7, 8, 9]]), b), [b])
    assert held(transformer, a) == ([1, 2, 3], [1001, 1002, 1003])
    assert held(transformer, b) == ([4, 5, 6, 7, 8, 9], [1004, 1005, 1006, 1007, 1008, 1009])
    # The graph reads the pages themselves, not a copy.
    assert np.shares_memory(graph.feeds[-1]["k_pages"], np.asarray(transformer._k.slots))
    assert not np.shares_memory(graph.feeds[-1]["k_pages"], graph.feeds[-1]["v_pages"])


def test_a_step_that_is_not_stored_leaves_nothing() -> None:
    transformer, _ = make()
    table = PageTable(transformer.pool)
    transformer.store(step(transformer, np.asarray([[1, 2]]), table), [table])
    before = np.array(transformer._k.slots)
    step(transformer, np.asarray([[3, 4]]), table)
    np.testing.assert_array_equal(transformer._k.slots, before)
    assert (table.length, transformer.pool.free) == (2, 7)


def test_a_shared_page_is_copied_before_it_is_written() -> None:
    """In every layer, keys and values."""
    transformer, _ = make()
    first = PageTable(transformer.pool)
    transformer.store(step(transformer, np.asarray([[1, 2, 3, 4, 5, 6]]), first), [first])
    second = first.fork()
    transformer.store(step(transformer, np.asarray([[20], [30]]), first, second), [first, second])
    assert held(transformer, first)[0] == [1, 2, 3, 4, 5, 6, 20]
    assert held(transformer, second)[0] == [1, 2, 3, 4, 5, 6, 30]
    assert first.pages[0] == second.pages[0]
    assert first.pages[1] != second.pages[1]


def test_rows_before_one_that_finds_no_page_are_stored() -> None:
    transformer, _ = make(pages=2)
    a, b, c = (PageTable(transformer.pool) for _ in range(3))
    output = step(transformer, np.asarray([[1, 2], [3, 4], [5, 6]]), a, b, c)
    with pytest.raises(PagesExhausted):
        transformer.store(output, [a, b, c])
    assert held(transformer, a)[0] == [1, 2]
    assert held(transformer, b)[0] == [3, 4]
    assert (c.length, c.pages) == (0, [])


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_every_sequence_reads_back_whatever_is_shared(data: st.DataObject) -> None:
    """Against plain lists: sequences grow, are forked, and go."""
    transformer, _ = make(pages=10, page_size=data.draw(st.integers(1, 5)))
    pool = transformer.pool
    rows: list[tuple[PageTable, list[float]]] = [(PageTable(pool), [])]
    value = 0
    for _ in range(data.draw(st.integers(5, 30))):
        number = data.draw(st.integers(0, len(rows) - 1))
        table, tokens = rows[number]
        match data.draw(st.sampled_from(["store", "store", "fork", "release"])):
            case "store":
                count = data.draw(st.integers(1, 6))
                new = list(range(value, value + count))
                value += count
                output = step(transformer, np.asarray([new]), table)
                if table.pages_needed(count) <= pool.free:
                    transformer.store(output, [table])
                    tokens += new
                else:
                    with pytest.raises(PagesExhausted):
                        transformer.store(output, [table])
            case "fork":
                length = data.draw(st.integers(0, len(tokens)))
                rows.append((table.fork(length), tokens[:length]))
            case "release" if len(rows) > 1:
                rows.pop(number)[0].release()
        for other, expected in rows:
            assert held(transformer, other) == (expected, [v + 1000 for v in expected])
    for table, _ in rows:
        table.release()
    assert pool.free == 10


def test_a_session_that_names_its_slots_decides_the_pool() -> None:
    """An engine has pages for all layers together."""
    transformer, _ = make(pages=8, sizes={"slots": 2 * 13, "batch": 6})
    assert transformer.pool.pages == 13
    assert transformer._k.shape == (2, 13, 4, 3, 5)
    assert transformer.max_rows == 6


def test_a_session_without_limits_takes_what_was_asked_for() -> None:
    transformer, _ = make(pages=8)
    assert (transformer.pool.pages, transformer.pool.page_size) == (8, 4)
    assert transformer.max_rows == sys.maxsize
    # Keys and values, two layers, four tokens, three heads of five values.
    assert transformer.page_bytes == 2 * 2 * 4 * 3 * 5 * 4


def test_pages_have_the_type_that_the_graph_reads() -> None:
    graph = transformer_graph(CONFIG, numbered)
    graph.inputs = tuple(replace(spec, dtype="float16") if "pages" in spec.name else spec for spec in graph.inputs)
    transformer = PagedTransformer.of(CONFIG, graph, 8, 4)
    table = PageTable(transformer.pool)
    transformer.store(step(transformer, np.asarray([[1, 2]]), table), [table])
    assert transformer._k.slots.dtype == np.float16
    assert held(transformer, table)[0] == [1, 2]
    assert transformer.page_bytes == 2 * 2 * 4 * 3 * 5 * 2


def test_closing_frees_the_pages_and_not_the_session() -> None:
    transformer, graph = make()
    transformer.close()
    assert (np.asarray(transformer._k.slots).size, np.asarray(transformer._v.slots).size) == (0, 0)
    assert graph.closed == 0


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", ["hidden", "new_k", "new_v"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_rows_that_are_not_finite_are_not_stored(value: float, place: str, dtype: type) -> None:
    """Their tables stay as they were; the others' keys and values are stored as ever."""
    graph = transformer_graph(CONFIG, numbered)
    graph.inputs = tuple(replace(spec, dtype=np.dtype(dtype).name) if "pages" in spec.name else spec for spec in graph.inputs)
    transformer = PagedTransformer.of(CONFIG, graph, 8, 4)
    tables = [PageTable(transformer.pool) for _ in range(3)]
    assert transformer.store(step(transformer, np.asarray([[1, 2]] * 3), *tables), tables) == [True] * 3
    found = step(transformer, np.asarray([[3, 4]] * 3), *tables)
    output = StepOutput(found.hidden, np.array(found.new_k, dtype), np.array(found.new_v, dtype))
    if place == "hidden":
        np.asarray(output.hidden)[1, -1, 0] = value
    else:
        getattr(output, place)[1, 1, 0, 2, 4] = value
    assert transformer.store(output, tables) == [True, False, True]
    assert [held(transformer, table)[0] for table in tables] == [[1, 2, 3, 4], [1, 2], [1, 2, 3, 4]]
    assert all(np.isfinite(np.asarray(pages.slots)).all() for pages in (transformer._k, transformer._v))


class Resident(DeviceArray):
    """In the memory of a device; `fetched` are the shapes of what was copied to the host."""

    fetched: list[tuple[int, ...]]

    def __init__(self, array: np.ndarray) -> None:
        self.array, self.shape, self.dtype = array, array.shape, array.dtype

    def __getitem__(self, rows: slice) -> Resident:
        return Resident(self.array[rows])

    def reshape(self, *shape: int) -> Resident:
        return Resident(self.array.reshape(*shape))

    def column(self, index: int) -> np.ndarray:
        self.fetched.append((self.shape[0], *self.shape[2:]))
        return self.array[:, index]

    def numpy(self) -> np.ndarray:
        raise AssertionError("all of it is fetched")


@pytest.mark.parametrize("length", [1, 3])
def test_of_a_devices_rows_only_the_last_hidden_states_are_fetched(length: int) -> None:
    transformer, _ = make()
    tables = [PageTable(transformer.pool) for _ in range(3)]
    found = step(transformer, np.ones((3, length)), *tables)
    hidden = np.array(found.hidden)
    hidden[1, -1] = np.nan
    Resident.fetched = []
    written: list[list[bool]] = []
    for pages in (transformer._k, transformer._v):
        pages.write = lambda new, places: written.append((places >= 0).all(axis=1).tolist())  # type: ignore[method-assign]
    output = StepOutput(*map(Resident, (hidden, np.asarray(found.new_k), np.asarray(found.new_v))))
    assert transformer.store(output, tables) == [True, False, True]
    assert Resident.fetched == [(3, 2)]
    assert written == [[True, False, True]] * 2
