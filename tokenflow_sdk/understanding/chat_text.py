"""Conversations to token ids, and token ids to text, with the bundle's chat template and `tokenizer.json`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tokenflow_sdk.bundle.model_config import ChatTemplate
from tokenflow_sdk.bundle.text_tokenizer import load_text_tokenizer
from tokenflow_sdk.errors import PromptError
from tokenflow_sdk.understanding.prompt import Block, ImageBlock, TokenPrompt

__all__ = ["ChatText", "TextStream"]

_INCOMPLETE = "\ufffd"
"""What the bytes of an incomplete character decode to."""


class TextStream:
    """Decodes an answer token by token into pieces of whole characters. The pieces together are the answer's text."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._context = self._given = 0

    def push(self, token: int) -> str:
        """The text that `token` completes; empty while a character is incomplete."""
        self._ids.append(token)
        piece = self._rest()
        if piece.endswith(_INCOMPLETE):
            return ""
        # The piece before is decoded again, because the first token of a decoded text may lose its leading space.
        self._context, self._given = self._given, len(self._ids)
        return piece

    def flush(self) -> str:
        """The rest at the end: bytes of an incomplete character, as U+FFFD."""
        piece, self._given = self._rest(), len(self._ids)
        return piece

    def _rest(self) -> str:
        given: str = self._tokenizer.decode(self._ids[self._context : self._given])
        everything: str = self._tokenizer.decode(self._ids[self._context :])
        return everything[len(given) :]


class ChatText:
    """Writes conversations in a model's chat template.

    Questions are plain text: the name of a control token in a question is encoded as ordinary text.

    Args:
        path: the bundle's `tokenizer.json`, read when it is first needed.
        template: the model's chat template.
    """

    def __init__(self, path: Path, template: ChatTemplate) -> None:
        self._path = path
        self._template = template
        self._loaded: Any = None

    @property
    def _tokenizer(self) -> Any:
        if self._loaded is None:
            loaded = load_text_tokenizer(self._path)
            loaded.encode_special_tokens = True
            self._loaded = loaded
        return self._loaded

    def stream(self) -> TextStream:
        """A decoder for one answer."""
        return TextStream(self._tokenizer)

    def first(self, images: Sequence[ImageBlock], question: str) -> TokenPrompt:
        """The first question of a conversation. Its prefixes up to each image may be shared with other prompts.

        Raises:
            PromptError: the question is empty or no text.
            MissingPackageError: the `tokenizers` package is not installed.
        """
        t = self._template
        blocks: list[Block] = []
        parts: list[int | str] = [*t.opening, *t.user]
        for image in images:
            blocks += [self._ids(parts), image]
            parts = list(t.after_image)
        blocks.append(self._ids([*parts, _checked(question), *t.assistant]))
        return TokenPrompt(tuple(blocks), tuple(range(2, len(blocks), 2)))

    def next(self, history: TokenPrompt, unread: Sequence[int], question: str) -> TokenPrompt:
        """A later question, after `unread`, the tokens of the last answer that were never run. Errors as in `first`."""
        t = self._template
        asked = self._ids([*t.closing, *t.user, _checked(question), *t.assistant])
        return history.followed_by([*unread, *asked], shared=False)

    def _ids(self, parts: Iterable[int | str]) -> tuple[int, ...]:
        """Token ids of a template's parts; neighbouring texts are tokenized as one, as in the released code."""
        ids: list[int] = []
        text = ""
        for part in (*parts, -1):
            if isinstance(part, str):
                text += part
                continue
            ids += self._tokenizer.encode(text, add_special_tokens=False).ids if text else []
            ids += [part] if part >= 0 else []
            text = ""
        return tuple(ids)


def _checked(question: str) -> str:
    if not isinstance(question, str) or not question.strip():
        raise PromptError(f"{question!r} is no question.", "Ask something about the picture, in words.")
    return question
