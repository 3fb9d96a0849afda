"""Checks that tokenizer.json, the files beside it and the embedding table agree, so that a prompt gets the ids of training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenflow_export.checkpoints.hf_directory import read_json
from tokenflow_sdk.errors import CheckpointError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["bos_id", "read_settings", "require_agreement", "require_rows", "special_token"]

_JSON, _CONFIG, _TOKENS, _ADDED = "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"

_USED = frozenset(("add_bos_token", "add_prefix_space", "added_tokens_decoder", "bos_token", "chat_template", "eos_token"))
_FIXED: dict[str, tuple[object, ...]] = {
    "add_eos_token": (False,),
    "sp_model_kwargs": ({},),
    "split_special_tokens": (False,),
}
"""Keys that would change ids, with the values under which they do not."""
_HARMLESS = frozenset(
    (
        # names of tokens that tokenizer.json has, or that no prompt holds
        "additional_special_tokens", "cls_token", "extra_special_tokens", "mask_token", "model_specific_special_tokens",
        "pad_token", "sep_token", "unk_token",
        # of calls that pad or cut; the SDK does neither
        "max_length", "model_input_names", "model_max_length", "pad_to_multiple_of", "pad_token_type_id", "padding",
        "padding_side", "stride", "truncation", "truncation_side", "truncation_strategy",
        # how Python finds or makes the tokenizer; what is made of it is in tokenizer.json
        "backend", "device_map", "from_slow", "is_local", "legacy", "local_files_only", "name_or_path", "processor_class",
        "special_tokens_map_file", "tokenizer_class", "tokenizer_file", "trust_remote_code", "use_fast", "vocab_file",
        "transformers_version",
        # how ids become text: bytes that are no text, and spaces before punctuation and between control tokens
        "clean_up_tokenization_spaces", "errors", "spaces_between_special_tokens",
        # of Llama-2's own chat template, which is compared as a whole
        "use_default_system_prompt",
    )
)  # fmt: skip


def read_settings(directory: Path) -> dict[str, Any]:
    """tokenizer_config.json, with the special tokens of special_tokens_map.json where it names none; either may be missing.

    What is null is left out, as transformers does not tell it from what is absent.

    Raises:
        CheckpointError: a file is damaged.
    """
    files = [read_json(directory / name) if (directory / name).is_file() else {} for name in (_TOKENS, _CONFIG)]
    settings = {key: files[0].get(key) for key in ("bos_token", "eos_token")} | files[1]
    return {key: value for key, value in settings.items() if value is not None}


def special_token(settings: dict[str, Any], name: str) -> str | None:
    """The text of a special token, e.g. `bos_token`; None if the settings name none."""
    value = settings.get(name)
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None


def require_agreement(tokenizer: Tokenizer, directory: Path) -> None:
    """Check that the files beside tokenizer.json say nothing else than it, or what changes no ids.

    Raises:
        CheckpointError: they name other tokens, or have a key that would change ids or is not known.
    """
    settings = read_settings(directory)
    for key, value in settings.items():
        if key not in _USED | _HARMLESS and not any(value is ok or value == ok for ok in _FIXED.get(key, ())):
            raise CheckpointError(
                f"{directory / _CONFIG} gives {key} as {value!r}, which this exporter does not apply.",
                "If it changes no token ids, delete it there.",
            )
    _require_tokens(tokenizer, directory, settings)
    prefix = settings.get("add_prefix_space")
    first = tokenizer.encode("a", add_special_tokens=False).tokens[:1]
    if prefix is not None and bool(prefix) != (bool(first) and first[0][:1] in ("▁", "Ġ")):
        raise CheckpointError(
            f"{directory / _CONFIG} gives add_prefix_space as {prefix!r}, and tokenizer.json does otherwise.",
            "Save the tokenizer again with transformers, or delete the key there.",
        )


def _require_tokens(tokenizer: Tokenizer, directory: Path, settings: dict[str, Any]) -> None:
    """Check that tokens which other files add are those of tokenizer.json."""
    special = {i: token.special for i, token in tokenizer.get_added_tokens_decoder().items()}
    added = read_json(directory / _ADDED) if (directory / _ADDED).is_file() else {}
    listed: list[tuple[str, Any, Any, Any]] = [(_ADDED, text, i, None) for text, i in added.items()]
    # The tokenizers library passes over the ids in its own file where they do not follow each other.
    own = read_json(directory / _JSON) if (directory / _JSON).is_file() else {}
    listed += [(_JSON, token["content"], token["id"], None) for token in own.get("added_tokens", ())]
    decoder = settings.get("added_tokens_decoder") or {}
    if not isinstance(decoder, dict):
        raise CheckpointError(f"{directory / _CONFIG} has an added_tokens_decoder that is no object.", "Download it again.")
    for i, token in decoder.items():
        entry = token if isinstance(token, dict) else {}
        listed.append((_CONFIG, entry.get("content", token), int(i) if i.isdecimal() else i, entry.get("special")))
    for file, text, i, is_special in listed:
        found = tokenizer.token_to_id(text) if isinstance(text, str) else None
        if found != i or is_special not in (None, special.get(i, is_special)):
            kind = "" if found != i else " of another kind"
            raise CheckpointError(
                f"{directory / file} names the token {text!r} with id {i}; in tokenizer.json it is {found}{kind}.",
                "Save the tokenizer again with transformers, so that all its files agree.",
            )


def require_rows(tokenizer: Tokenizer, rows: int, directory: Path) -> None:
    """Check that every token has a row in the embedding table.

    Raises:
        CheckpointError: it has not.
    """
    text, last = max(tokenizer.get_vocab(with_added_tokens=True).items(), key=lambda item: item[1], default=("", -1))
    if last >= rows:
        raise CheckpointError(
            f"The tokenizer in {directory} has the token {text!r} with id {last}, and the embedding table only {rows} rows.",
            "Give the tokenizer files that the model was trained with.",
        )


def bos_id(tokenizer: Tokenizer, config: dict[str, Any], directory: Path) -> int:
    """The token that begins every prompt, as the tokenizer says: what it adds to a text, else its `bos_token`, else `<s>`.

    Raises:
        CheckpointError: it has none or adds more, or config.json gives another `bos_token_id`.
    """
    settings, added = read_settings(directory), tokenizer.encode("").ids
    name = special_token(settings, "bos_token")
    named = tokenizer.token_to_id(name or "<s>")
    found = added[0] if added else named
    if found is None or len(added) > 1 or settings.get("add_bos_token") is False:
        raise CheckpointError(
            f"The tokenizer in {directory} does not begin a text with one BOS token (it adds {added}).",
            "Give a text-to-image directory with the tokenizer files that it was trained with.",
        )
    if name is not None and named != found:
        raise CheckpointError(
            f"The tokenizer in {directory} has the bos_token {name!r}, id {named}, and begins a text with {found}.",
            "Give the tokenizer files that the model was trained with.",
        )
    given = config.get("bos_token_id")
    if given is not None and (type(given) is not int or given != found):
        raise CheckpointError(
            f"{directory / 'config.json'} gives bos_token_id as {given!r}, and the tokenizer begins a text with {found}.",
            "Give config.json and the tokenizer files of one model.",
        )
    return found
