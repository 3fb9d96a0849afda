"""A released text-to-image directory to a bundle: one transformer graph, embeddings, sampling, and the prompt tokenizer.

Weights are read tensor by tensor from memory-mapped shards and written at once, so no model needs to fit in memory; only the
32768 image rows of the head and only the text rows of the embedding table are exported. The transformer graph is compared with
the eager model before the bundle appears.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from export.agreement import Agreement
from export.config import TransformerConfig
from export.generator_check import compare
from export.generator_graphs import EmbedImageGraph, EmbedTextGraph, SampleGraph
from export.hf_directory import HfDirectory
from export.onnx_export import GraphSpec, export_graph, file_entry
from export.precision import FULL_PRECISION, Precision
from export.progress import Steps
from export.projector import projector, projector_shapes
from export.prompt_tokenizer import prompt_tokenizer
from export.staging import staging_directory, versions
from export.transformer import transformer_config, transformer_shapes, transformer_spec
from tokenflow_sdk.bundle import Bundle
from tokenflow_sdk.config import GeneratorConfig, TokenizerConfig
from tokenflow_sdk.parity import Reference

__all__ = ["NEGATIVE_PROMPT", "export_generator"]

NEGATIVE_PROMPT = (
    "lowres, bad anatomy, bad hands, text, error, missing fingers, extra digit, fewer digits, cropped, worst quality, "
    "low quality, normal quality, jpeg artifacts, signature, watermark, username, blurry."
)
CFG_SCALE = 7.5
"""What the released model was published with."""
MAX_PROMPT = 128


def export_generator(
    directory: HfDirectory,
    tokenizer: Bundle[TokenizerConfig],
    out: Path,
    steps: Steps,
    force: bool,
    precision: Precision = FULL_PRECISION,
    negative_prompt: str = NEGATIVE_PROMPT,
    preset: str = "paper",
    cfg_scale: float = CFG_SCALE,
    compact: bool = False,
) -> Agreement:
    """Write a generator bundle.

    Args:
        directory: the released checkpoint.
        tokenizer: the bundle of the tokenizer that decodes its codes.
        out: must not exist, unless `force`.
        steps: shows progress.
        force: replace `out`.
        precision: of the transformer, the text embeddings and the head.
        negative_prompt: what guidance leads away from when a request names nothing.
        preset: of sampling, when a request names none.
        cfg_scale: strength of guidance, when a request names none.
        compact: smaller files for the same numbers (`export.compact`).

    Returns:
        How the bundle compares with PyTorch in float32.

    Raises:
        CheckpointError: keys, shapes or sizes are not those of a released text-to-image model.
        OutputError: `out` exists or cannot be written.
        ParityError: the graph does not reproduce PyTorch; nothing is left behind.
    """
    steps.start("reading the checkpoint")
    model_config = transformer_config(directory, "output")
    config, text = _runtime_config(directory, model_config, tokenizer, out, (negative_prompt, preset, cfg_scale))
    directory.require(_expected_shapes(model_config, config, directory))
    needed = precision.bytes_of(sum(math.prod(shape) for shape in directory.shapes.values()))
    with staging_directory(out, force, needed) as staging, torch.inference_mode():
        graphs = {}
        for spec in _graph_specs(directory, model_config, config, precision):
            steps.start(f"writing {spec.name}", total=1)
            graphs[spec.name] = export_graph(spec, staging, steps.fraction, compact)
        codebook = Reference.load(tokenizer).codebook
        np.save(staging / "codebook.npy", codebook)
        (staging / "tokenizer.json").write_text(json.dumps(text), encoding="utf-8")
        assets = {name: file_entry(staging / file) for name, file in _ASSETS.items()}
        steps.start("checking the transformer against PyTorch")
        source = {"checkpoint": directory.path.name, "tokenizer": tokenizer.config.variant, "precision": precision.name}
        bundle = Bundle(staging, config, graphs, assets, {}, source | versions())
        agreement, reference = compare(bundle, directory, model_config, image_head(directory, config), codebook, precision)
        agreement.require(precision)
        steps.start("finishing")
        np.savez(staging / "reference.npz", allow_pickle=False, **vars(reference))
        assets["reference"] = file_entry(staging / "reference.npz")
        replace(bundle, parity=asdict(agreement)).write_manifest()
    return agreement


_ASSETS = {"codebook": "codebook.npy", "tokenizer": "tokenizer.json"}
"""Written before the check; what the check computed is added as `reference`."""


def _runtime_config(
    directory: HfDirectory,
    model: TransformerConfig,
    tokenizer: Bundle[TokenizerConfig],
    out: Path,
    defaults: tuple[str, str, float],
) -> tuple[GeneratorConfig, dict[str, Any]]:
    """The bundle's config, and its tokenizer.json. `defaults`: negative prompt, preset and guidance of requests without."""
    picture = tokenizer.config
    text, image_token_start, image_start_ids = prompt_tokenizer(directory.path, picture.codebook_size)
    vocabulary = directory.shapes.get("model.embed_tokens.weight", (0,))[0]
    config = GeneratorConfig(
        width=model.width,
        layers=model.layers,
        kv_heads=model.kv_heads,
        head_dim=model.head_dim,
        text_size=vocabulary - picture.codebook_size,
        image_token_start=image_token_start,
        bos_id=int(directory.config.get("bos_token_id", 1)),
        image_start_ids=image_start_ids,
        max_prompt=MAX_PROMPT,
        negative_prompt=defaults[0],
        preset=defaults[1],
        cfg_scale=defaults[2],
        patch_nums=picture.patch_nums,
        codebook_size=picture.codebook_size,
        codebook_sha256=picture.codebook_sha256,
        tokenizer_variant=picture.variant,
        tokenizer=Path(os.path.relpath(tokenizer.path.resolve(), out.resolve())).as_posix(),
    )
    return config, text


