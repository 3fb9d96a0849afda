"""Small LLaVA directories in both released layouts, with random weights from transformers' own classes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from tests.support.waiting import comes_true
from tokenflow_export.checkpoints.hf_directory import HfDirectory
from tokenflow_export.language_model.bundle_writer import ExportJob
from tokenflow_export.language_model.understanding import export_understanding
from tokenflow_export.progress import ProgressSteps
from tokenflow_export.tracing.weight_quantization import FULL_PRECISION, ExportPrecision
from tokenflow_sdk import Understander
from tokenflow_sdk.bundle.bundle import Bundle
from tokenflow_sdk.bundle.model_config import TokenizerConfig

BASE = {"intermediate_size": 96, "rms_norm_eps": 1e-5, "max_position_embeddings": 512, "initializer_range": 0.12}
# What released models vary: grouped heads, biases, tied heads, head widths, RoPE's base.
GEOMETRIES: dict[str, dict[str, Any]] = {
    "qwen": BASE
    | {"model_type": "llava_qwen", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    | {"num_key_value_heads": 2, "rope_theta": 1e6, "vocab_size": 288, "tie_word_embeddings": False},
    "qwen_tied": BASE
    | {"model_type": "llava_qwen", "hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 6}
    | {"num_key_value_heads": 1, "rope_theta": 1e4, "vocab_size": 300, "tie_word_embeddings": True},
    "llama": BASE
    | {"model_type": "llava_llama", "hidden_size": 30, "num_hidden_layers": 1, "num_attention_heads": 3}
    | {"num_key_value_heads": 3, "rope_theta": 5e3, "vocab_size": 310, "tie_word_embeddings": False},
}
SMALLEST = GEOMETRIES["qwen"] | {"hidden_size": 32, "num_hidden_layers": 1, "max_position_embeddings": 1024}


def byte_level_tokenizer() -> Tokenizer:
    """Qwen's kind: bytes, two merges, and control tokens of which 259 is <|im_end|>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {text: i for i, text in enumerate([*alphabet, "th", "the"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("t", "h"), ("th", "e")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in ("<|im_start|>", "<|im_end|>", "<|endoftext|>")])
    return tokenizer


def byte_fallback_tokenizer() -> Tokenizer:
    """Llama's kind: pieces with a mark for spaces, bytes for what is no piece; <s> is 1 and </s> 2."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", *"abcdefghijklmnopqrstuvwxyz", "th", "▁th"]
    vocabulary = {text: i for i, text in enumerate(pieces)}
    merges = [("t", "h"), ("▁", "th")]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))  # noqa: S106
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    strip = decoders.Strip(" ", 1, 0)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in ("<unk>", "<s>", "</s>")])
    return tokenizer


def reference_model(config: Mapping[str, Any], seed: int = 0) -> Any:
    """transformers' Qwen2ForCausalLM or LlamaForCausalLM with random weights, biases and norms."""
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    values = {key: value for key, value in config.items() if key not in ("model_type", "rope_theta")}
    values |= {"rope_parameters": {"rope_type": "default", "rope_theta": config["rope_theta"]}}
    qwen = config["model_type"] == "llava_qwen"
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(Qwen2Config(**values)) if qwen else LlamaForCausalLM(LlamaConfig(**values))
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.ndim == 1:
                value.normal_(1.0 if "norm" in name else 0.0, 0.1)
    return model.eval()


def reference_projector(width: int, code_dim: int = 40, seed: int = 0) -> torch.nn.Sequential:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(code_dim, width), torch.nn.GELU(), torch.nn.Linear(width, width)).eval()


def write_checkpoint(
    directory: Path, config: Mapping[str, Any], model: Any, projector: torch.nn.Module, shards: int = 2
) -> Path:
    """A LLaVA directory: config.json as released, tokenizer.json, shards; with a vision tower, which is not read."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(dict(config)))
    qwen = config["model_type"] == "llava_qwen"
    (byte_level_tokenizer() if qwen else byte_fallback_tokenizer()).save(str(directory / "tokenizer.json"))
    weights = {key: value.contiguous() for key, value in model.state_dict().items()}
    if config["tie_word_embeddings"]:
        del weights["lm_head.weight"]
    weights |= {f"model.mm_projector.{key}": value for key, value in projector.state_dict().items()}
    weights["model.vision_tower.vision_tower.weight"] = torch.zeros(3)
    names = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    for i, name in enumerate(names):
        save_file({key: weights[key] for key in list(weights)[i::shards]}, directory / name)
    weight_map = {key: names[i % shards] for i, key in enumerate(weights)}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return directory


def export_quietly(
    checkpoint: Path, tokenizer: Bundle[TokenizerConfig], out: Path, precision: ExportPrecision = FULL_PRECISION
) -> Path:
    with ProgressSteps(Console(quiet=True)) as steps:
        export_understanding(ExportJob(HfDirectory(checkpoint), tokenizer, out, steps, precision=precision))
    return out


def features(seed: int) -> np.ndarray:
    """Of an image, as the small CLIP tokenizer quantizes them: float32 [16, 40]."""
    return np.random.default_rng(seed).standard_normal((16, 40)).astype(np.float32)


def pool_is_clean(understander: Understander) -> bool:
    """Only the prefix cache holds pages."""
    scheduler = understander._runner.model.scheduler
    pool = scheduler.loop.transformer.pool

    def clean() -> bool:
        cached = {page for table in list(scheduler.cache._tables.values()) for page in table.pages}
        return pool.free == pool.pages - len(cached) and not scheduler._live and not scheduler._waiting

    return comes_true(clean)
