"""`Answering` without a model: the real scheduler and loop on fake graphs, and letters for tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import cast

import numpy as np

from tests.support.fake_graphs import UNDERSTANDER, understander_graphs
from tokenflow_sdk.loaded_model import LoadedModel
from tokenflow_sdk.model.transformer import PagedTransformer
from tokenflow_sdk.request_runner import RequestRunner
from tokenflow_sdk.understanding.answering import Answering
from tokenflow_sdk.understanding.chat_text import ChatText
from tokenflow_sdk.understanding.image_features import ImageFeatures
from tokenflow_sdk.understanding.prompt import ImageBlock, TokenPrompt
from tokenflow_sdk.understanding.scheduler import TokenScheduler
from tokenflow_sdk.understanding.token_loop import AnswerRequest, TokenLoop

HALF = 6
"""A token that is the first half of a character; the next one completes it."""


class FakeImages:
    """Images are numbers."""

    def of_all(self, images: int | Sequence[int], *_: object) -> list[ImageBlock]:
        numbers = [images] if isinstance(images, int) else images
        return [ImageBlock(np.full((4, UNDERSTANDER.code_dim), number, np.float32)) for number in numbers]


class FakeStream:
    """Token 1 is `b`, 2 is `c`, and so on; the token after HALF is a capital letter."""

    def __init__(self) -> None:
        self.held = False

    def push(self, token: int) -> str:
        held, self.held = self.held, token == HALF
        letter = "" if self.held else "abcdefgh"[token]
        return letter.upper() if held else letter

    def flush(self) -> str:
        return "?" if self.held else ""


class FakeText:
    """A question has as many tokens as letters, all of them 3; what an answer left unread comes before it."""

    def first(self, images: Sequence[ImageBlock], question: str, turns: Iterable[tuple[str, str]] = ()) -> TokenPrompt:
        before = (4,) * sum(len(asked) + len(answered) for asked, answered in turns)
        return TokenPrompt((*images, (*before, *(3,) * len(question))), (len(images),))

    def next(self, history: TokenPrompt, unread: Sequence[int], question: str) -> TokenPrompt:
        return history.followed_by([*unread, *(3,) * len(question)], shared=False)

    def stream(self) -> FakeStream:
        return FakeStream()


class FakeAnswering(Answering):
    """The head gives `tokens`, round robin."""

    def __init__(self, tokens: Sequence[int] = (1, 2), pages: int = 100, page_size: int = 4) -> None:
        graphs = understander_graphs(tokens=tokens)
        transformer = PagedTransformer.of(UNDERSTANDER, graphs["transformer"], pages, page_size)
        self.scheduler = TokenScheduler(TokenLoop(UNDERSTANDER, graphs, transformer))
        model: LoadedModel[AnswerRequest] = LoadedModel(graphs, transformer, self.scheduler)
        self.runner = RequestRunner("Understander", model)
        super().__init__(cast(ImageFeatures, FakeImages()), cast(ChatText, FakeText()), self.runner, UNDERSTANDER.context)

    def is_clean(self) -> bool:
        """Only the prefix cache holds pages."""
        pool = self.scheduler.loop.transformer.pool
        cached = {page for table in self.scheduler.cache._tables.values() for page in table.pages}
        return not self.scheduler._live and not self.scheduler._waiting and pool.free == pool.pages - len(cached)
