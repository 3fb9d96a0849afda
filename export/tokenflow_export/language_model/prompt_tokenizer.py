"""Reads the text tokenizer of a released directory, and leaves the image tokens out for text-to-image models."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenflow_export.language_model.tokenizer_files import bos_id, read_settings, require_agreement, require_rows
from tokenflow_sdk.errors import CheckpointError, MissingPackageError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["PromptTokenizer", "load_tokenizer", "prompt_tokenizer"]

_JSON, _CONVERTIBLE = "tokenizer.json", ("tokenizer.model", "vocab.json")
_CLASSES = ("LlamaTokenizer", "LlamaTokenizerFast", "Qwen2Tokenizer", "Qwen2TokenizerFast")
"""Whose files are converted. Without a class transformers chooses by the model, and knows no tokenizer of LLaVA's."""
_PADDED = (8, 16, 32, 64, 128, 256)
"""Multiples to which training scripts pad embedding tables."""


@dataclass(frozen=True)
class PromptTokenizer:
    """The tokenizer for prompts, in which no image and control tokens are, so that no prompt can contain them.

    Args:
        content: of its tokenizer.json.
        image_token_start: id of the first image token.
        image_start_ids: ids of `<img>`.
        bos_id: id that begins every prompt.
    """

    content: dict[str, Any]
    image_token_start: int
    image_start_ids: tuple[int, ...]
    bos_id: int


def prompt_tokenizer(directory: Path, codebook_size: int, rows: int, config: dict[str, Any]) -> PromptTokenizer:
    """Make the tokenizer for prompts of a text-to-image directory.

    Args:
        directory: the released directory.
        codebook_size: number of image tokens.
        rows: of the embedding table.
        config: config.json.

    Raises:
        CheckpointError: the tokenizer files are missing or damaged, have no image tokens, or are not those of the table.
        MissingPackageError: tokenizer.json has to be converted from another file, and a package for that is not installed.
    """
    tokenizer = load_tokenizer(directory)
    first = tokenizer.token_to_id("<vq_token_0>")
    start = tuple(tokenizer.encode("<img>", add_special_tokens=False).ids)
    ids = [tokenizer.token_to_id(f"<vq_token_{i}>") for i in range(codebook_size)]
    if first is None or ids != list(range(first, first + codebook_size)) or not start:
        raise CheckpointError(
            f"The tokenizer in {directory} has no {codebook_size} consecutive <vq_token_...>s and an <img>.",
            "Give a text-to-image directory, and the tokenizer bundle it was trained with.",
        )
    require_rows(tokenizer, rows, directory)
    size, bos = tokenizer.get_vocab_size(), bos_id(tokenizer, config, directory)
    if rows != size and rows not in (-(-size // multiple) * multiple for multiple in _PADDED):
        raise CheckpointError(
            f"The tokenizer in {directory} has {size} tokens, and the embedding table {rows} rows, so image tokens moved.",
            "Give the tokenizer files that the model was trained with.",
        )
    if bos >= first or tokenizer.get_vocab_size(with_added_tokens=False) > first:
        raise CheckpointError(
            f"The tokenizer in {directory} has text tokens after <vq_token_0>, id {first}.",
            "Give a released text-to-image model.",
        )
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] < first]
    return PromptTokenizer(content, first, start, bos)


def load_tokenizer(directory: Path) -> Tokenizer:
    """Read tokenizer.json, or convert the files that released directories have instead. Raises what `prompt_tokenizer` does."""
    tokenizer = _read(directory)
    # transformers leaves those of its last call in the file. They would cut system prompts, and fill up what is shorter.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if getattr(tokenizer.model, "dropout", None):
        raise CheckpointError(
            f"{directory / _JSON} has a dropout of {tokenizer.model.dropout}, which makes ids random.",
            'Set "dropout" to null there.',
        )
    require_agreement(tokenizer, directory)
    return tokenizer


def _read(directory: Path) -> Tokenizer:
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
    kind = read_settings(directory).get("tokenizer_class")
    if kind not in _CLASSES:
        raise CheckpointError(
            f"{directory} has a {source} and no {_JSON}, and its tokenizer_config.json gives tokenizer_class as {kind!r}; "
            f"converted are {', '.join(_CLASSES)}.",
            "Download the directory's tokenizer_config.json, or a tokenizer.json.",
        )
    try:
        AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False).save_pretrained(out)
    except Exception as error:  # for damaged files, transformers and sentencepiece raise many kinds
        raise CheckpointError(
            f"{directory / source} cannot be converted: {str(error).splitlines()[0]}.",
            "Download the directory's tokenizer files again.",
        ) from error
