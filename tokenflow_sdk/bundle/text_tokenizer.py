"""Load a bundle's text tokenizer with the Hugging Face `tokenizers` library."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from tokenflow_sdk.errors import CorruptBundleError, MissingPackageError, PromptError

__all__ = ["load_text_tokenizer", "require_unicode"]


def load_text_tokenizer(path: Path) -> Any:
    """Load a bundle's `tokenizer.json` for text of users: names of control tokens in it are encoded as ordinary text.

    Args:
        path: the file.

    Returns:
        A `tokenizers.Tokenizer`.

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
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise CorruptBundleError(f"{path} cannot be read: {error}.", "Export the bundle again.") from error
    tokenizer.encode_special_tokens = True
    # Of bundles exported before these were left out; they would cut prompts, and fill up what is shorter.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


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
