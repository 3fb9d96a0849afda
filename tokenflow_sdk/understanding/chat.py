"""`Chat`: a conversation about some images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tokenflow_sdk.arguments import instance
from tokenflow_sdk.understanding.answering import Answer, Answering
from tokenflow_sdk.understanding.image_features import ImageInput
from tokenflow_sdk.understanding.params import AnswerParams
from tokenflow_sdk.understanding.token_loop import AnswerRequest

__all__ = ["Chat"]


class Chat:
    """A conversation about some images: each question is asked after all earlier ones and their answers.

    Make one with `Understander.chat`. The pages of earlier questions stay while the pool has room, and are computed again where
    it had not. One question at a time.
    """

    def __init__(self, answering: Answering, images: ImageInput | Sequence[ImageInput]) -> None:
        self._answering = instance("answering", answering, Answering, "Make chats with Understander.chat.")
        self._images = answering.images(images)
        self._last: AnswerRequest | None = None
        self.turns: list[tuple[str, str]] = []
        """Questions and answers so far."""

    def ask(
        self,
        question: str,
        *,
        max_tokens: int | None = None,
        temperature: float | None = None,
        seed: int | None = None,
        params: AnswerParams | None = None,
    ) -> Answer:
        """The next question. Arguments and errors as in `Understander.answer`."""
        request = self._request(question, AnswerParams.of(max_tokens, temperature, seed, params))
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
    ) -> Iterator[str]:
        """As `ask`, in pieces as in `Understander.stream`. A question whose answer is not read to its end was never asked."""
        request = self._request(question, AnswerParams.of(max_tokens, temperature, seed, params))
        return self._pieces(request, question)

    def _pieces(self, request: AnswerRequest, question: str) -> Iterator[str]:
        pieces = []
        for piece in self._answering.pieces(request):
            pieces.append(piece)
            yield piece
        self._remember(request, question, "".join(pieces))

    def _request(self, question: str, params: AnswerParams) -> AnswerRequest:
        if self._last is None:
            return self._answering.first(self._images, question, params, keep=True)
        return self._answering.next(self._last, question, params)

    def _remember(self, request: AnswerRequest, question: str, answer: str) -> None:
        self._last = request
        self.turns.append((question, answer))
