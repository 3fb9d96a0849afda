"""The loop over tokens on graphs that are plain functions: what each is fed, and what ends an answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from time import perf_counter

import numpy as np
import pytest

from tests.support.fake_graphs import STOP, UNDERSTANDER, FakeGraph, understander_graphs
from tokenflow_sdk.backends.session import Array
from tokenflow_sdk.errors import NotFiniteError, PagesExhausted
from tokenflow_sdk.model.kv_cache import PageTable
from tokenflow_sdk.model.sampling import TIES, uniform
from tokenflow_sdk.model.transformer import PagedTransformer
from tokenflow_sdk.understanding.params import AnswerParams
from tokenflow_sdk.understanding.prompt import ImageBlock, TokenPrompt
from tokenflow_sdk.understanding.token_loop import AnswerRequest, TokenLoop

IMAGE = ImageBlock(np.arange(15, dtype=np.float32).reshape(5, 3))
PROMPT = TokenPrompt(((1, 2), IMAGE, (3, 4, 5)), (2,))
PLAIN = AnswerParams(max_tokens=10)


def make(pages: int = 20, page_size: int = 4, tokens: tuple[int, ...] = (1, 2, 3)) -> tuple[TokenLoop, dict[str, FakeGraph]]:
    graphs = understander_graphs(tokens=tokens)
    transformer = PagedTransformer.of(UNDERSTANDER, graphs["transformer"], pages, page_size)
    return TokenLoop(UNDERSTANDER, graphs, transformer), graphs


def asked(loop: TokenLoop, params: AnswerParams = PLAIN, prompt: TokenPrompt = PROMPT) -> AnswerRequest:
    request = AnswerRequest(prompt, params, False, perf_counter())
    loop.begin(request, PageTable(loop.transformer.pool))
    return request


def read(loop: TokenLoop, request: AnswerRequest) -> None:
    loop.prefill(request, request.unread)


def run(loop: TokenLoop, *requests: AnswerRequest) -> None:
    for request in requests:
        read(loop, request)
    while live := [request for request in requests if request.finish is None]:
        loop.decode(live)


def test_a_prompt_is_embedded_block_by_block() -> None:
    loop, graphs = make()
    request = asked(loop)
    assert (request.unread, request.cached) == (10, 0)
    read(loop, request)
    assert [feeds["token_ids"].tolist() for feeds in graphs["embed_text"].feeds] == [[[1, 2]], [[3, 4, 5]]]
    (projected,) = graphs["project"].feeds
    np.testing.assert_array_equal(projected["features"], IMAGE.features[None])
    (step,) = graphs["transformer"].feeds
    assert step["embeddings"].shape == (1, 10, 2)
    assert step["positions"].tolist() == [list(range(10))]
    assert step["visible"].tolist() == [list(range(1, 11))]
    assert step["context"].tolist() == [0]
    assert step["block_tables"].shape == (1, 1)
    assert request.pending is None
    assert (len(request.tokens), request.table.length) == (1, 10)  # type: ignore[union-attr]


@pytest.mark.parametrize("piece", range(1, 11))
def test_pieces_of_any_length_read_the_same_prompt(piece: int) -> None:
    """Only the last draws a token, from the last hidden state."""
    loop, graphs = make()
    request = asked(loop)
    while request.pending is not None:
        assert request.tokens == []
        assert graphs["head"].feeds == []
        loop.prefill(request, piece)
    steps = graphs["transformer"].feeds
    assert [n for feeds in steps for n in feeds["positions"][0].tolist()] == list(range(10))
    assert [feeds["context"][0] for feeds in steps] == list(range(0, 10, piece))
    for feeds in steps:
        assert feeds["visible"].tolist() == [list(range(1, 1 + feeds["positions"].shape[1]))]
        assert feeds["block_tables"].shape[1] == max(1, -(-feeds["context"][0] // 4))
    texts = [i for feeds in graphs["embed_text"].feeds for i in feeds["token_ids"][0].tolist()]
    rows = np.concatenate([feeds["features"][0] for feeds in graphs["project"].feeds])
    assert texts == [1, 2, 3, 4, 5]
    np.testing.assert_array_equal(rows, IMAGE.features)
    assert len(graphs["head"].feeds) == len(request.tokens) == len(request.timings) == 1


def test_what_pages_hold_already_is_not_read_again() -> None:
    loop, graphs = make()
    first = asked(loop)
    read(loop, first)
    assert first.table is not None
    second = AnswerRequest(PROMPT, PLAIN, False, 0.0)
    loop.begin(second, first.table.fork(7))
    assert (second.cached, second.unread) == (7, 3)
    graphs["transformer"].feeds.clear()
    read(loop, second)
    (step,) = graphs["transformer"].feeds
    assert step["positions"].tolist() == [[7, 8, 9]]
    assert step["context"].tolist() == [7]
    assert step["block_tables"].tolist() == [first.table.pages[:2]]
    assert second.table is not None
    assert second.table.pages[0] == first.table.pages[0]
    assert second.table.pages[1] != first.table.pages[1]


def test_answers_that_run_together_each_get_their_own_token() -> None:
    loop, graphs = make(tokens=(1, 2, 3, 4, 5))
    short = TokenPrompt(((6, 6), IMAGE), ())
    requests = [asked(loop), asked(loop, prompt=short)]
    for request in requests:
        read(loop, request)
    last = [request.tokens[-1] for request in requests]
    loop.decode(requests)
    assert graphs["embed_text"].feeds[-1]["token_ids"].tolist() == [[token] for token in last]
    step = graphs["transformer"].feeds[-1]
    assert step["positions"].tolist() == [[10], [7]]
    assert step["context"].tolist() == [10, 7]
    assert step["visible"].tolist() == [[1], [1]]
    # As wide as the longest of them needs.
    assert step["block_tables"].shape == (2, 3)
    assert [request.table.length for request in requests] == [11, 8]  # type: ignore[union-attr]
    # The fake head counts up by row.
    (first, second) = (request.tokens[-1] for request in requests)
    assert second == first % 5 + 1


@pytest.mark.parametrize("count", [1, 2, 5])
def test_an_answer_ends_at_its_length(count: int) -> None:
    loop, graphs = make()
    request = asked(loop, AnswerParams(max_tokens=count))
    run(loop, request)
    assert (request.finish, len(request.tokens), len(request.timings)) == ("length", count, count)
    # The last token is never run.
    assert request.table is not None
    assert request.table.length == request.most_stored == 10 + count - 1
    assert len(request.history) == request.table.length
    assert len(graphs["head"].feeds) == count
    assert request.timings == sorted(request.timings)
    assert request.reached(count)
    assert request.reached(count + 1)


@pytest.mark.parametrize(
    ("stop_ids", "tokens", "finish"),
    [
        (None, [1, 2], "stop"),
        ((2,), [1], "stop"),
        ((5, 1), [], "stop"),
        ((), [1, 2, STOP, 1, 2, STOP, 1, 2, STOP, 1], "length"),
    ],
)
def test_a_stop_token_ends_an_answer_and_is_no_part_of_it(stop_ids, tokens: list[int], finish: str) -> None:
    """None takes the model's own."""
    loop, _ = make(tokens=(STOP, 1, 2))
    request = asked(loop, AnswerParams(max_tokens=10, stop_ids=stop_ids))
    run(loop, request)
    assert (request.tokens, request.finish) == (tokens, finish)
    assert len(request.timings) == len(tokens) + (finish == "stop")
    assert request.table is not None
    assert len(request.history) == request.table.length == 10 + len(tokens) - (finish == "length")


