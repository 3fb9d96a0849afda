"""The tokenizer that a language model was exported with: finding it, and refusing another."""

from __future__ import annotations

import os
from pathlib import Path

from tokenflow_sdk.backends.base import SessionOptions
from tokenflow_sdk.backends.choice import EngineOptions
from tokenflow_sdk.bundle import Bundle
from tokenflow_sdk.config import GeneratorConfig, UnderstanderConfig
from tokenflow_sdk.errors import BundleNotFoundError, CodebookMismatchError
from tokenflow_sdk.tokenizer import Tokenizer

__all__ = ["require_tokenizer", "tokenizer_of"]


def tokenizer_of(
    bundle: Bundle[GeneratorConfig] | Bundle[UnderstanderConfig],
    tokenizer: Tokenizer | str | os.PathLike[str] | None,
    options: SessionOptions,
    wanted: EngineOptions | None = None,
) -> Tokenizer:
    """The tokenizer given, opened if it is a name; None looks where the bundle was exported with it.

    Raises:
        BundleNotFoundError: it is not there.
        BundleError: it cannot be used; see `tokenflow_sdk.errors`.
    """
    if isinstance(tokenizer, Tokenizer):
        return tokenizer
    path = tokenizer or bundle.path / bundle.config.tokenizer
    try:
        return Tokenizer.open(path, options, wanted or EngineOptions())
    except BundleNotFoundError as error:
        raise BundleNotFoundError(
            f"The tokenizer of {bundle.path} is not at {path}.",
            f"Give tokenizer=, the path of its {bundle.config.tokenizer_variant} bundle.",
        ) from error


def require_tokenizer(tokenizer: Tokenizer, config: GeneratorConfig | UnderstanderConfig, path: Path) -> None:
    """Check that a tokenizer has the codebook and the scales of the model at `path`.

    Raises:
        CodebookMismatchError: it has others.
    """
    if tokenizer.config.codebook_sha256 != config.codebook_sha256 or tokenizer.config.patch_nums != config.patch_nums:
        raise CodebookMismatchError(
            f"{path} works with codes of {config.tokenizer_variant} (codebook {config.codebook_sha256[:16]}), not of "
            f"{tokenizer.config.variant} (codebook {tokenizer.config.codebook_sha256[:16]}).",
            "Give tokenizer=, the bundle that the model was exported with.",
        )
