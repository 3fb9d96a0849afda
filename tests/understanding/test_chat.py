from __future__ import annotations

import threading

import pytest

from tests.support.fake_answering import FakeAnswering
from tests.support.fake_graphs import STOP
from tokenflow_sdk.errors import ArgumentError, PromptError, RequestCancelledError, RequestTimeoutError
from tokenflow_sdk.understanding.answering import Answer
from tokenflow_sdk.understanding.chat import Chat
from tokenflow_sdk.understanding.params import AnswerParams


def chat(answering: FakeAnswering, images: object = 0) -> Chat:
    return Chat(answering, images)  # type: ignore[arg-type]


def test_every_question_is_asked_after_all_earlier_ones() -> None:
    answering = FakeAnswering(tokens=(1, 2, 3, STOP))
    talk = chat(answering, [0, 1])
    first = talk.ask("one?")
    second = talk.ask("two?!")
    third = talk.ask("x")
    assert [a.prompt_tokens for a in (first, second, third)] == [
        8 + 4,
        8 + 4 + len(first.token_ids) + 5,
        8 + 4 + len(first.token_ids) + 5 + len(second.token_ids) + 1,
    ]
    # All that was read or written before is still in the pages.
    assert [a.cached_tokens for a in (first, second, third)] == [0, second.prompt_tokens - 5, third.prompt_tokens - 1]
    assert talk.turns == [("one?", first.text), ("two?!", second.text), ("x", third.text)]
    assert answering.is_clean()


def test_a_conversation_goes_on_after_turns_in_words() -> None:
    answering = FakeAnswering(tokens=(1, 2, 3, STOP))
    talk = Chat(answering, 0, turns=[("one?", "bcd"), ["two?!", ""]])  # type: ignore[arg-type, list-item]
    assert talk.turns == [("one?", "bcd"), ("two?!", "")]
    answer = talk.ask("x")
    assert answer.prompt_tokens == 4 + (4 + 3) + 5 + 1
    assert talk.turns[2:] == [("x", answer.text)]
    assert talk.ask("y").prompt_tokens == answer.prompt_tokens + len(answer.token_ids) + 1


@pytest.mark.parametrize("turns", ["one", [("question",)], [("a", "b", "c")], 3])
def test_what_are_no_turns_is_named(turns: object) -> None:
    with pytest.raises(ArgumentError, match="turn"):
        Chat(FakeAnswering(), 0, turns=turns)  # type: ignore[arg-type]


def test_a_stream_is_a_turn_when_it_was_read_to_its_end() -> None:
    answering = FakeAnswering()
    talk = chat(answering)
    pieces = talk.stream("one?", max_tokens=4)
    assert talk.turns == []
    found = [next(pieces) for _ in range(4)]
    assert talk.turns == []
    assert list(pieces) == []
    assert talk.turns == [("one?", "".join(found))]
    assert talk.ask("two?", max_tokens=2).prompt_tokens == 4 + 4 + 4 + 4


def test_a_stream_that_is_closed_was_never_asked() -> None:
    answering = FakeAnswering()
    talk = chat(answering)
    known = talk.ask("one?", max_tokens=3)
    pieces = talk.stream("two?", max_tokens=9)
    next(pieces)
    pieces.close()
    assert talk.turns == [("one?", known.text)]
    assert talk.ask("three", max_tokens=3).prompt_tokens == 4 + 4 + 3 + 5
    assert answering.is_clean()


def test_conversations_about_the_same_image_share_its_pages_only() -> None:
    answering = FakeAnswering(tokens=(1,))
    one, other = chat(answering), chat(answering)
    one.ask("one?", max_tokens=3)
    assert other.ask("one?", max_tokens=3).cached_tokens == 4
    assert other.turns == one.turns


