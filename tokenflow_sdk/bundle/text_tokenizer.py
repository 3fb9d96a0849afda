"""Load a bundle's text tokenizer with the Hugging Face `tokenizers` library."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from tokenflow_sdk.errors import CorruptBundleError, MissingPackageError

__all__ = ["load_text_tokenizer"]


def load_text_tokenizer(path: Path) -> Any:
    """Load a bundle's `tokenizer.json`.

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
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise CorruptBundleError(f"{path} cannot be read: {error}.", "Export the bundle again.") from error
