"""`Chat`: a conversation about some images."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn

from tokenflow_sdk.arguments import instance, items
from tokenflow_sdk.errors import ArgumentError
from tokenflow_sdk.pictures.preparation import Color, Preprocess
from tokenflow_sdk.request_runner import RequestStream
from tokenflow_sdk.understanding.answering import Answer, Answering
from tokenflow_sdk.understanding.image_features import ImageInput
from tokenflow_sdk.understanding.params import AnswerParams
from tokenflow_sdk.understanding.token_loop import AnswerRequest

__all__ = ["Chat"]


class Chat:
    """A conversation about some images: each question is asked after all earlier ones and their answers.

    Make one with `Understander.chat`. The pages of earlier questions stay while the pool has room, and are computed again where
    it had not. One question at a time, whichever thread asks it.
    """

    def __init__(
        self,
        answering: Answering,
        images: ImageInput | Sequence[ImageInput],
        preprocess: Preprocess | None = None,
        color: Color = "srgb",
        turns: Iterable[tuple[str, str]] = (),
    ) -> None:
        hint = "Give turns=[(question, answer), ...]."
        pairs = [tuple(items("turns", pair, hint)) for pair in items("turns", turns, hint)]
        if not all(len(pair) == 2 for pair in pairs):
            raise ArgumentError("A turn is a question and its answer.", hint)
        self._answering = instance("answering", answering, Answering, "Make chats with Understander.chat.")
        self._images = answering.images(images, preprocess, color)
        self._last: AnswerRequest | None = None
        self._asked: dict[str, object] = {}
        self.turns: list[tuple[str, str]] = [(question, answer) for question, answer in pairs]
        """Questions and answers so far."""

    def __reduce__(self) -> NoReturn:
        raise ArgumentError(
            "A Chat stays with the model whose pages it uses, so it cannot be copied or pickled.",
            "Send its `turns` and the images, and ask there.",
        )

    def ask(
        self,
        question: str,
        *,
        max_tokens: int | None = None,
        temperature: float | None = None,
        seed: int | None = None,
        params: AnswerParams | None = None,
        timeout: float | None = None,
    ) -> Answer:
        """The next question. Arguments and errors as in `Understander.answer`.

        Raises:
            ArgumentError: another question of this chat is being answered.
        """
        settings = AnswerParams.of(max_tokens, temperature, seed, params)
        with self._asking():
            request = self._request(question, settings, timeout)
            (answer,) = self._answering.answers([request])
            self._remember(request, question, answer.text)
        return answer

    def stream(
        self,
        question: str,
        *,
        max_tokens: int | None = None,
        temperature: float | None = None,
        seed: int | None = None,
        params: AnswerParams | None = None,
        timeout: float | None = None,
    ) -> RequestStream[str, Answer]:
        """As `ask`, in pieces as in `Understander.stream`. A question whose answer is not read to its end was never asked."""
        request = self._request(question, AnswerParams.of(max_tokens, temperature, seed, params), timeout)
        return self._answering.stream(request, self._pieces(request, question, self._last))

    def _pieces(self, request: AnswerRequest, question: str, last: AnswerRequest | None) -> Generator[str, None, None]:
        with self._asking():
            if self._last is not last:
                raise ArgumentError("The chat went on after this stream was made.", "Ask the question again.")
            pieces = []
            for piece in self._answering.pieces(request):
                pieces.append(piece)
                yield piece
            self._remember(request, question, "".join(pieces))

    @contextmanager
    def _asking(self) -> Iterator[None]:
        """Keep other questions out until this one is answered or given up: each is asked after all before it."""
        own = object()
        try:
            # One step, which no other thread and no signal can come between.
            if self._asked.setdefault("now", own) is not own:
                raise ArgumentError(
                    "This chat is answering another question.",
                    "Wait for its answer, or close its stream; for several at once make a chat for each.",
                )
            yield
        finally:
            if self._asked.get("now") is own:
                del self._asked["now"]

    def _request(self, question: str, params: AnswerParams, timeout: float | None) -> AnswerRequest:
        if self._last is None:
            return self._answering.first(self._images, question, params, keep=True, timeout=timeout, turns=self.turns)
        return self._answering.next(self._last, question, params, timeout)

    def _remember(self, request: AnswerRequest, question: str, answer: str) -> None:
        self._last = request
        self.turns.append((question, answer))