def test_the_likeliest_token_is_asked_for_without_chance() -> None:
    """Without a temperature top_k is 1, whatever else is set; every number that does nothing is a neutral one."""
    loop, graphs = make()
    request = asked(loop, AnswerParams(max_tokens=2, top_k=5, top_p=0.4, seed=6))
    run(loop, request)
    for feeds in graphs["head"].feeds:
        assert feeds["top_k"].tolist() == [1]
        assert feeds["temperature"].tolist() == [1.0]
        assert feeds["penalty"].tolist() == [1.0]
        assert feeds["seen"].tolist() == [[0]]
        assert feeds["ranks"].tolist() == list(range(min(1 + TIES, UNDERSTANDER.vocabulary)))
        assert feeds["noise"].tolist() == [0.0]


def test_settings_are_each_answers_own() -> None:
    """top_k never exceeds the vocabulary, and the window holds the largest with its ties."""
    loop, graphs = make()
    loop.config = replace(UNDERSTANDER, vocabulary=90)
    settings = [
        AnswerParams(max_tokens=4, temperature=0.5, top_k=70, top_p=0.25, seed=1),
        AnswerParams(max_tokens=4, temperature=2.0, top_k=3000, top_p=1.0, seed=2),
        AnswerParams(max_tokens=4),
    ]
    requests = [asked(loop, params) for params in settings]
    run(loop, *requests)
    for number, feeds in enumerate(graphs["head"].feeds[3:], start=1):
        assert feeds["top_k"].tolist() == [70, 90, 1]
        assert feeds["temperature"].tolist() == [0.5, 2.0, 1.0]
        assert feeds["top_p"].tolist() == [0.25, 1.0, 0.0]
        assert len(feeds["ranks"]) == 90
        expected = [uniform(seed, 0, number, 0, 1)[0] for seed in (1, 2)]
        np.testing.assert_array_equal(feeds["noise"], [*expected, 0])
    assert [len(feeds["ranks"]) for feeds in graphs["head"].feeds[:3]] == [78, 90, 1 + TIES]


