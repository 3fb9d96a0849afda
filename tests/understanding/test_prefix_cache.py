from __future__ import annotations

from tokenflow_sdk.model.kv_cache import PagePool, PageTable
from tokenflow_sdk.understanding.prefix_cache import PrefixCache


def table_of(pool: PagePool, tokens: int) -> PageTable:
    table = PageTable(pool)
    table.append(tokens)
    return table


def test_a_beginning_is_found_again_and_its_pages_are_shared() -> None:
    pool, cache = PagePool(8, 4), PrefixCache()
    table = table_of(pool, 7)
    cache.put(b"a", table, 7)
    table.release()
    assert pool.free == 6
    found = cache.find([b"longer", b"a"])
    assert found is not None
    assert (found.length, pool.free) == (7, 6)
    found.append(2)
    # The last page has room but is shared: it was copied, and one more was taken.
    assert pool.free == 4
    found.release()
    assert pool.free == 6
    assert cache.find([b"b"]) is None


def test_the_least_recently_used_goes_first() -> None:
    pool, cache = PagePool(8, 4), PrefixCache()
    for digest in (b"a", b"b", b"c"):
        table = table_of(pool, 4)
        cache.put(digest, table, 4)
        table.release()
    found = cache.find([b"a"])
    assert found is not None
    found.release()
    assert cache.evict()
    assert cache.find([b"b"]) is None
    assert cache.evict()
    assert cache.find([b"c"]) is None
    assert len(cache) == 1
    assert cache.evict()
    assert not cache.evict()
    assert (pool.free, len(cache)) == (8, 0)


def test_an_evicted_beginning_lives_on_in_those_who_use_it() -> None:
    pool, cache = PagePool(4, 4), PrefixCache()
    table = table_of(pool, 6)
    cache.put(b"a", table, 6)
    cache.put(b"a", table, 6)
    assert table.pages_needed(1) == 1
    assert cache.evict()
    assert (pool.free, table.pages_needed(1), table.pages_needed(3)) == (2, 0, 1)
    table.release()
    assert pool.free == 4


def test_a_beginning_may_be_shorter_than_the_table_it_comes_from() -> None:
    pool, cache = PagePool(8, 4), PrefixCache()
    table = table_of(pool, 11)
    cache.put(b"a", table, 6)
    table.release()
    assert pool.free == 6
    found = cache.find([b"a"])
    assert found is not None
    assert found.length == 6
    # Its last page also holds tokens that are not its own, so it is copied before it is written.
    assert len(found.append(1).copies) == 1
    found.release()
    assert pool.free == 6


def test_prefixes_in_use_are_kept_while_others_can_go() -> None:
    pool, cache = PagePool(8, 4), PrefixCache()
    live = table_of(pool, 8)
    cache.put(b"in use", live, 8)
    for digest in (b"b", b"c"):
        other = table_of(pool, 4)
        cache.put(digest, other, 4)
        other.release()
    for _ in range(2):
        free = pool.free
        assert cache.evict()
        assert pool.free == free + 1
    # Its full pages are all that is left: giving it up frees nothing.
    assert not cache.evict()
    live.release()
    found = cache.find([b"in use"])
    assert found is not None
    found.release()
    assert cache.evict()
    assert pool.free == 8


def test_a_prefix_in_use_goes_last_even_if_it_holds_a_page_of_its_own() -> None:
    """Its user has copied the last page, which was filled in part."""
    pool, cache = PagePool(8, 4), PrefixCache()
    live = table_of(pool, 6)
    cache.put(b"in use", live, 6)
    live.append(1)
    other = table_of(pool, 4)
    cache.put(b"b", other, 4)
    other.release()
    assert cache.evict()
    assert cache.find([b"b"]) is None
    free = pool.free
    assert cache.evict()
    assert (pool.free, len(cache)) == (free + 1, 0)


def test_of_nested_prefixes_the_one_that_frees_pages_goes_first() -> None:
    pool, cache = PagePool(8, 4), PrefixCache()
    table = table_of(pool, 16)
    for length in (4, 16):
        cache.put(bytes([length]), table, length)
    table.release()
    assert cache.evict()
    assert (pool.free, cache.find([bytes([16])])) == (7, None)
    assert cache.evict()
    assert pool.free == 8


def test_prefixes_over_the_same_pages_go_together() -> None:
    pool, cache = PagePool(8, 4), PrefixCache()
    table = table_of(pool, 7)
    for length in (6, 7):
        cache.put(bytes([length]), table, length)
    table.release()
    assert cache.evict()
    assert cache.evict()
    assert (pool.free, len(cache)) == (8, 0)
