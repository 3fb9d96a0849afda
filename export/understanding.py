"""A released LLaVA directory (Qwen2 or Llama keys) to a bundle: embeddings, projector, the paged transformer, and the head.

Weights are read tensor by tensor from memory-mapped shards and written at once, so no model needs to fit in memory. A vision
tower in the directory is left out: pictures come as the tokenizer's quantized features. All graphs are compared with the eager
model before the bundle appears.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from export.agreement import Agreement
from export.chat_template import chat_template, stop_ids
from export.config import TransformerConfig
from export.hf_directory import HfDirectory
from export.onnx_export import GraphSpec, export_graph, file_entry
from export.precision import FULL_PRECISION, Precision, use_matmul
from export.progress import Steps
from export.projector import projector, projector_shapes
from export.prompt_tokenizer import load_tokenizer
from export.staging import staging_directory, versions
from export.transformer import transformer_config, transformer_shapes, transformer_spec
from export.understanding_check import compare
from export.understanding_graphs import EmbedTokensGraph, HeadGraph
from tokenflow_sdk.bundle import Bundle
from tokenflow_sdk.config import TokenizerConfig, UnderstanderConfig
from tokenflow_sdk.errors import CheckpointError
from tokenflow_sdk.parity import Reference

__all__ = ["export_understanding"]

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


def export_understanding(
    directory: HfDirectory,
    tokenizer: Bundle[TokenizerConfig],
    out: Path,
    steps: Steps,
    force: bool,
    precision: Precision = FULL_PRECISION,
) -> Agreement:
    """Write an understander bundle.

    Args:
        directory: the released checkpoint.
        tokenizer: the bundle of the tokenizer whose codes it reads.
        out: must not exist, unless `force`.
        steps: shows progress.
        force: replace `out`.
        precision: of the transformer and the head; the token embeddings take its dtype.

    Returns:
        How the bundle compares with PyTorch in float32.

    Raises:
        CheckpointError: keys, shapes or sizes are not those of a released understanding model.
        OutputError: `out` exists or cannot be written.
        ParityError: the graphs do not reproduce PyTorch; nothing is left behind.
    """
    steps.start("reading the checkpoint")
    model = transformer_config(directory, "pre")
    text = load_tokenizer(directory.path)
    template = chat_template(text, directory.path)
    head_key = _EMBEDDING if directory.config.get("tie_word_embeddings") else _HEAD
    config = UnderstanderConfig(
        width=model.width,
        layers=model.layers,
        kv_heads=model.kv_heads,
        head_dim=model.head_dim,
        context=_size(directory, "max_position_embeddings"),
        vocabulary=_size(directory, "vocab_size"),
        stop_ids=stop_ids(template, directory.config, directory.path),
        template=template,
        image_tokens=tokenizer.config.grid**2,
        code_dim=tokenizer.config.code_dim,
        patch_nums=tokenizer.config.patch_nums,
        codebook_sha256=tokenizer.config.codebook_sha256,
        tokenizer_variant=tokenizer.config.variant,
        tokenizer=Path(os.path.relpath(tokenizer.path.resolve(), out.resolve())).as_posix(),
    )
    directory.require(_expected_shapes(directory, model, config))
    needed = precision.bytes_of(sum(math.prod(shape) for shape in directory.shapes.values()))
    with staging_directory(out, force, needed) as staging, torch.inference_mode():
        graphs = {}
        for spec in _graph_specs(directory, model, config, precision, head_key):
            steps.start(f"writing {spec.name}", total=1)
            graphs[spec.name] = export_graph(spec, staging, steps.fraction)
        (staging / "tokenizer.json").write_text(text.to_str(), encoding="utf-8")
        assets = {"tokenizer": file_entry(staging / "tokenizer.json")}
        steps.start("checking the graphs against PyTorch")
        source = {"checkpoint": directory.path.name, "tokenizer": tokenizer.config.variant, "precision": precision.name}
        bundle = Bundle(staging, config, graphs, assets, {}, source | versions())
        codebook = Reference.load(tokenizer).codebook
        agreement, reference = compare(bundle, directory, model, head_key, codebook, precision)
        agreement.require(precision)
        steps.start("finishing")
        np.savez(staging / "reference.npz", allow_pickle=False, **vars(reference))
        assets["reference"] = file_entry(staging / "reference.npz")
        replace(bundle, parity=asdict(agreement)).write_manifest()
    return agreement


def _size(directory: HfDirectory, key: str) -> int:
    value = directory.config.get(key)
    if type(value) is not int or value < 1:
        raise CheckpointError(
            f"{directory.path / 'config.json'} gives {key} as {value!r}.", "Give the directory of a released model."
        )
    return value


def _expected_shapes(
    directory: HfDirectory, model: TransformerConfig, config: UnderstanderConfig
) -> dict[str, tuple[int, ...]]:
    table = (config.vocabulary, model.width)
    expected = transformer_shapes(model) | projector_shapes(model.width, config.code_dim) | {_EMBEDDING: table}
    # Some savers write a tied head as well; it is then the embedding table again.
    tied = directory.config.get("tie_word_embeddings") and _HEAD not in directory.shapes
    return expected if tied else expected | {_HEAD: table}


def _graph_specs(
    directory: HfDirectory, model: TransformerConfig, config: UnderstanderConfig, precision: Precision, head_key: str
) -> Iterator[GraphSpec]:
    """One at a time, so that no two hold their weights at once."""
    dims = {name: torch.export.Dim(name) for name in ("batch", "queries", "seen", "window")}
    rows = {0: dims["batch"], 1: dims["queries"]}
    table = directory.tensor(_EMBEDDING).to(precision.torch_dtype)
    ids = torch.ones(2, 3, dtype=torch.int32)
    yield GraphSpec("embed_text", EmbedTokensGraph(table), {"token_ids": (ids, rows)}, ("embeddings",))
    del table
    features = torch.zeros(2, 3, config.code_dim)
    yield GraphSpec("project", projector(directory), {"features": (features, rows)}, ("embeddings",))
    yield transformer_spec(directory, model, precision)
    yield _head_spec(directory, config, precision, head_key, dims)


def _head_spec(
    directory: HfDirectory, config: UnderstanderConfig, precision: Precision, head_key: str, dims: dict[str, Any]
) -> GraphSpec:
    """The head, whose weight is read when the graph is saved."""
    batch = {0: dims["batch"]}
    with FakeTensorMode():
        graph = HeadGraph(config.width, config.vocabulary, precision.torch_dtype)
        use_matmul(graph)
        reals = [torch.ones(2) for _ in range(4)]
        inputs: dict[str, tuple[Tensor, dict[int, Any]]] = {
            "hidden": (torch.zeros(2, config.width), batch),
            "seen": (torch.ones(2, 4, dtype=torch.int32), batch | {1: dims["seen"]}),
            "penalty": (reals[0], batch),
            "temperature": (reals[1], batch),
            "top_k": (torch.ones(2, dtype=torch.int32), batch),
            "top_p": (reals[2], batch),
            "noise": (reals[3], batch),
            "ranks": (torch.ones(9, dtype=torch.int32), {0: dims["window"]}),
        }
    outputs = ("token_ids", "logits")
    return GraphSpec(
        "head", graph, inputs, outputs, lambda _: directory.tensor(head_key).T.contiguous().numpy(), precision.weights
    )
