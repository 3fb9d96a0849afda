from __future__ import annotations

from dataclasses import replace
from time import perf_counter

import pytest

from tests.support.fake_answering import HALF, FakeAnswering
from tests.support.fake_graphs import STOP, UNDERSTANDER
from tokenflow_sdk.errors import ArgumentError, PagesExhausted, PromptError, RequestTimeoutError
from tokenflow_sdk.understanding.answering import Answer
from tokenflow_sdk.understanding.params import AnswerParams
from tokenflow_sdk.understanding.token_loop import AnswerRequest

FIVE = AnswerParams(max_tokens=5)


def first(answering: FakeAnswering, image: int = 0, question: str = "what?", params: AnswerParams = FIVE) -> AnswerRequest:
    return answering.first(answering.images(image), question, params, keep=False)


def test_an_answer_says_what_it_took() -> None:
    answering = FakeAnswering(tokens=(STOP, 1, 2))
    earlier = perf_counter()
    request = answering.first(answering.images([0, 1]), "what?", FIVE, False, earlier)
    (answer,) = answering.answers([request])
    assert answer == Answer("bc", (1, 2), "stop", 13, 0, tuple(request.timings), FIVE)
    # To each token, and to the one that ended it.
    assert len(answer.timings) == 3
    assert 0 < answer.timings[0] <= answer.timings[-1] <= perf_counter() - earlier
    assert answering.is_clean()


def test_a_second_question_about_an_image_finds_its_pages() -> None:
    answering = FakeAnswering()
    first_answer, second, other = (answering.answers([first(answering, image)])[0] for image in (0, 0, 1))
    assert [a.cached_tokens for a in (first_answer, second, other)] == [0, 4, 0]
    assert [a.prompt_tokens for a in (first_answer, second, other)] == [9, 9, 9]


def test_questions_are_answered_together_in_their_order() -> None:
    """Each to its own end."""
    answering = FakeAnswering(tokens=(1,))
    requests = [first(answering, image=n, params=AnswerParams(max_tokens=count)) for n, count in enumerate((7, 1, 3))]
    assert [answer.text for answer in answering.answers(requests)] == ["b" * 7, "b", "b" * 3]
    assert [request.finish for request in requests] == ["length"] * 3
    assert answering.is_clean()
    assert answering.answers([]) == []


@pytest.mark.parametrize(
    ("tokens", "count", "pieces"),
    [
        ((1, 2), 4, ["c", "b", "c", "b"]),
        # The tokens begin with the second of them.
        ((HALF, 1, HALF, 2), 4, ["b", "C", "?"]),
        ((HALF, 1, HALF, 2), 5, ["b", "C", "B"]),
        ((1, HALF), 5, ["B", "B", "?"]),
        ((STOP, 1), 5, ["b"]),
        ((1, STOP), 5, []),
    ],
)
def test_pieces_are_whole_characters_and_together_the_answer(tokens: tuple[int, ...], count: int, pieces: list[str]) -> None:
    params = AnswerParams(max_tokens=count)
    answering = FakeAnswering(tokens)
    assert list(answering.pieces(first(answering, params=params))) == pieces
    assert answering.is_clean()
    again = FakeAnswering(tokens)
    (answer,) = again.answers([first(again, params=params)])
    assert answer.text == "".join(pieces)


@pytest.mark.parametrize("read", [0, 2, 9])
def test_a_stream_ends_with_the_answer(read: int) -> None:
    """How it ended, and what it took."""
    for tokens in ((STOP, 1, 2), (1, 2)):
        answering, streaming = FakeAnswering(tokens), FakeAnswering(tokens)
        (expected,) = answering.answers([first(answering)])
        stream = streaming.stream(first(streaming))
        pieces = [piece for _, piece in zip(range(read), stream, strict=False)]
        found = stream.result()
        assert found == replace(expected, timings=found.timings)
        assert expected.text.startswith("".join(pieces))
        assert streaming.is_clean()


def test_an_answer_that_takes_too_long_gives_its_pages_back() -> None:
    answering = FakeAnswering()
    for began, timeout in ((None, 0.0), (perf_counter() - 9, 8.0)):
        request = answering.first(answering.images(0), "what?", FIVE, False, began, timeout)
        with pytest.raises(RequestTimeoutError, match="not finished within timeout="):
            answering.answers([first(answering), request])
        with pytest.raises(RequestTimeoutError):
            answering.stream(request).result()
        assert answering.is_clean()


def test_pieces_come_as_soon_as_they_are_found() -> None:
    answering = FakeAnswering()
    request = first(answering)
    pieces = answering.pieces(request)
    for count in (1, 2, 3):
        next(pieces)
        assert len(request.tokens) in (count, count + 1)
    assert not answering.is_clean()
    pieces.close()
    assert answering.is_clean()
    assert request.finish is None


def test_pieces_that_nobody_reads_are_not_computed() -> None:
    answering = FakeAnswering()
    pieces = answering.pieces(first(answering))
    assert answering.is_clean()
    pieces.close()
    assert answering.scheduler.loop.transformer.token_forwards == 0


def test_a_next_question_reads_what_its_answer_left() -> None:
    """A last token that was never run is read before the question; a finished answer leaves nothing."""
    for tokens, finish, unread in (((1, 2), "length", 1), ((STOP, 1, 2), "stop", 0)):
        answering = FakeAnswering(tokens)
        asked = answering.first(answering.images(0), "what?", FIVE, keep=True)
        answering.answers([asked])
        assert asked.finish == finish
        following = answering.next(asked, "and?", FIVE)
        assert len(following.prompt) == len(asked.prompt) + len(asked.tokens) + 4
        assert following.keep
        (answer,) = answering.answers([following])
        assert answer.cached_tokens == len(asked.prompt) + len(asked.tokens) - unread
        assert answering.is_clean()


def test_what_cannot_work_is_said_before_anything_runs() -> None:
    answering = FakeAnswering(pages=5)
    with pytest.raises(PagesExhausted):
        first(answering, question="?" * 20)
    with pytest.raises(PromptError, match="this model reads 2000"):
        first(answering, params=AnswerParams(max_tokens=2000))
    fits = first(answering)
    with pytest.raises(PagesExhausted):
        answering.next(fits, "?" * 20, FIVE)
    assert answering.is_clean()
    assert answering.scheduler.loop.transformer.token_forwards == 0


def test_an_answer_without_a_length_ends_where_the_model_reads_no_more() -> None:
    answering = FakeAnswering(tokens=(1,), pages=600)
    long = "?" * (UNDERSTANDER.context - 4 - 10)
    (answer,) = answering.answers([first(answering, question=long, params=AnswerParams())])
    assert (len(answer.token_ids), answer.params.max_tokens) == (10, 10)
    (answer,) = answering.answers([first(answering, params=AnswerParams())])
    assert len(answer.token_ids) == 256
    with pytest.raises(PromptError, match="max_tokens=11 more make 2001; this model reads 2000"):
        first(answering, question=long, params=AnswerParams(max_tokens=11))
    with pytest.raises(PromptError, match="this model reads 2000"):
        first(answering, question=long + "?" * 10, params=AnswerParams())


def test_stop_tokens_that_the_model_does_not_have_are_named() -> None:
    with pytest.raises(ArgumentError, match=r"stop_ids=8 ends no answer: this model has tokens 0 \.\. 7"):
        first(FakeAnswering(), params=AnswerParams(stop_ids=(7, 8)))