def test_a_penalty_sees_every_token_of_the_answer_once() -> None:
    """Rows of one call are equally long: shorter ones repeat one of their own tokens, which changes nothing."""
    loop, graphs = make(tokens=(4, 4, 1, 6, 1, 1))
    penalised, free = asked(loop, AnswerParams(max_tokens=6, repetition_penalty=1.5)), asked(loop, AnswerParams(max_tokens=6))
    run(loop, penalised, free)
    for feeds in graphs["head"].feeds[:2]:
        assert (feeds["seen"].tolist(), feeds["penalty"].tolist()) == ([[0]], [1.0])
    for count, feeds in enumerate(graphs["head"].feeds[2:], start=1):
        seen, other = feeds["seen"].tolist()
        assert set(seen) == set(penalised.tokens[:count])
        assert len(seen) == len(set(seen))
        assert other == [0] * len(seen)
        assert feeds["penalty"].tolist() == [1.5, 1.0]


def test_shorter_rows_of_seen_tokens_are_filled_up_with_their_own() -> None:
    loop, graphs = make(tokens=(1, 2, 3, 4, 5, 6))
    old, new = (asked(loop, AnswerParams(max_tokens=9, repetition_penalty=1.2)) for _ in range(2))
    read(loop, old)
    for _ in range(3):
        loop.decode([old])
    read(loop, new)
    loop.decode([old, new])
    long, short = graphs["head"].feeds[-1]["seen"].tolist()
    assert long == list(dict.fromkeys(old.tokens[:-1]))
    assert short == new.tokens[:1] * len(long)


def test_a_pool_that_is_too_small_says_so() -> None:
    loop, _ = make(pages=2)
    request = asked(loop)
    loop.prefill(request, 8)
    with pytest.raises(PagesExhausted):
        loop.prefill(request, 2)
    assert request.table is not None
    request.table.release()
    assert loop.transformer.pool.free == 2


def test_an_answer_has_its_last_token_when_it_is_finished() -> None:
    """Another thread may ask between the token and the finish."""
    answer = AnswerRequest(TokenPrompt(((1,),), ()), AnswerParams(max_tokens=2), False, 0.0)
    answer.tokens = [5]
    assert answer.reached(1)
    answer.tokens = [5, 6]
    assert not answer.reached(2)
    answer.finish = "length"
    assert answer.reached(2)


def test_a_prompt_that_is_not_finite_is_not_stored_whatever_piece_it_is_in() -> None:
    loop, graphs = make()
    plain = graphs["transformer"].compute

    def failing(feeds: Mapping[str, Array]) -> Mapping[str, Array]:
        found = dict(plain(feeds))
        if 3 in feeds["positions"]:
            found["new_v"][0, 0, 0] = np.inf
        return found

    graphs["transformer"].compute = failing
    request = asked(loop)
    loop.prefill(request, 3)
    with pytest.raises(NotFiniteError):
        loop.prefill(request, 4)
    assert request.table is not None
    assert (request.table.length, request.tokens, graphs["head"].feeds) == (3, [], [])


@pytest.mark.parametrize("place", ["hidden", "new_k", "new_v", "logits"])
def test_an_answer_that_is_not_finite_ends_alone(place: str) -> None:
    """Wherever NaN first shows; what its neighbours read stays as it was."""
    loop, graphs = make(tokens=(4,))
    requests = [asked(loop) for _ in range(3)]
    for request in requests:
        read(loop, request)
    graph = graphs["head" if place == "logits" else "transformer"]
    plain = graph.compute

    def failing(feeds: Mapping[str, Array]) -> Mapping[str, Array]:
        found = {name: np.array(array) for name, array in plain(feeds).items()}
        found[place][(slice(None), 1) if place in ("new_k", "new_v") else 1] = np.nan
        if place == "logits":
            found["certain"][1] = 0
        return found

    graph.compute = failing
    loop.decode(requests)
    assert [type(request.error) for request in requests] == [type(None), NotFiniteError, type(None)]
    assert [request.tokens for request in requests] == [[4, 4], [4], [4, 4]]
    assert all(np.isfinite(np.asarray(pages.slots)).all() for pages in (loop.transformer._k, loop.transformer._v))


@pytest.mark.parametrize("certain", [False, None])
def test_greedy_answers_take_the_first_of_the_largest_logits(certain: bool | None) -> None:
    """Where the graph is not certain, or was exported before graphs said so: beside answers that are drawn, with a penalty."""
    loop, graphs = make(tokens=(3,))
    head = graphs["head"]
    logits = np.zeros((3, UNDERSTANDER.vocabulary), np.float32)
    logits[:, [1, 4, 5]] = 2
    head.compute = lambda feeds: {
        "token_ids": np.full(len(feeds["hidden"]), 5, np.int32),
        "certain": np.zeros(len(feeds["hidden"]), np.int32),
        "logits": logits[: len(feeds["hidden"])],
    }
    if certain is None:
        head.outputs = tuple(spec for spec in head.outputs if spec.name != "certain")
    params = [PLAIN, AnswerParams(max_tokens=10, temperature=1.0), AnswerParams(max_tokens=10, repetition_penalty=2.0)]
    requests = [asked(loop, each) for each in params]
    for request in requests:
        read(loop, request)
    loop.decode(requests)
    assert [request.tokens for request in requests] == [[1, 1], [5, 5], [1, 4]]
