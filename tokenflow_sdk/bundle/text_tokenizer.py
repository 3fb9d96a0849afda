"""Load a bundle's text tokenizer with the Hugging Face `tokenizers` library."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tokenflow_sdk.errors import CorruptBundleError, MissingPackageError, PromptError
from tokenflow_sdk.files import read_regular, reason

__all__ = ["TextTokenizer", "load_text_tokenizer", "require_unicode"]

_MOST_BYTES = 2**28
_AGAIN = "Export the bundle again with `tokenflow export`, or fetch it again."


class TextTokenizer:
    """A `tokenizers.Tokenizer` whose failures are those of its file. Methods are the library's.

    Raises:
        CorruptBundleError: by every method, if the library fails on what is in the file.
    """

    def __init__(self, path: Path, tokenizer: Any) -> None:
        self._path, self._tokenizer = path, tokenizer

    def encode(self, text: str, add_special_tokens: bool = True) -> Any:
        return _translated(self._path, lambda: self._tokenizer.encode(text, add_special_tokens=add_special_tokens))

    def decode(self, ids: Sequence[int]) -> str:
        return str(_translated(self._path, lambda: self._tokenizer.decode(ids)))

    def id_to_token(self, token: int) -> str | None:
        found: str | None = _translated(self._path, lambda: self._tokenizer.id_to_token(token))
        return found

    def get_added_tokens_decoder(self) -> dict[int, Any]:
        return dict(_translated(self._path, self._tokenizer.get_added_tokens_decoder))


def load_text_tokenizer(path: Path) -> TextTokenizer:
    """Load a bundle's `tokenizer.json` for text of users: names of control tokens in it are encoded as ordinary text.

    Args:
        path: the file.

    Raises:
        MissingPackageError: the package `tokenizers` is not installed.
        CorruptBundleError: the file cannot be read.
    """
    try:
        tokenizers = importlib.import_module("tokenizers")
    except ImportError:
        raise MissingPackageError(
            "Prompts as text need the tokenizers package.", "Run `pip install 'tokenflow-sdk[generate]'`, or give token ids."
        ) from None
    try:
        content = read_regular(path, _MOST_BYTES)
    except (OSError, ValueError) as error:
        raise CorruptBundleError(f"{path} cannot be read: {reason(error)}.", _AGAIN) from error
    tokenizer = _translated(path, lambda: tokenizers.Tokenizer.from_buffer(content))
    tokenizer.encode_special_tokens = True
    return TextTokenizer(path, tokenizer)


def _translated(path: Path, call: Callable[[], Any]) -> Any:
    """The result of a call of the library, which raises bare Exception, and for its own bugs a BaseException of pyo3."""
    try:
        return call()
    except BaseException as error:
        if type(error) not in (Exception, ValueError, TypeError, OverflowError) and type(error).__module__ != "pyo3_runtime":
            raise
        raise CorruptBundleError(f"{path} cannot be read: {error}.", _AGAIN) from error


def require_unicode(text: str) -> str:
    """The text, if it can be encoded.

    Raises:
        PromptError: it holds a lone surrogate, which a command line gives for a byte that is not UTF-8.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PromptError(f"{text!r} is no text: its character {error.start} is half of one.", "Give it in UTF-8.") from None
    return text