@pytest.mark.parametrize("way", ["ask", "stream"])
def test_settings_go_before_those_of_params(way: str) -> None:
    params = AnswerParams(max_tokens=3, temperature=0.5, seed=5)
    for given, expected in (
        ({"params": params}, params),
        ({"params": params, "max_tokens": 2}, AnswerParams(max_tokens=2, temperature=0.5, seed=5)),
        ({"params": params, "temperature": 0.0, "seed": 0}, AnswerParams(max_tokens=3, temperature=0.0, seed=0)),
        ({"max_tokens": 4, "seed": 1}, AnswerParams(max_tokens=4, seed=1)),
    ):
        talk = chat(FakeAnswering())
        found = getattr(talk, way)("what?", **given)
        text = found.text if isinstance(found, Answer) else "".join(found)
        assert talk.turns == [("what?", text)]
        assert talk._last is not None
        assert talk._last.params == expected


def test_what_cannot_work_is_raised_at_once_and_is_no_turn() -> None:
    answering = FakeAnswering()
    talk = chat(answering)
    for way in (talk.ask, talk.stream):
        with pytest.raises(ArgumentError, match="max_tokens=0"):
            way("what?", max_tokens=0)
        with pytest.raises(PromptError, match="this model reads 2000"):
            way("what?", max_tokens=2000)
    assert talk.turns == []
    assert answering.is_clean()


def test_a_question_that_fails_was_never_asked() -> None:
    answering = FakeAnswering()
    talk = chat(answering)
    talk.ask("one?", max_tokens=3)
    decode = answering.scheduler.loop.decode
    answering.scheduler.loop.decode = lambda requests: 1 / 0  # type: ignore[assignment,method-assign,return-value]
    with pytest.raises(ZeroDivisionError):
        talk.ask("two?", max_tokens=3)
    answering.scheduler.loop.decode = decode  # type: ignore[method-assign]
    assert [question for question, _ in talk.turns] == ["one?"]
    assert talk.ask("three", max_tokens=3).prompt_tokens == 4 + 4 + 3 + 5
    assert answering.is_clean()


def test_one_question_at_a_time() -> None:
    """Whoever asks: an open stream, or another thread in the middle of an answer."""
    answering = FakeAnswering()
    talk = chat(answering)
    pieces = talk.stream("one?", max_tokens=4)
    early = talk.stream("early", max_tokens=4)
    next(pieces)
    for way in (lambda: talk.ask("two?"), lambda: next(talk.stream("two?")), lambda: next(early)):
        with pytest.raises(ArgumentError, match=r"answering another question\. Wait for its answer, or close its stream"):
            way()
    answer = pieces.result()
    assert talk.turns == [("one?", answer.text)]
    late = talk.stream("late", max_tokens=4)
    talk.ask("two?", max_tokens=4)
    with pytest.raises(ArgumentError, match="The chat went on after this stream was made"):
        next(late)
    assert [question for question, _ in talk.turns] == ["one?", "two?"]
    assert answering.is_clean()


def test_threads_never_mix_a_history() -> None:
    """Each question is refused by name, or asked after exactly those before it."""
    answering = FakeAnswering()
    talk = chat(answering)
    answers, refused = [], []
    begin = threading.Barrier(4)

    def ask() -> None:
        begin.wait(60)
        for _ in range(10):
            try:
                answers.append(talk.ask("what?", max_tokens=3))
            except ArgumentError as error:
                refused.append(error)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(answers) + len(refused) == 40
    assert len(talk.turns) == len(answers) > 0
    # 4 tokens of the image, then 5 of each question and 3 of each answer.
    assert sorted(answer.prompt_tokens for answer in answers) == [4 + 8 * number + 5 for number in range(len(answers))]
    assert answering.is_clean()


def test_a_question_that_was_given_up_was_never_asked() -> None:
    answering = FakeAnswering()
    talk = chat(answering)
    with pytest.raises(RequestTimeoutError):
        talk.ask("one?", timeout=0)
    with pytest.raises(RequestTimeoutError):
        list(talk.stream("one?", timeout=0))
    with talk.stream("one?", max_tokens=4) as stream:
        next(stream)
    with pytest.raises(RequestCancelledError):
        stream.result()
    assert talk.turns == []
    assert talk.stream("one?", max_tokens=4).result().prompt_tokens == 4 + 4
    assert [question for question, _ in talk.turns] == ["one?"]
    assert answering.is_clean()
