"""A released text-to-image directory to a bundle: one transformer graph, embeddings, sampling, and the prompt tokenizer.

Weights are read tensor by tensor from memory-mapped shards; only the 32768 image rows of the head and only the text rows of the
embedding table are exported. The transformer graph is compared with the eager model before the bundle appears.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from export.config import TransformerConfig
from export.generator_graphs import EmbedImageGraph, EmbedTextGraph, SampleGraph, TransformerGraph
from export.hf_directory import HfDirectory
from export.models.llama import Transformer
from export.onnx_export import GraphSpec, export_graph, file_entry
from export.progress import Steps
from export.staging import staging_directory, versions
from tokenflow_sdk.backends.base import SessionOptions
from tokenflow_sdk.backends.onnxruntime import OnnxRuntimeSession
from tokenflow_sdk.bundle import Bundle
from tokenflow_sdk.config import GeneratorConfig, TokenizerConfig
from tokenflow_sdk.errors import CheckpointError, ParityError
from tokenflow_sdk.kv_cache import PageTable
from tokenflow_sdk.parity import Reference
from tokenflow_sdk.transformer import PagedTransformer

__all__ = ["NEGATIVE_PROMPT", "export_generator"]

NEGATIVE_PROMPT = (
    "lowres, bad anatomy, bad hands, text, error, missing fingers, extra digit, fewer digits, cropped, worst quality, "
    "low quality, normal quality, jpeg artifacts, signature, watermark, username, blurry."
)
MAX_PROMPT = 128
MAX_HIDDEN_ERROR = 1e-3
"""Largest difference accepted between the graph's hidden states and PyTorch's, which are of order one."""


def export_generator(directory: HfDirectory, tokenizer: Bundle[TokenizerConfig], out: Path, steps: Steps, force: bool) -> float:
    """Write a generator bundle.

    Args:
        directory: the released checkpoint.
        tokenizer: the bundle of the tokenizer that decodes its codes.
        out: must not exist, unless `force`.
        steps: shows progress.
        force: replace `out`.

    Returns:
        The largest difference between the graph's hidden states and PyTorch's.

    Raises:
        CheckpointError: keys, shapes or sizes are not those of a released text-to-image model.
        OutputError: `out` exists or cannot be written.
        ParityError: the graph does not reproduce PyTorch; nothing is left behind.
    """
    steps.start("reading the checkpoint")
    model_config = transformer_config(directory)
    config, text = _runtime_config(directory, model_config, tokenizer, out)
    directory.require(_expected_shapes(model_config, config, directory))
    needed = 4 * sum(math.prod(shape) for shape in directory.shapes.values())
    with staging_directory(out, force, needed) as staging, torch.inference_mode():
        transformer = _transformer(directory, model_config)
        graphs = {}
        for spec in _graph_specs(directory, transformer, config):
            steps.start(f"tracing {spec.name}")
            graphs[spec.name] = export_graph(spec, staging)
        np.save(staging / "codebook.npy", Reference.load(tokenizer).codebook)
        (staging / "tokenizer.json").write_text(json.dumps(text), encoding="utf-8")
        assets = {name: file_entry(staging / file) for name, file in _ASSETS.items()}
        steps.start("checking the transformer against PyTorch")
        source = {"checkpoint": directory.path.name, "tokenizer": tokenizer.config.variant}
        bundle = Bundle(staging, config, graphs, assets, {}, source | versions())
        error = _check(bundle, transformer)
        steps.start("finishing")
        replace(bundle, parity={"hidden_error": error}).write_manifest()
    return error


_ASSETS = {"codebook": "codebook.npy", "tokenizer": "tokenizer.json"}


def transformer_config(directory: HfDirectory) -> TransformerConfig:
    """Sizes from config.json; norms, q/k norm and biases from the keys.

    Raises:
        CheckpointError: config.json lacks a size.
    """
    values = directory.config
    try:
        width, heads = int(values["hidden_size"]), int(values["num_attention_heads"])
        return TransformerConfig(
            width=width,
            layers=int(values["num_hidden_layers"]),
            heads=heads,
            kv_heads=int(values.get("num_key_value_heads") or heads),
            head_dim=int(values.get("head_dim") or width // heads),
            mlp_width=int(values["intermediate_size"]),
            norm_eps=float(values["rms_norm_eps"]),
            rope_theta=float(values.get("rope_theta") or 10000.0),
            norm_placement="output",
            qk_norm="model.layers.0.self_attn.qknorm.query_norm.weight" in directory.shapes,
            qkv_bias="model.layers.0.self_attn.q_proj.bias" in directory.shapes,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{directory.path / 'config.json'} lacks a size: {error}.", "Give a released text-to-image directory."
        ) from error


def _runtime_config(
    directory: HfDirectory, model: TransformerConfig, tokenizer: Bundle[TokenizerConfig], out: Path
) -> tuple[GeneratorConfig, dict[str, Any]]:
    picture = tokenizer.config
    text, image_token_start, image_start_ids = _prompt_tokenizer(directory, picture.codebook_size)
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
        negative_prompt=NEGATIVE_PROMPT,
        patch_nums=picture.patch_nums,
        codebook_size=picture.codebook_size,
        codebook_sha256=picture.codebook_sha256,
        tokenizer_variant=picture.variant,
        tokenizer=Path(os.path.relpath(tokenizer.path.resolve(), out.resolve())).as_posix(),
    )
    return config, text


def _prompt_tokenizer(directory: HfDirectory, codebook_size: int) -> tuple[dict[str, Any], int, tuple[int, ...]]:
    """tokenizer.json without the image tokens, the id of the first image token, and the ids of `<img>`.

    Prompts are text: without image and control tokens in it, no prompt can spell one.
    """
    from tokenizers import Tokenizer

    path = directory.path / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(
            f"{path} cannot be read: {error}.",
            "Where only tokenizer.model is there, write it once with transformers: "
            "AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR).",
        ) from error
    first, last = tokenizer.token_to_id("<vq_token_0>"), tokenizer.token_to_id(f"<vq_token_{codebook_size - 1}>")
    start = tokenizer.encode("<img>", add_special_tokens=False).ids
    if first is None or last != first + codebook_size - 1 or not start:
        raise CheckpointError(
            f"{path} has no {codebook_size} consecutive <vq_token_...>s and an <img>.",
            "Give a text-to-image directory, and the tokenizer bundle it was trained with.",
        )
    text = json.loads(tokenizer.to_str())
    text["added_tokens"] = [token for token in text["added_tokens"] if token["id"] < first]
    return text, first, tuple(start)


def _expected_shapes(model: TransformerConfig, config: GeneratorConfig, directory: HfDirectory) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        transformer = Transformer(model)
    shapes = {f"model.{key}": tuple(value.shape) for key, value in transformer.state_dict().items()}
    vocabulary = config.text_size + config.codebook_size
    code_dim = directory.shapes.get("model.mm_projector.0.weight", (0, 40))[1]
    return shapes | {
        "model.embed_tokens.weight": (vocabulary, model.width),
        "lm_head.weight": (vocabulary, model.width),
        "model.mm_projector.0.weight": (model.width, code_dim),
        "model.mm_projector.0.bias": (model.width,),
        "model.mm_projector.2.weight": (model.width, model.width),
        "model.mm_projector.2.bias": (model.width,),
        "model.lvl_embed.weight": (len(config.patch_nums) + 1, model.width),
        "model.pos_1LC": (config.n_codes, model.width),
    }


def _transformer(directory: HfDirectory, config: TransformerConfig) -> Transformer:
    with torch.device("meta"):
        transformer = Transformer(config)
    weights = {key: directory.tensor(f"model.{key}") for key in transformer.state_dict()}
    transformer.load_state_dict(weights, strict=True, assign=True)
    return transformer.eval().requires_grad_(False)


_VARYING = ("batch", "queries", "table", "slots", "page", "window")


def _zeros(*shape: int) -> Tensor:
    return torch.zeros(*shape)


def _counts(*shape: int) -> Tensor:
    return torch.ones(*shape, dtype=torch.int32)


def _graph_specs(directory: HfDirectory, transformer: Transformer, config: GeneratorConfig) -> list[GraphSpec]:
    dims = {name: torch.export.Dim(name) for name in _VARYING}
    start, stop = config.image_token_start, config.image_token_start + config.codebook_size
    head = directory.tensor("lm_head.weight")[start:stop].clone()
    return [
        *_embedding_specs(directory, config, dims),
        _transformer_spec(transformer, dims),
        _sample_spec(head, dims),
    ]


def _embedding_specs(directory: HfDirectory, config: GeneratorConfig, dims: Mapping[str, Any]) -> list[GraphSpec]:
    start, stop = config.image_token_start, config.image_token_start + config.codebook_size
    levels, positions = directory.tensor("model.lvl_embed.weight"), directory.tensor("model.pos_1LC")
    table = directory.tensor("model.embed_tokens.weight")
    projector = _projector(directory)
    rows = {0: dims["batch"], 1: dims["queries"]}
    return [
        GraphSpec(
            "embed_text",
            EmbedTextGraph(torch.cat([table[:start], table[stop:]]), levels[0], positions[0]),
            {"token_ids": (_counts(2, 3), rows), "starts": (_zeros(2, 3), rows)},
            ("embeddings",),
        ),
        GraphSpec(
            "embed_image",
            EmbedImageGraph(projector, levels, positions),
            {
                "features": (_zeros(2, 3, projector[0].in_features), rows),
                "level": (_counts(1), {}),
                "places": (_counts(3), {0: dims["queries"]}),
            },
            ("embeddings",),
        ),
    ]


def _transformer_spec(transformer: Transformer, dims: Mapping[str, Any]) -> GraphSpec:
    model = transformer.config
    rows, pages = {0: dims["batch"], 1: dims["queries"]}, {0: dims["slots"], 1: dims["page"]}
    pool = (model.layers * 5, 16, model.kv_heads, model.head_dim)
    return GraphSpec(
        "transformer",
        TransformerGraph(transformer),
        {
            "embeddings": (_zeros(2, 3, model.width), rows),
            "positions": (_counts(2, 3), rows),
            "visible": (_counts(2, 3), rows),
            "context": (_counts(2), {0: dims["batch"]}),
            "block_tables": (_counts(2, 4), {0: dims["batch"], 1: dims["table"]}),
            # Two tensors: tracing would take one object given twice for one input.
            "k_pages": (_zeros(*pool), pages),
            "v_pages": (_zeros(*pool), pages),
        },
        ("hidden", "new_k", "new_v"),
    )


def _sample_spec(head: Tensor, dims: Mapping[str, Any]) -> GraphSpec:
    rows, batch = {0: dims["batch"], 1: dims["queries"]}, {0: dims["batch"]}
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


def _projector(directory: HfDirectory) -> nn.Sequential:
    """Linear, GELU, Linear from the quantized feature to the model's width, as LLaVA's `mm_projector`."""
    first, second = (directory.tensor(f"model.mm_projector.{i}.weight") for i in (0, 2))
    with torch.device("meta"):
        projector = nn.Sequential(nn.Linear(*first.shape[::-1]), nn.GELU(), nn.Linear(*second.shape[::-1]))
    biases = {f"{i}.bias": directory.tensor(f"model.mm_projector.{i}.bias") for i in (0, 2)}
    projector.load_state_dict({"0.weight": first, "2.weight": second} | biases, strict=True, assign=True)
    return projector.eval().requires_grad_(False)


def _check(bundle: Bundle[GeneratorConfig], transformer: Transformer) -> float:
    """A causal prefix and then a bidirectional block over its pages, against one eager pass over both."""
    config, model = bundle.config, transformer.config
    entry = bundle.graph("transformer")
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, 24, model.width), dtype=np.float32)
    positions = np.arange(90, 114, dtype=np.int32)[None]
    mask = torch.ones(24, 24, dtype=torch.bool).tril()
    mask[19:, 19:] = True
    expected = transformer(torch.from_numpy(x), torch.from_numpy(positions), mask[None])[0].numpy()
    with OnnxRuntimeSession(bundle.path / entry.files[0].name, entry, SessionOptions(device="cpu")) as session:
        paged = PagedTransformer(session, config.layers, config.kv_heads, config.head_dim, pages=8, page_size=4)
        table, found = PageTable(paged.pool), []
        for start, stop, visible in ((0, 19, np.arange(1, 20)), (19, 24, np.full(5, 5))):
            step = x[:, start:stop], positions[:, start:stop], visible[None].astype(np.int32)
            output = paged.step(*step, [table], [table.length], width=6)
            paged.store(output, [table])
            found.append(output.hidden[0])
    error = float(np.abs(np.concatenate(found) - expected).max())
    if not error <= MAX_HIDDEN_ERROR:
        raise ParityError(
            f"The exported transformer differs from PyTorch by {error:.1e} (at most {MAX_HIDDEN_ERROR:.0e} is accepted).",
            "Export again with the pinned versions of torch and onnxruntime.",
        )
    return error