def _expected_shapes(model: TransformerConfig, config: GeneratorConfig, directory: HfDirectory) -> dict[str, tuple[int, ...]]:
    vocabulary = config.text_size + config.codebook_size
    code_dim = directory.shapes.get("model.mm_projector.0.weight", (0, 40))[1]
    return (
        transformer_shapes(model)
        | projector_shapes(model.width, code_dim)
        | {
            "model.embed_tokens.weight": (vocabulary, model.width),
            "lm_head.weight": (vocabulary, model.width),
            "model.lvl_embed.weight": (len(config.patch_nums) + 1, model.width),
            "model.pos_1LC": (config.n_codes, model.width),
        }
    )


def _zeros(*shape: int) -> Tensor:
    return torch.zeros(*shape)


def _counts(*shape: int) -> Tensor:
    return torch.ones(*shape, dtype=torch.int32)


def _graph_specs(
    directory: HfDirectory, model: TransformerConfig, config: GeneratorConfig, precision: Precision
) -> Iterator[GraphSpec]:
    """One at a time, so that no two hold their weights at once."""
    dims = {name: torch.export.Dim(name) for name in ("batch", "queries", "window")}
    yield _embed_text_spec(directory, config, precision, dims)
    yield _embed_image_spec(directory, dims)
    yield transformer_spec(directory, model, precision)
    yield _sample_spec(directory, config, precision, dims)


def _embed_text_spec(
    directory: HfDirectory, config: GeneratorConfig, precision: Precision, dims: Mapping[str, Any]
) -> GraphSpec:
    start, stop = config.image_token_start, config.image_token_start + config.codebook_size
    table = directory.tensor("model.embed_tokens.weight")
    table = torch.cat([table[:start], table[stop:]]) + directory.tensor("model.lvl_embed.weight")[0]
    rows = {0: dims["batch"], 1: dims["queries"]}
    return GraphSpec(
        "embed_text",
        EmbedTextGraph(table.to(precision.torch_dtype), directory.tensor("model.pos_1LC")[0]),
        {"token_ids": (_counts(2, 3), rows), "starts": (_zeros(2, 3), rows)},
        ("embeddings",),
    )


def _embed_image_spec(directory: HfDirectory, dims: Mapping[str, Any]) -> GraphSpec:
    module = projector(directory)
    levels, positions = directory.tensor("model.lvl_embed.weight"), directory.tensor("model.pos_1LC")
    return GraphSpec(
        "embed_image",
        EmbedImageGraph(module, levels, positions),
        {
            "features": (_zeros(2, 3, module[0].in_features), {0: dims["batch"], 1: dims["queries"]}),
            "level": (_counts(1), {}),
            "places": (_counts(3), {0: dims["queries"]}),
        },
        ("embeddings",),
    )


def _sample_spec(directory: HfDirectory, config: GeneratorConfig, precision: Precision, dims: Mapping[str, Any]) -> GraphSpec:
    rows, batch = {0: dims["batch"], 1: dims["queries"]}, {0: dims["batch"]}
    head = image_head(directory, config).to(precision.torch_dtype)
    return GraphSpec(
        "sample",
        SampleGraph(head),
        {
            "conditional": (_zeros(2, 3, head.shape[1]), rows),
            "unconditional": (_zeros(2, 3, head.shape[1]), rows),
            "guidance": (_zeros(2), batch),
            "top_k": (_counts(2), batch),
            "top_p": (_zeros(2), batch),
            "noise": (_zeros(2, 3), rows),
            "ranks": (_counts(9), {0: dims["window"]}),
        },
        ("code_indices", "logits"),
    )


def image_head(directory: HfDirectory, config: GeneratorConfig) -> Tensor:
    """The head's rows of image codes, float32 [K, H]."""
    start = config.image_token_start
    return directory.tensor("lm_head.weight")[start : start + config.codebook_size].clone()
