"""Computes what transformers' own classes make of a checkpoint, so that a bundle is compared with other code than ours.

transformers reads config.json itself. Its model is built without weights; each module reads its own when it runs and drops them
after, so that one matrix is in memory at a time.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tokenflow_export.checkpoints.architecture import EMBEDDING, HEAD, family_of
from tokenflow_export.checkpoints.hf_directory import HfDirectory
from tokenflow_sdk.errors import MissingPackageError, ParityError, TokenFlowError

__all__ = ["installed_version", "run_transformers"]


def installed_version() -> str | None:
    """The version of transformers in words, or None if it is not installed.

    Raises:
        MissingPackageError: a package that it needs is missing or too old.
    """
    if importlib.util.find_spec("transformers") is None:
        return None
    try:
        import transformers
    except ImportError as error:  # of packages that it needs, some may be missing or of other versions
        raise MissingPackageError(
            f"transformers cannot be imported: {str(error).splitlines()[0]}",
            "Run `pip install -U transformers`, or compare with the exporter's own model: add --without-transformers.",
        ) from error
    return f"transformers {transformers.__version__}"


def run_transformers(directory: HfDirectory, token_ids: Tensor, place: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Run the language model of a directory in float32.

    Args:
        directory: the checkpoint.
        token_ids: int64 [T], of the text.
        place: makes the embeddings of the whole sequence [Q, H] from those of the text [T, H].

    Returns:
        Hidden states after the final norm, float32 [Q, H], and logits, float32 [Q, V].

    Raises:
        CheckpointError: a weight has a value that is not finite.
        ParityError: transformers cannot run the model.
    """
    try:
        model = _without_weights(directory)
        embeddings = place(model.get_input_embeddings()(token_ids))
        out = model(inputs_embeds=embeddings[None], use_cache=False, output_hidden_states=True)
        return out.hidden_states[-1][0], out.logits[0]
    except TokenFlowError:
        raise
    except Exception as error:  # transformers raises many kinds for a config.json that it cannot use
        raise ParityError(
            f"{installed_version()} cannot run the model in {directory.path}: {str(error).splitlines()[0]}",
            "Use the pinned version of transformers, or compare with the exporter's own model: add --without-transformers.",
        ) from error


def _without_weights(directory: HfDirectory) -> Any:
    """A causal language model whose modules read their weights when they run."""
    import transformers

    name = family_of(directory).name
    # Newer versions refuse null where older ones take it as absent. Only of this key Qwen2 makes something else of null.
    values = {key: value for key, value in directory.config.items() if value is not None or key == "num_key_value_heads"}
    values |= {"attn_implementation": "eager", "return_dict": True}
    place = next((key for key in ("rope_parameters", "rope_scaling") if "rope_theta" in (values.get(key) or {})), None)
    if place is not None and int(transformers.__version__.partition(".")[0]) < 5:
        raise ParityError(
            f"{installed_version()} does not read the rope_theta in {place} of {directory.path / 'config.json'}.",
            "Install transformers 5 or newer, or compare with the exporter's own model: add --without-transformers.",
        )
    for key in ("model_type", "_attn_implementation"):
        values.pop(key, None)
    config = getattr(transformers, f"{name}Config")(**values)
    with torch.device("meta"):
        model = getattr(transformers, f"{name}ForCausalLM")(config).eval().requires_grad_(False)
    # The rotary embedding has no weights, but a table that is computed from the config.
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    tied = {HEAD: EMBEDDING} if config.tie_word_embeddings else {}
    for path, module in model.named_modules():
        keys = {
            part: tied.get(f"{path}.{part}", f"{path}.{part}")
            for part in module._parameters
            if module._parameters[part] is not None
        }
        if keys:
            _read_when_run(module, directory, keys)
    return model


def _read_when_run(module: nn.Module, directory: HfDirectory, keys: dict[str, str]) -> None:
    """Give a module its parameters while it runs. `keys` are those of the checkpoint, by the parameters' names."""
    empty = {part: module._parameters[part] for part in keys}

    def read(*_: object) -> None:
        module._parameters.update(
            {part: nn.Parameter(directory.tensor(key), requires_grad=False) for part, key in keys.items()}
        )

    def drop(*_: object) -> None:
        module._parameters.update(empty)

    module.register_forward_pre_hook(read)
    module.register_forward_hook(drop)
