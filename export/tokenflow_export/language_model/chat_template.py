"""Finds the chat template and the stop tokens of a released model: ChatML as Qwen writes it, or Vicuna's template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenflow_sdk.bundle.model_config import ChatTemplate
from tokenflow_sdk.errors import CheckpointError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["CHATML_SYSTEM", "VICUNA_SYSTEM", "chat_template", "stop_ids"]

CHATML_SYSTEM = "You are a helpful assistant."
VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


def chat_template(tokenizer: Tokenizer, directory: Path) -> ChatTemplate:
    """Choose the template by the control tokens that `tokenizer` has.

    Raises:
        CheckpointError: it has neither those of ChatML nor those of Llama.
    """
    start, end = (tokenizer.token_to_id(f"<|im_{name}|>") for name in ("start", "end"))
    if start is not None and end is not None:
        return ChatTemplate(
            opening=(start, f"system\n{CHATML_SYSTEM}", end, "\n"),
            user=(start, "user\n"),
            after_image=("\n",),
            assistant=(end, "\n", start, "assistant\n"),
            closing=(end, "\n"),
        )
    start, end = (tokenizer.token_to_id(name) for name in ("<s>", "</s>"))
    if start is not None and end is not None:
        return ChatTemplate(
            opening=(start, f"{VICUNA_SYSTEM} "),
            user=("USER: ",),
            after_image=("\n",),
            assistant=(" ASSISTANT:",),
            closing=(end,),
        )
    raise CheckpointError(
        f"The tokenizer in {directory} has neither <|im_start|> and <|im_end|> nor <s> and </s>.",
        "Give a LLaVA directory of the Qwen2 or the Llama layout, with its tokenizer files.",
    )


def stop_ids(template: ChatTemplate, config: dict[str, Any], directory: Path) -> tuple[int, ...]:
    """The tokens that end an answer: the template's own, and `eos_token_id` of config.json and generation_config.json.

    Raises:
        CheckpointError: generation_config.json is damaged.
    """
    path = directory / "generation_config.json"
    try:
        generation = json.loads(path.read_bytes()) if path.is_file() else {}
        found = [config.get("eos_token_id"), generation.get("eos_token_id")]
        ids = [int(i) for value in found for i in (value if isinstance(value, list) else [value]) if i is not None]
    except (OSError, AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}.", "Download it again.") from error
    own = next(part for part in template.closing if isinstance(part, int))
    return tuple(dict.fromkeys([own, *ids]))
