"""From questions about images to answers: what `Understander` and `Chat` share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Literal

from tokenflow_sdk.request_runner import RequestRunner
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

    def images(self, images: ImageInput | Sequence[ImageInput]) -> list[ImageBlock]:
        """The features of one image, or of several in a list. Errors as in `ImageFeatures.of_all`."""
        return self._features.of_all(images)

    def first(
        self, images: Sequence[ImageBlock], question: str, params: AnswerParams, keep: bool, began: float | None = None
    ) -> AnswerRequest:
        """The first question of a conversation.

        Args:
            images: what it is about.
            question: in words.
            params: how to answer.
            keep: whether its pages stay for a next question.
            began: when it was asked, in seconds of `perf_counter`; None: now.

        Raises:
            PromptError: no question, or more tokens than the model reads.
            PagesExhausted: it would not fit into the pool even alone.
        """
        return self._request(self._text.first(images, question), params, keep, perf_counter() if began is None else began)

    def next(self, last: AnswerRequest, question: str, params: AnswerParams) -> AnswerRequest:
        """A question after a finished one. Errors as in `first`."""
        began, history = perf_counter(), last.history
        read = len(history) - len(last.prompt)
        return self._request(self._text.next(history, last.tokens[read:], question), params, True, began)

    def pieces(self, request: AnswerRequest) -> Iterator[str]:
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

    def _request(self, prompt: TokenPrompt, params: AnswerParams, keep: bool, began: float) -> AnswerRequest:
        request = AnswerRequest(prompt, within(params, self._context - len(prompt)), keep, began)
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
