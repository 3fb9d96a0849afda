"""Conversations to token ids, and token ids to text, with the bundle's chat template and `tokenizer.json`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tokenflow_sdk.arguments import shown
from tokenflow_sdk.bundle.model_config import ChatTemplate
from tokenflow_sdk.bundle.text_tokenizer import load_text_tokenizer, require_unicode
from tokenflow_sdk.errors import CorruptBundleError, PromptError
from tokenflow_sdk.understanding.prompt import Block, ImageBlock, TokenPrompt

__all__ = ["ChatText", "TextStream"]

_INCOMPLETE = "\ufffd"
"""What the bytes of an incomplete character decode to."""


_HELD = 64
"""Tokens that wait for an incomplete character at most. A character has 4 bytes at most, so these are no text."""


class TextStream:
    """Decodes an answer token by token into pieces of whole characters. The pieces together are the answer's text.

    Bytes that never become a character are given as U+FFFD once 64 tokens wait, so memory and time for a token are bounded.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._hidden = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        self._ids: list[int] = []
        self._given = 0
        """How many of `_ids` were given: the tokens of the last piece."""

    def push(self, token: int) -> str:
        """The text that `token` completes; empty while a character is incomplete."""
        # The tokenizer leaves out tokens without text before it decodes, so that the next one keeps its leading space.
        if token in self._hidden or self._tokenizer.id_to_token(token) is None:
            return ""
        self._ids.append(token)
        piece = self._text(len(self._ids))
        if not piece.endswith(_INCOMPLETE):
            return self._give(piece, len(self._ids))
        if len(self._ids) - self._given < _HELD:
            return ""
        # Later tokens may complete the last 3 bytes. The rest is given if it ends between two characters.
        ends = range(len(self._ids) - 3, self._given, -1)
        end = next((end for end in ends if piece.startswith(self._text(end))), len(self._ids))
        return self._give(self._text(end), end)

    def flush(self) -> str:
        """The rest at the end: bytes of an incomplete character, as U+FFFD."""
        return self._give(self._text(len(self._ids)), len(self._ids))

    def _text(self, end: int) -> str:
        """The text up to a token, without what was given. Both are decoded: the first token may lose its leading space."""
        given: str = self._tokenizer.decode(self._ids[: self._given])
        everything: str = self._tokenizer.decode(self._ids[:end])
        return everything[len(given) :]

    def _give(self, piece: str, end: int) -> str:
        """Note that `piece` is given, and forget the tokens of the piece before it."""
        self._ids, self._given = self._ids[self._given :], end - self._given
        return piece


class ChatText:
    """Writes conversations in a model's chat template.

    Questions are plain text: the name of a control token in a question is encoded as ordinary text.

    Args:
        path: the bundle's `tokenizer.json`, read when it is first needed.
        template: the model's chat template.
        vocabulary: number of tokens that the model knows; None: any number.
    """

    def __init__(self, path: Path, template: ChatTemplate, vocabulary: int | None = None) -> None:
        self._path = path
        self._template = template
        self._vocabulary = vocabulary
        self._loaded: Any = None

    @property
    def _tokenizer(self) -> Any:
        if self._loaded is None:
            self._loaded = load_text_tokenizer(self._path)
        return self._loaded

    def stream(self) -> TextStream:
        """A decoder for one answer."""
        return TextStream(self._tokenizer)

    def first(self, images: Sequence[ImageBlock], question: str, turns: Iterable[tuple[str, str]] = ()) -> TokenPrompt:
        """The first question of a conversation, or the next one after earlier questions and answers in words.

        Its prefixes up to each image may be shared with other prompts.

        Raises:
            PromptError: a question is empty, or a question or an answer is no text.
            CorruptBundleError: `tokenizer.json` is damaged.
            MissingPackageError: the `tokenizers` package is not installed.
        """
        t = self._template
        blocks: list[Block] = []
        parts: list[int | str] = [*t.opening, *t.user]
        for image in images:
            blocks += [self._ids(parts), image]
            parts = list(t.after_image)
        said: list[int] = []
        for asked, answered in turns:
            # An answer is tokenized by itself: it was generated, not written on from the text before it.
            said += [*self._ids([*parts, _checked(asked), *t.assistant]), *self._ids([_checked_answer(answered)])]
            parts = [*t.closing, *t.user]
        blocks.append((*said, *self._ids([*parts, _checked(question), *t.assistant])))
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
        if self._vocabulary is not None and max(ids, default=0) >= self._vocabulary:
            raise CorruptBundleError(f"{self._path} gives tokens that the model does not know.", "Export the bundle again.")
        return tuple(ids)


def _checked_answer(answer: str) -> str:
    if not isinstance(answer, str):
        raise PromptError(f"{shown(answer)} is no answer.", "Give turns as pairs of a question and an answer, in words.")
    return require_unicode(answer)


def _checked(question: str) -> str:
    if not isinstance(question, str) or not question.strip():
        raise PromptError(f"{shown(question)} is no question.", "Ask something about the picture, in words.")
    return require_unicode(question)
