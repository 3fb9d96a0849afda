"""Small text-to-image checkpoints in the released directory layout, with stand-in weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import torch
from rich.console import Console
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors

from tests.conftest import DATA
from tokenflow_export.checkpoints.hf_directory import HfDirectory
from tokenflow_export.checkpoints.standin import standin_weight
from tokenflow_export.language_model.bundle_writer import ExportJob
from tokenflow_export.language_model.generator import export_generator
from tokenflow_export.progress import ProgressSteps
from tokenflow_export.tracing.onnx_export import file_entry
from tokenflow_export.tracing.weight_quantization import FULL_PRECISION, ExportPrecision
from tokenflow_sdk.bundle.bundle import Bundle
from tokenflow_sdk.bundle.model_config import TokenizerConfig
from tokenflow_sdk.bundle.schema import GraphEntry, TensorSpec

RELEASED_TINY = {
    "model_type": "llava_llama",
    "hidden_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "bos_token_id": 1,
}
SMALLEST = {
    "model_type": "llava_llama",
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
}
GROUPED = SMALLEST | {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "rope_theta": 5000.0,
}
"""Grouped heads, and matrices of whole blocks of 4 bits. Tests that need more than `SMALLEST` share it: it is traced once."""
PATCH_NUMS_16 = (1, 2, 4, 6, 8, 10, 12, 14, 16)


def codebook(size: int, seed: int = 0, semantic_dim: int = 32) -> np.ndarray:
    """float32 [size, semantic_dim + 8] of the stand-in tokenizer, both halves of unit length."""
    halves = [
        standin_weight(f"quantize.embedding_{name}.weight", (size, dim), seed)
        for name, dim in (("vqkd", semantic_dim), ("vqgan", 8))
    ]
    return np.concatenate([half / np.linalg.norm(half, axis=1, keepdims=True) for half in halves], axis=1)


def tokenizer_bundle(
    directory: Path, patch_nums: tuple[int, ...], codebook_size: int, semantic_dim: int = 32
) -> Bundle[TokenizerConfig]:
    """A bundle whose graphs are empty: an export of a language model reads the rest of its tokenizer."""
    directory.mkdir(parents=True)
    side, codes = patch_nums[-1], sum(side * side for side in patch_nums)
    np.savez(
        directory / "reference.npz",
        images=np.zeros((1, 64, 64, 3), np.uint8),
        code_indices=np.zeros((1, codes), np.int32),
        latent=np.zeros((1, semantic_dim + 8, side, side), np.float32),
        features=np.zeros((1, semantic_dim + 8, side, side), np.float32),
        decoded=np.zeros((1, 64, 64, 3), np.uint8),
        semantic=np.zeros((1, side * side, 4), np.float32),
        codebook=codebook(codebook_size, semantic_dim=semantic_dim),
    )
    config = TokenizerConfig("mini", 64, patch_nums, codebook_size, semantic_dim, 8, 1.0, 4, "ab" * 32, "crop")
    images, indices = TensorSpec("images", "uint8", ("batch", 64, 64, 3)), TensorSpec("code_indices", "int32", ("batch", codes))
    tensors = {
        "encode": ((images,), (indices, TensorSpec("latent", "float32", ("batch", semantic_dim + 8, side, side)))),
        "decode": ((indices,), (images,)),
        "semantic": ((indices,), (TensorSpec("features", "float32", ("batch", side * side, 4)),)),
        "features": ((indices,), (TensorSpec("features", "float32", ("batch", side * side, semantic_dim + 8)),)),
    }
    graphs = {}
    for name, (inputs, outputs) in tensors.items():
        onnx.save(onnx.helper.make_model(onnx.helper.make_graph([], name, [], [])), directory / f"{name}.onnx")
        graphs[name] = GraphEntry((file_entry(directory / f"{name}.onnx"),), inputs, outputs)
    bundle = Bundle(directory, config, graphs, {"reference": file_entry(directory / "reference.npz")}, {}, {})
    bundle.write_manifest()
    return bundle


def write_checkpoint(
    directory: Path,
    config: Mapping[str, object],
    shapes: Mapping[str, tuple[int, ...]],
    text_tokens: int,
    codes: int,
    shards: int = 1,
) -> Path:
    """config.json, tokenizer.json (`text_tokens` words w0, w1, ...) and safetensors, in as many shards as asked."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(dict(config)))
    words = {"<unk>": 0} | {f"w{i}": i for i in range(1, text_tokens)}
    tokenizer = Tokenizer(models.WordLevel(words, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_tokens([f"<vq_token_{i}>" for i in range(codes)])
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in ("<img>", "</img>", "<extra>", "[PAD]")])
    tokenizer.post_processor = processors.TemplateProcessing("w1 $A", special_tokens=[("w1", 1)])  # BOS, as Llama's adds it
    tokenizer.save(str(directory / "tokenizer.json"))
    arrays = {key: torch.from_numpy(standin_weight(key, tuple(shape))) for key, shape in shapes.items()}
    keys = list(arrays)
    names = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)] if shards > 1 else ["model.safetensors"]
    for i, name in enumerate(names):
        save_file({key: arrays[key] for key in keys[i::shards]}, directory / name)
    if shards > 1:
        weight_map = {key: names[i % shards] for i, key in enumerate(keys)}
        (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return directory


def generator_shapes(
    config: Mapping[str, int], text_size: int, codes: int, patch_nums: tuple[int, ...]
) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of a text-to-image checkpoint of any geometry."""
    width, mlp, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    head_dim = config.get("head_dim", width // heads)
    kv = config.get("num_key_value_heads", heads) * head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "model.pos_1LC": (sum(s * s for s in patch_nums), width),
        "model.embed_tokens.weight": (text_size + codes, width),
        "lm_head.weight": (text_size + codes, width),
        "model.norm.weight": (width,),
        "model.mm_projector.0.weight": (width, 40),
        "model.mm_projector.0.bias": (width,),
        "model.mm_projector.2.weight": (width, width),
        "model.mm_projector.2.bias": (width,),
        "model.lvl_embed.weight": (len(patch_nums) + 1, width),
    }
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        for name, out in (("q", heads * head_dim), ("k", kv), ("v", kv)):
            shapes[f"{layer}self_attn.{name}_proj.weight"] = (out, width)
        shapes[f"{layer}self_attn.o_proj.weight"] = (width, heads * head_dim)
        shapes |= {f"{layer}self_attn.qknorm.{name}_norm.weight": (head_dim,) for name in ("query", "key")}
        shapes |= {f"{layer}mlp.{name}_proj.weight": (mlp, width) for name in ("gate", "up")}
        shapes[f"{layer}mlp.down_proj.weight"] = (width, mlp)
        shapes |= {f"{layer}{name}.weight": (width,) for name in ("input_layernorm", "post_attention_layernorm")}
    return shapes


def export_quietly(
    checkpoint: Path, tokenizer: Bundle[TokenizerConfig], out: Path, precision: ExportPrecision = FULL_PRECISION
) -> Path:
    with ProgressSteps(Console(quiet=True)) as steps:
        export_generator(ExportJob(HfDirectory(checkpoint), tokenizer, out, steps, precision=precision))
    return out


def released_tiny_shapes() -> dict[str, tuple[int, ...]]:
    """The released key list of a tiny text-to-image model."""
    keys = json.loads((DATA / "keys" / "t2i_tiny.json").read_text())
    return {key: tuple(shape) for key, shape in keys.items()}
