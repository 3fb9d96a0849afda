"""Reads the text tokenizer of a released directory, and leaves the image tokens out for text-to-image models."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenflow_sdk.errors import CheckpointError, MissingPackageError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["load_tokenizer", "prompt_tokenizer"]

_JSON, _CONVERTIBLE = "tokenizer.json", ("tokenizer.model", "vocab.json")


def prompt_tokenizer(directory: Path, codebook_size: int) -> tuple[dict[str, Any], int, tuple[int, ...]]:
    """Make the tokenizer for prompts, from which image and control tokens are removed so that no prompt can contain them.

    Returns:
        The content of its tokenizer.json, the id of the first image token, and the ids of `<img>`.

    Raises:
        CheckpointError: the tokenizer files are missing or damaged, or have no image tokens.
        MissingPackageError: tokenizer.json has to be converted from another file, and a package for that is not installed.
    """
    tokenizer = load_tokenizer(directory)
    first, last = tokenizer.token_to_id("<vq_token_0>"), tokenizer.token_to_id(f"<vq_token_{codebook_size - 1}>")
    start = tokenizer.encode("<img>", add_special_tokens=False).ids
    if first is None or last != first + codebook_size - 1 or not start:
        raise CheckpointError(
            f"The tokenizer in {directory} has no {codebook_size} consecutive <vq_token_...>s and an <img>.",
            "Give a text-to-image directory, and the tokenizer bundle it was trained with.",
        )
    text = json.loads(tokenizer.to_str())
    text["added_tokens"] = [token for token in text["added_tokens"] if token["id"] < first]
    return text, first, tuple(start)


def load_tokenizer(directory: Path) -> Tokenizer:
    """Read tokenizer.json, or convert the files that released directories have instead. Raises what `prompt_tokenizer` does."""
    from tokenizers import Tokenizer

    sources = [name for name in _CONVERTIBLE if (directory / name).is_file()]
    if sources and not (directory / _JSON).exists():
        with tempfile.TemporaryDirectory() as converted:
            _convert(directory, sources[0], Path(converted))
            return Tokenizer.from_file(str(Path(converted) / _JSON))
    try:
        return Tokenizer.from_file(str(directory / _JSON))
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(
            f"{directory / _JSON} cannot be read: {error}.", "Download it again, or tokenizer.model with its configs."
        ) from error


def _convert(directory: Path, source: str, out: Path) -> None:
    """Write a tokenizer.json for a directory that has only a SentencePiece model, or only a vocabulary and merges."""
    try:
        import sentencepiece  # noqa: F401  (transformers reads the model with it)
        from transformers import AutoTokenizer
    except ImportError as error:
        raise MissingPackageError(
            f"{directory} has a {source} and no {_JSON}; converting it needs transformers and sentencepiece.",
            "Run `pip install transformers sentencepiece`.",
        ) from error
    try:
        AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False).save_pretrained(out)
    except Exception as error:  # for damaged files, transformers and sentencepiece raise many kinds
        raise CheckpointError(
            f"{directory / source} cannot be converted: {str(error).splitlines()[0]}.",
            "Download the directory's tokenizer files again.",
        ) from error
