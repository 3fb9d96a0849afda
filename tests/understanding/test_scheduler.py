"""The scheduler on graphs without an engine: pages, queues, sharing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import count
from typing import Any

import numpy as np
import pytest

from tests.support.fake_graphs import STOP, FakeGraph, understander_graphs
from tests.support.fake_graphs import UNDERSTANDER as CONFIG
from tokenflow_sdk.backends.session import Array
from tokenflow_sdk.errors import NotFiniteError, PagesExhausted, PromptError
from tokenflow_sdk.model.transformer import PREFILL_CHUNK, PagedTransformer
from tokenflow_sdk.scheduling import PATIENCE
from tokenflow_sdk.understanding.params import AnswerParams
from tokenflow_sdk.understanding.prompt import ImageBlock, TokenPrompt
from tokenflow_sdk.understanding.scheduler import TokenScheduler
from tokenflow_sdk.understanding.token_loop import AnswerRequest, TokenLoop


def scheduler(pages: int, page_size: int = 4, tokens: Sequence[int] = (1, 2, 3), most: int | None = None) -> TokenScheduler:
    graphs = understander_graphs(tokens=tokens, sizes={} if most is None else {"batch": most})
    return TokenScheduler(TokenLoop(CONFIG, graphs, PagedTransformer(graphs["transformer"], 1, 1, 1, pages, page_size)))


def turn(picture: int, text: int = 5, max_tokens: int = 6, keep: bool = False, image: int = 12) -> AnswerRequest:
    block = ImageBlock(np.full((image, 3), picture, np.float32))
    return AnswerRequest(TokenPrompt(((1, 2), block, (3,) * text), (2,)), AnswerParams(max_tokens=max_tokens), keep, 0.0)


def drain(queue: TokenScheduler, *turns: AnswerRequest) -> None:
    for _ in range(1000):
        if all(t.finish for t in turns):
            return
        queue.step()
    raise AssertionError("somebody starves")


def shapes_read(graph: Any) -> list[tuple[int, ...]]:
    """Shapes of what a graph of embeddings was fed, call by call."""
    return [array.shape for feeds in graph.feeds for array in feeds.values()]


def held_by_cache(queue: TokenScheduler) -> int:
    return len({page for table in queue.cache._tables.values() for page in table.pages})


def is_clean(queue: TokenScheduler) -> bool:
    pool = queue.loop.transformer.pool
    return not queue._live and not queue._waiting and pool.free == pool.pages - held_by_cache(queue)


def test_a_second_question_about_a_picture_runs_only_its_own_tokens() -> None:
    queue = scheduler(100)
    first, second, other = turn(1), turn(1, text=3), turn(2)
    for t in (first, second, other):
        queue.submit(t)
        drain(queue, t)
    assert [t.cached for t in (first, second, other)] == [0, 14, 0]
    assert queue.loop.transformer.token_forwards == (19 + 5) + (3 + 5) + (19 + 5)
    assert is_clean(queue)
    assert len(queue.cache) == 2


def test_questions_asked_at_once_share_the_picture_too() -> None:
    queue = scheduler(100)
    turns = [turn(1, text=n) for n in range(1, 6)]
    for t in turns:
        queue.submit(t)
    drain(queue, *turns)
    assert [t.cached for t in turns] == [0, 14, 14, 14, 14]
    assert is_clean(queue)


def test_a_conversation_goes_on_from_its_own_pages() -> None:
    queue = scheduler(100)
    first = turn(1, keep=True)
    queue.submit(first)
    drain(queue, first)
    second = replace(first, prompt=first.history.followed_by([*first.tokens[-1:], 4, 4], shared=False), tokens=[], finish=None)
    second = AnswerRequest(second.prompt, second.params, True, 0.0)
    queue.submit(second)
    drain(queue, second)
    assert second.cached == len(first.history) == 19 + 5
    assert second.cached + 3 == len(second.prompt)


def test_running_answers_wait_for_a_piece_of_a_long_prompt_at_most() -> None:
    queue = scheduler(1000)
    running, newcomer = turn(1, max_tokens=50), turn(2, text=4 * PREFILL_CHUNK + 1)
    queue.submit(running)
    queue.step()
    assert len(running.tokens) == 2
    queue.submit(newcomer)
    steps = 0
    while not newcomer.tokens:
        before, forwards = len(running.tokens), queue.loop.transformer.token_forwards
        queue.step()
        steps += 1
        assert len(running.tokens) == before + 1
        assert queue.loop.transformer.token_forwards - forwards <= PREFILL_CHUNK + 2
    assert steps == 5
    drain(queue, running, newcomer)
    assert is_clean(queue)


def test_prompts_are_embedded_in_pieces_too() -> None:
    """Engines take a piece at most; nothing is embedded twice, and no token is left out."""
    queue = scheduler(1000)
    t = turn(1, text=2 * PREFILL_CHUNK, image=3 * PREFILL_CHUNK)
    queue.submit(t)
    drain(queue, t)
    graphs = queue.loop._sessions
    for name, tokens in (("project", 3 * PREFILL_CHUNK), ("embed_text", 2 + 2 * PREFILL_CHUNK + 5)):
        shapes = shapes_read(graphs[name])
        assert max(shape[1] for shape in shapes) <= PREFILL_CHUNK
        assert sum(shape[0] * shape[1] for shape in shapes) == tokens
    assert is_clean(queue)


def test_more_answers_than_an_engine_takes_at_once_take_turns_in_a_step() -> None:
    queue = scheduler(1000, most=3)
    turns = [turn(i, max_tokens=20) for i in range(8)]
    for t in turns:
        queue.submit(t)
    while any(t.pending is not None or not t.tokens for t in turns):
        queue.step()
    graph = queue.loop._sessions["embed_text"]
    before = [len(t.tokens) for t in turns]
    graph.feeds.clear()  # type: ignore[attr-defined]
    queue.step()
    assert shapes_read(graph) == [(3, 1), (3, 1), (2, 1)]
    assert [len(t.tokens) for t in turns] == [count + 1 for count in before]
    plain = queue.loop.decode
    queue.loop.decode = lambda group: 1 / 0 if turns[0] in group else plain(group)  # type: ignore[assignment,method-assign]
    queue.step()
    assert [t.error is not None for t in turns] == [True] * 3 + [False] * 5
    drain(queue, *turns[3:])
    assert is_clean(queue)


def test_only_a_penalty_needs_to_see_the_answer() -> None:
    queue = scheduler(1000, tokens=(1, 2, 2, 3, 1, 4))
    for penalty in (1.0, 1.5):
        t = turn(1)
        t = replace(t, params=replace(t.params, repetition_penalty=penalty))
        queue.submit(t)
        drain(queue, t)
    head: Any = queue.loop._sessions["head"]
    seen = [(feeds["seen"].tolist(), feeds["penalty"].tolist()) for feeds in head.feeds]
    without, with_penalty = seen[:6], seen[6:]
    assert without == [([[0]], [1.0])] * 6
    assert with_penalty[0] == ([[0]], [1.0])
    assert [row for ((row,), (penalty,)) in with_penalty[1:] if penalty == 1.5] == [
        list(dict.fromkeys(t.tokens[:count])) for count in range(1, 6)
    ]


def test_finished_answers_leave_and_stop_tokens_are_no_text() -> None:
    queue = scheduler(100, tokens=(STOP, 1, 2))
    t = turn(1, max_tokens=50)
    queue.submit(t)
    drain(queue, t)
    assert (t.finish, t.tokens) == ("stop", [1, 2])
    assert len(t.timings) == 3
    assert t.history.prefix_boundaries[-1][0] == len(t.prompt) + 2
    short = turn(1, max_tokens=1)
    queue.submit(short)
    drain(queue, short)
    assert (short.finish, len(short.tokens)) == ("length", 1)


def test_when_pages_run_out_turns_wait_or_say_what_is_missing() -> None:
    queue = scheduler(12)
    turns = [turn(i) for i in range(5)]
    for t in turns:
        queue.submit(t)
    most = 0
    while not all(t.finish for t in turns):
        queue.step()
        assert not any(t.error for t in turns)
        most = max(most, len(queue._live))
    assert most == 2
    assert is_clean(queue)
    with pytest.raises(PagesExhausted, match=r"13 key/value pages are needed, 12 of 12 are free.*pages="):
        queue.submit(turn(9, max_tokens=12 * 4 - 19 + 2))
    fits = turn(9, max_tokens=12 * 4 - 19 + 1)
    queue.submit(fits)
    drain(queue, fits)
    assert is_clean(queue)


def test_more_than_the_model_reads_is_named() -> None:
    queue = scheduler(1000)
    with pytest.raises(PromptError, match=r"have 19 tokens, and max_tokens=1982 more make 2001; this model reads 2000"):
        queue.submit(turn(1, max_tokens=1982))
    queue.submit(turn(1, max_tokens=1981))


def test_a_failing_step_frees_those_it_was_for() -> None:
    queue = scheduler(200)
    turns = [turn(i, max_tokens=50) for i in range(2)]
    for t in turns:
        queue.submit(t)
        queue.step()
    plain = queue.loop.decode
    queue.loop.decode = lambda turns: 1 / 0  # type: ignore[assignment,method-assign,return-value]
    newcomer = turn(5, text=PREFILL_CHUNK)
    queue.submit(newcomer)
    queue.step()
    assert newcomer.error is None
    assert all(isinstance(t.error, ZeroDivisionError) for t in turns)
    queue.loop.decode = plain  # type: ignore[method-assign]
    drain(queue, newcomer)
    assert is_clean(queue)


@pytest.mark.parametrize("seed", range(2))
def test_ten_thousand_operations_leak_no_page(seed: int) -> None:
    """Start, cancel, run, evict and continue conversations at random, in a pool that is always too small."""
    rng = np.random.default_rng(seed)
    queue = scheduler(40, page_size=int(rng.integers(1, 6)), tokens=(1, 2, STOP, 3, 4, 5))
    pool = queue.loop.transformer.pool
    live: list[AnswerRequest] = []
    ended: list[AnswerRequest] = []
    counts = dict.fromkeys(("started", "cancelled", "finished", "evicted", "continued"), 0)
    for _ in range(10_000):
        choice = rng.random()
        if choice < 0.2 and len(live) < 12:
            new = turn(int(rng.integers(4)), int(rng.integers(1, 9)), int(rng.integers(1, 12)), bool(rng.random() < 0.5), 6)
            if ended and rng.random() < 0.4:
                last = ended[int(rng.integers(len(ended)))]
                rest = last.tokens[len(last.history) - len(last.prompt) :]
                new = AnswerRequest(last.history.followed_by([*rest, 6, 6], shared=False), new.params, True, 0.0)
                counts["continued"] += 1
            try:
                queue.submit(new)
                live.append(new)
                counts["started"] += 1
            except PagesExhausted:
                assert -(-new.most_stored // pool.page_size) > pool.pages
        elif choice < 0.25 and live:
            queue.remove(live.pop(int(rng.integers(len(live)))))
            counts["cancelled"] += 1
        elif choice < 0.3:
            counts["evicted"] += queue.cache.evict()
        else:
            queue.step()
            done = [t for t in live if t.finish]
            counts["finished"] += len(done)
            ended = [*ended, *(t for t in done if t.keep)][-5:]
            live = [t for t in live if not t.finish]
        holders = [t.table.pages for t in queue._live if t.table] + [t.pages for t in queue.cache._tables.values()]
        assert pool.free == pool.pages - len({page for pages in holders for page in pages})
    assert min(counts.values()) > 100
    drain(queue, *live)
    assert is_clean(queue)
    while queue.cache.evict():
        pass
    assert pool.free == pool.pages


def test_the_default_pool_holds_eight_questions() -> None:
    assert CONFIG.default_pages() == 8 * 33
    assert replace(CONFIG, context=100).default_pages() == 8 * 7


@pytest.mark.parametrize("when", ["prompt", "answer"])
def test_a_request_that_is_not_finite_leaves_alone_and_leaves_nothing_behind(when: str) -> None:
    """Its pages are free and finite, and the prefix of a prompt that failed is not kept."""
    queue = scheduler(100)
    turns = [turn(1), turn(2), turn(3, keep=True)]
    steps, graph = count(1), queue.loop._sessions["transformer"]
    assert isinstance(graph, FakeGraph)
    plain = graph.compute

    def failing(feeds: Mapping[str, Array]) -> Mapping[str, Array]:
        found = {name: np.array(array) for name, array in plain(feeds).items()}
        number = next(steps)
        # A prompt, a token, then the second prompt, then a token of both.
        if number == (3 if when == "prompt" else 4):
            found["new_k"][:, -1] = np.nan
        return found

    graph.compute = failing
    for t in turns:
        queue.submit(t)
    for _ in range(30):
        queue.step()
    assert [type(t.error) for t in turns] == [type(None), NotFiniteError, type(None)]
    assert [len(t.tokens) for t in turns] == [6, int(when == "answer"), 6]
    assert is_clean(queue)
    # Of each picture its prefix, and the conversation that goes on; nothing of a prompt that failed.
    assert len(queue.cache) == (3 if when == "prompt" else 4)
    assert np.isfinite(np.asarray(queue.loop.transformer._k.slots)).all()


def test_a_short_prompt_waits_for_a_chunk_of_a_long_one_at_most() -> None:
    """Whether it comes while long ones wait, or while they are read."""
    queue = scheduler(2000)
    long = [turn(i, text=3 * PREFILL_CHUNK) for i in range(3)]
    for t in long:
        queue.submit(t)
    queue.step()
    queue.step()
    short = turn(9)
    queue.submit(short)
    forwards = queue.loop.transformer.token_forwards
    queue.step()
    assert short.tokens
    assert queue.loop.transformer.token_forwards - forwards < PREFILL_CHUNK
    drain(queue, *long, short)
    assert is_clean(queue)


def test_a_long_prompt_is_read_while_short_ones_never_stop_coming() -> None:
    queue = scheduler(2000)
    long, short = turn(0, text=4 * PREFILL_CHUNK, max_tokens=1), []
    queue.submit(long)
    steps = 0
    while not long.tokens:
        # Two at each step, of which the model reads one.
        for _ in range(2):
            short.append(turn(len(short) + 1, text=100, max_tokens=1))
            queue.submit(short[-1])
        queue.step()
        steps += 1
        read = queue.loop.transformer.token_forwards
        assert read <= (PATIENCE + 2) * len(long.prompt)
    assert steps > 8
    for t in short:
        queue.remove(t)
    assert is_clean(queue)


def test_small_questions_overtake_a_large_one_that_does_not_fit_yet_for_a_while() -> None:
    queue = scheduler(16)
    first, large, *small = turn(1, max_tokens=14), turn(2, text=20, max_tokens=20), *(turn(i) for i in range(3, 13))
    for t in (first, large, *small):
        queue.submit(t)
    ends: list[AnswerRequest] = []
    while len(ends) < 12:
        queue.step()
        ends += [t for t in (first, large, *small) if t.finish and t not in ends]
    # Each is 25 tokens, and the large one 54.
    assert 1 <= sum(t in small for t in ends[: ends.index(large)]) <= 54 // 25 + 1
    assert is_clean(queue)


def test_what_is_cached_is_no_work() -> None:
    """The longer of two prompts goes first where nearly all of it was read before."""
    queue = scheduler(1000)
    known = turn(1, image=100)
    queue.submit(known)
    drain(queue, known)
    again, fresh = turn(1, image=100), turn(2, image=40)
    for t in (fresh, again):
        queue.submit(t)
    queue.step()
    assert (bool(again.tokens), bool(fresh.tokens)) == (True, False)
    drain(queue, again, fresh)
    assert is_clean(queue)


def test_padding_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines take steps in few sizes: rows beyond the answers', wider block tables and longer lists change no answer."""

    def answered() -> tuple[list[list[int]], int, list[tuple[int, ...]]]:
        queue = scheduler(100)
        turns = [turn(number, max_tokens=3 + number) for number in range(3)]
        for each in turns:
            queue.submit(each)
        drain(queue, *turns)
        steps = queue.loop.transformer._session.feeds  # type: ignore[attr-defined]
        tables = [feeds["block_tables"].shape for feeds in steps]
        return [each.tokens for each in turns], queue.loop.transformer.pool.free, tables

    exact = answered()
    monkeypatch.setattr(FakeGraph, "padded", lambda self, dim, size: -(-size // 8) * 8)
    padded = answered()
    assert padded[:2] == exact[:2]
    assert {shape for shape in padded[2] if shape[0] > 1} == {(8, 8)}
    assert {shape[1] for shape in exact[2]} != {8}
