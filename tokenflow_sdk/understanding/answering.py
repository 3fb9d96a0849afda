"""From questions about images to answers: what `Understander` and `Chat` share."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Literal

from tokenflow_sdk.loaded_model import Progress
from tokenflow_sdk.pictures.preparation import Color, Preprocess
from tokenflow_sdk.request_runner import RequestRunner, RequestStream
from tokenflow_sdk.understanding.chat_text import ChatText
from tokenflow_sdk.understanding.image_features import ImageFeatures, ImageInput
from tokenflow_sdk.understanding.params import AnswerParams, within
from tokenflow_sdk.understanding.prompt import ImageBlock, TokenPrompt
from tokenflow_sdk.understanding.token_loop import AnswerRequest

__all__ = ["Answer", "Answering"]


@dataclass(frozen=True)
class Answer:
    """A finished answer.

    `finish` says what ended it: a `stop` token, which is not in `token_ids`, or its `length`. Of the `prompt_tokens`, images
    included, `cached_tokens` were not run again. `timings` are seconds from the question to each token, and to the one that
    ended it.
    """

    text: str
    token_ids: tuple[int, ...]
    finish: Literal["stop", "length"]
    prompt_tokens: int
    cached_tokens: int
    timings: tuple[float, ...]
    params: AnswerParams


class Answering:
    """Writes conversations as requests, runs them, and reads answers out of them. Safe to call from several threads.

    Args:
        features: encodes images.
        text: writes and reads text.
        runner: of the model that answers.
        context: most tokens that the model reads.
    """

    def __init__(self, features: ImageFeatures, text: ChatText, runner: RequestRunner[AnswerRequest], context: int) -> None:
        self._features, self._text, self._runner, self._context = features, text, runner, context

    def images(
        self, images: ImageInput | Sequence[ImageInput], preprocess: Preprocess | None = None, color: Color = "srgb"
    ) -> list[ImageBlock]:
        """The features of one image, or of several in a list. Arguments and errors as in `ImageFeatures.of_all`."""
        return self._features.of_all(images, preprocess, color)

    def warn_of_preparation(self, questions: Iterable[object], preprocess: Preprocess | None) -> None:
        """As `ImageFeatures.warn_of_preparation`, of what the caller's caller asks."""
        self._features.warn_of_preparation(questions, preprocess, stacklevel=4)

    def first(
        self,
        images: Sequence[ImageBlock],
        question: str,
        params: AnswerParams,
        keep: bool,
        began: float | None = None,
        timeout: float | None = None,
        turns: Iterable[tuple[str, str]] = (),
    ) -> AnswerRequest:
        """The first question of a conversation, or the next one after earlier ones.

        Args:
            images: what it is about.
            question: in words.
            params: how to answer.
            keep: whether its pages stay for a next question.
            began: when it was asked, in seconds of `perf_counter`; None: now.
            timeout: seconds from then until it is given up; None: never.
            turns: earlier questions and their answers, in words.

        Raises:
            ArgumentError: a timeout that is no time.
            PromptError: no question, or more tokens than the model reads.
            PagesExhausted: it would not fit into the pool even alone.
        """
        began = perf_counter() if began is None else began
        return self._request(self._text.first(images, question, turns), params, keep, began, timeout)

    def next(self, last: AnswerRequest, question: str, params: AnswerParams, timeout: float | None = None) -> AnswerRequest:
        """A question after a finished one. Errors as in `first`."""
        began, history = perf_counter(), last.history
        read = len(history) - len(last.prompt)
        return self._request(self._text.next(history, last.tokens[read:], question), params, True, began, timeout)

    def stream(self, request: AnswerRequest, pieces: Generator[str, None, None] | None = None) -> RequestStream[str, Answer]:
        """The answer in pieces, and at its end as a whole; `pieces` are those of the request if not given."""
        return RequestStream(request, self.pieces(request) if pieces is None else pieces, partial(self._answer, request))

    def pieces(self, request: AnswerRequest) -> Generator[str, None, None]:
        """The answer in pieces of whole characters, as they are found. Closing the iterator cancels the request."""
        text = self._text.stream()
        with self._runner.submitted([request]) as model:
            for count in range(1, request.limit + 1):
                self._runner.advance(model, request, count)
                if len(request.tokens) < count:
                    break
                if piece := text.push(request.tokens[count - 1]):
                    yield piece
            if rest := text.flush():
                yield rest

    def answers(self, requests: Sequence[AnswerRequest]) -> list[Answer]:
        """Run requests together to their ends."""
        with self._runner.submitted(requests) as model:
            for request in requests:
                self._runner.advance(model, request, request.limit)
        return [self._answer(request) for request in requests]

    def _request(
        self, prompt: TokenPrompt, params: AnswerParams, keep: bool, began: float, timeout: float | None
    ) -> AnswerRequest:
        params = within(params, self._context - len(prompt))
        request = AnswerRequest(prompt, params, keep, began, progress=Progress(timeout, began))
        self._runner.check(request)
        return request

    def _answer(self, request: AnswerRequest) -> Answer:
        assert request.finish is not None
        text = self._text.stream()
        return Answer(
            text="".join([*map(text.push, request.tokens), text.flush()]),
            token_ids=tuple(request.tokens),
            finish=request.finish,
            prompt_tokens=len(request.prompt),
            cached_tokens=request.cached,
            timings=tuple(request.timings),
            params=request.params,
        )
