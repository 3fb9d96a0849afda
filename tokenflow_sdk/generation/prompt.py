"""Prompts to token ids, with the bundle's `tokenizer.json`."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenflow_sdk.arguments import flag, shown
from tokenflow_sdk.bundle.model_config import GeneratorConfig
from tokenflow_sdk.bundle.text_tokenizer import load_text_tokenizer, require_unicode
from tokenflow_sdk.errors import CorruptBundleError, PromptError

__all__ = ["Prompt", "PromptEncoder"]

Prompt = str | Sequence[int]
"""Text, or its token ids without BOS."""


class PromptEncoder:
    """Turns prompts into ids that the model accepts.

    Args:
        path: the bundle's `tokenizer.json`.
        config: says which ids are text.
    """

    def __init__(self, path: Path, config: GeneratorConfig) -> None:
        self._path = path
        self._config = config
        self._tokenizer: Any = None

    def encode(self, prompt: Prompt, strict: bool = False, name: str = "prompt") -> tuple[int, ...]:
        """Ids of a prompt without BOS, at most `max_prompt` with it.

        Args:
            prompt: text or ids.
            strict: refuse a prompt that is too long instead of cutting it with a warning.
            name: what it is called in errors.

        Raises:
            PromptError: empty, not text, too long (`strict`), or ids outside the text vocabulary.
            CorruptBundleError: text, and the bundle's `tokenizer.json` is damaged.
        MissingPackageError: text without the `tokenizers` package.
        """
        strict = flag("strict", strict)
        ids = self._ids_of_text(prompt, name) if isinstance(prompt, str) else self._checked(prompt, name)
        limit = self._config.max_prompt - 1
        if len(ids) > limit:
            problem = f"The {name} has {len(ids)} tokens; this model reads {limit}."
            if strict:
                raise PromptError(problem, "Shorten it, or give strict=False to cut it there.")
            warnings.warn(f"{problem} It is cut there.", stacklevel=4)
        return ids[:limit]

    def _ids_of_text(self, text: str, name: str) -> tuple[int, ...]:
        if not text.strip():
            raise PromptError(f"The {name} is empty.", "Describe the picture in a few words, or leave a negative prompt out.")
        require_unicode(text)
        if self._tokenizer is None:
            self._tokenizer = load_text_tokenizer(self._path)
        ids = tuple(self._tokenizer.encode(text, add_special_tokens=False).ids)
        if not all(map(self._config.is_text, ids)):
            raise CorruptBundleError(
                f"{self._path} gives tokens that the model does not know.", "Export the bundle again, or give token ids."
            )
        return ids

    def _checked(self, ids: Sequence[int], name: str) -> tuple[int, ...]:
        c = self._config
        try:
            if isinstance(ids, (bytes, bytearray, memoryview)):
                raise TypeError
            found = tuple(map(operator.index, ids))
        except (TypeError, ValueError):
            raise PromptError(
                f"The {name} is {type(ids).__name__}, neither text nor a list of token ids.",
                "Give a string, or a list of integers; for several prompts use generate_batch.",
            ) from None
        if not found:
            raise PromptError(f"The {name} has no tokens.", "Give text, or at least one token id.")
        wrong = [i for i in found if not c.is_text(i)]
        if wrong:
            raise PromptError(f"Token id {shown(wrong[0])} is not text.", f"Text ids are 0 .. {c.image_token_start - 1}.")
        return found
