"""Finds the chat template and the stop tokens of a released model: ChatML as Qwen writes it, or Vicuna's template.

Where the directory has a template of its own, it is rendered in a sandbox for a short conversation and compared with ours. Its
system prompt is taken over; anything else that differs is refused, because it would be another prompt than that of training.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenflow_export.checkpoints.hf_directory import read_json
from tokenflow_export.language_model.template_rendering import RenderingError, render
from tokenflow_export.language_model.tokenizer_files import read_settings, special_token
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
_CONVERSATIONS = ((("What?", None),), (("What?", "That."), ("And why?", None)))
"""Questions and answers for which templates are compared."""


def chat_template(tokenizer: Tokenizer, directory: Path) -> ChatTemplate:
    """Choose the template by the control tokens that `tokenizer` has, with the system prompt of the directory's own template.

    Raises:
        CheckpointError: it has neither those of ChatML nor those of Llama, or the directory's template is another.
    """
    start, end = (tokenizer.token_to_id(f"<|im_{name}|>") for name in ("start", "end"))
    if start is not None and end is not None:
        return _as_in_directory(tokenizer, directory, partial(_chatml, start, end), CHATML_SYSTEM)
    start, end = (tokenizer.token_to_id(name) for name in ("<s>", "</s>"))
    if start is not None and end is not None:
        if read_settings(directory).get("add_bos_token") is False:
            raise CheckpointError(
                f"The tokenizer in {directory} adds no BOS, with which Vicuna's conversations begin.", "Give a Vicuna model."
            )
        return _as_in_directory(tokenizer, directory, partial(_vicuna, start, end), VICUNA_SYSTEM)
    raise CheckpointError(
        f"The tokenizer in {directory} has neither <|im_start|> and <|im_end|> nor <s> and </s>.",
        "Give a LLaVA directory of the Qwen2 or the Llama layout, with its tokenizer files.",
    )


def _chatml(start: int, end: int, system: str) -> ChatTemplate:
    return ChatTemplate(
        opening=(start, f"system\n{system}", end, "\n") if system else (),
        user=(start, "user\n"),
        after_image=("\n",),
        assistant=(end, "\n", start, "assistant\n"),
        closing=(end, "\n"),
    )


def _vicuna(start: int, end: int, system: str) -> ChatTemplate:
    return ChatTemplate(
        opening=(start, f"{system} ") if system else (start,),
        user=("USER: ",),
        after_image=("\n",),
        assistant=(" ASSISTANT:",),
        closing=(end,),
    )


def _as_in_directory(tokenizer: Tokenizer, directory: Path, make: Callable[[str], ChatTemplate], default: str) -> ChatTemplate:
    """The template that `make` makes of a system prompt: that of the directory's own template, or `default` if it has none."""
    source = _source(directory)
    if source is None:
        return make(default)
    bos = _text(tokenizer, make(""))
    # Templates write BOS, or leave it to the tokenizer.
    rendered = [bos + text.removeprefix(bos) for text in _render(source, directory)]
    system = _system_prompt(rendered[0], tokenizer, make)
    template = make(system)
    names = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
    if rendered != [_text(tokenizer, template, turns) for turns in _CONVERSATIONS] or any(name in system for name in names):
        raise CheckpointError(
            f"The chat template of {directory} writes a conversation as {rendered[1][:2000]!r}, "
            f"and this exporter as {_text(tokenizer, make(default), _CONVERSATIONS[1])!r}.",
            "Give a model with ChatML or Vicuna's template; if it was not trained with this one, delete it from the directory.",
        )
    return template


def _system_prompt(rendered: str, tokenizer: Tokenizer, make: Callable[[str], ChatTemplate]) -> str:
    """The system prompt in a rendered first question; what else is there does not matter, as the whole is compared later."""
    mark = "\0"
    before, after = _text(tokenizer, make(mark), _CONVERSATIONS[0]).split(mark)
    fits = rendered.startswith(before) and rendered.endswith(after) and len(rendered) >= len(before) + len(after)
    return rendered[len(before) : len(rendered) - len(after)] if fits else ""


def _text(tokenizer: Tokenizer, template: ChatTemplate, turns: Sequence[tuple[str, str | None]] = ()) -> str:
    """A conversation in our template as text."""
    parts = [*template.opening]
    for question, answer in turns:
        parts += [*template.user, question, *template.assistant]
        if answer is not None:
            # After a colon the model itself begins its answer with a space.
            parts += [answer if str(template.assistant[-1]).endswith("\n") else f" {answer}", *template.closing]
    return "".join(part if isinstance(part, str) else tokenizer.id_to_token(part) or "" for part in parts)


def _source(directory: Path) -> str | None:
    """The directory's chat template, where transformers looks for it; None if it has none."""
    path = directory / "chat_template.jinja"
    try:
        if path.is_file():
            return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}.", "Download it again.") from error
    found = read_settings(directory).get("chat_template")
    if isinstance(found, list):  # several by name
        found = next((item.get("template") for item in found if isinstance(item, dict) and item.get("name") == "default"), 0)
    if found is not None and not isinstance(found, str):
        raise CheckpointError(
            f"{directory / 'tokenizer_config.json'} has a chat_template that is no text.", "Download it again."
        )
    return found


def _render(source: str, directory: Path) -> list[str]:
    """The conversations as a chat template writes them."""
    settings = read_settings(directory)
    tokens = {name: special_token(settings, name) for name in settings if name.endswith("_token")}
    given = {name: token for name, token in tokens.items() if token is not None}
    try:
        return render(source, [_messages(turns) for turns in _CONVERSATIONS], given)
    except RenderingError as error:
        raise CheckpointError(
            f"The chat template of {directory} cannot be rendered: {error}.",
            "Download it again; if the model was not trained with it, delete it from the directory.",
        ) from error


def _messages(turns: Sequence[tuple[str, str | None]]) -> list[dict[str, str]]:
    messages = []
    for question, answer in turns:
        messages.append({"role": "user", "content": question})
        if answer is not None:
            messages.append({"role": "assistant", "content": answer})
    return messages


def stop_ids(template: ChatTemplate, config: dict[str, Any], directory: Path, vocabulary: int) -> tuple[int, ...]:
    """The tokens that end an answer: the template's own, and `eos_token_id` of config.json and generation_config.json.

    Args:
        template: of conversations.
        config: config.json.
        directory: the released directory.
        vocabulary: number of tokens.

    Raises:
        CheckpointError: generation_config.json is damaged, or an `eos_token_id` is no token.
    """
    path = directory / "generation_config.json"
    files = {"config.json": config, path.name: read_json(path) if path.is_file() else {}}
    ids = [next(part for part in template.closing if isinstance(part, int))]
    for name, content in files.items():
        value = content.get("eos_token_id")
        given = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(i) is int and 0 <= i < vocabulary for i in given):
            raise CheckpointError(
                f"{directory / name} gives eos_token_id as {value!r}; tokens are 0 .. {vocabulary - 1}.", "Correct it there."
            )
        ids += given
    return tuple(dict.fromkeys(ids))
