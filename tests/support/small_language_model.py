"""Directories of language models so small that many can be tried, and what transformers and the exporter compute from them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from tokenflow_export.checkpoints.architecture import EMBEDDING, FAMILIES, head_key, read_architecture
from tokenflow_export.checkpoints.hf_directory import HfDirectory
from tokenflow_export.language_model.paged_graph import hidden_by_layer, transformer_shapes
from tokenflow_export.language_model.projector import projector_shapes

SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e4,
    "vocab_size": 40,
    "max_position_embeddings": 512,
}
IDS = torch.arange(24) * 7 % 40


def transformers_model(values: Mapping[str, Any], seed: int = 0) -> Any:
    """transformers' model of a config.json without what is null, with random weights, biases and norms of order one."""
    import transformers

    name = FAMILIES[values["model_type"]].name
    given = {key: value for key, value in values.items() if key != "model_type" and value is not None}
    config = getattr(transformers, f"{name}Config")(**given)
    torch.manual_seed(seed)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval().requires_grad_(False)
    for key, value in model.named_parameters():
        value.normal_(1.0 if "norm" in key else 0.0, 0.1 if value.ndim == 1 else 2 * value.shape[1] ** -0.5)
    return model


def write_directory(directory: Path, values: Mapping[str, Any], weights: Mapping[str, Tensor]) -> HfDirectory:
    """A LLaVA directory without a text tokenizer; its projector is random, and the same for all models of one width."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(dict(values)))
    random = torch.Generator().manual_seed(0)
    shapes = projector_shapes(weights[EMBEDDING].shape[1], 40)
    projector = {key: torch.randn(shape, generator=random) for key, shape in shapes.items()}
    save_file({key: value.contiguous().clone() for key, value in weights.items()} | projector, directory / "model.safetensors")
    return HfDirectory(directory)


def state_of(model: Any) -> dict[str, Tensor]:
    """The weights of a model as they are saved: without a head that is the embedding table."""
    state = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    return state


@torch.inference_mode()
def exporters_logits(directory: HfDirectory, ids: Tensor) -> Tensor:
    """What the exporter reads from a directory, computed by its own model: logits [Q, V]."""
    config, head = read_architecture(directory, "pre"), head_key(directory)
    table = {EMBEDDING: tuple(directory.shapes[EMBEDDING])}
    heads = {key: table[EMBEDDING] for key in ("lm_head.weight", head) if key in directory.shapes or key == head}
    directory.require(transformer_shapes(config) | projector_shapes(config.width, 40) | table | heads)
    count = len(ids)
    mask = torch.ones(count, count, dtype=torch.bool).tril()[None]
    x = directory.tensor(EMBEDDING)[ids][None]
    return F.linear(hidden_by_layer(directory, config, x, torch.arange(count)[None], mask)[0], directory.tensor(head))
