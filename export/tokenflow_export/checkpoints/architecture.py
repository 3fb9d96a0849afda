"""Reads the architecture of a language model from config.json: every key is used, known to be harmless, or refused by name.

A key that is passed over may change what the model computes, and the bundle would then work and be wrong. So the tables below
list what is known, and a key in none of them is refused, unless it is null: transformers takes that as if it were absent.
`docs/write_config_keys.py` makes a page of them.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from tokenflow_export.checkpoints.hf_directory import HfDirectory
from tokenflow_export.models.config import TransformerConfig
from tokenflow_sdk.errors import ArgumentError, CheckpointError

__all__ = [
    "EMBEDDING",
    "FAMILIES",
    "HARMLESS",
    "HEAD",
    "LIMITED",
    "LLAMA_LIMITED",
    "USED",
    "Family",
    "family_of",
    "head_key",
    "read_architecture",
    "size",
    "vocabulary_shapes",
]

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class Family:
    """A kind of layers that this exporter builds. `name` begins the names of its classes in transformers."""

    name: Literal["Llama", "Qwen2"]
    qkv_bias: bool


_LLAMA, _QWEN2 = Family("Llama", False), Family("Qwen2", True)
FAMILIES = {"llama": _LLAMA, "llava": _LLAMA, "llava_llama": _LLAMA, "qwen2": _QWEN2, "llava_qwen": _QWEN2}
"""The families by the `model_type` that released directories give."""

USED = {
    "model_type": "the layers: " + ", ".join(FAMILIES),
    "hidden_size": "a size of the transformer",
    "num_hidden_layers": "a size of the transformer",
    "num_attention_heads": "a size of the transformer",
    "num_key_value_heads": "a size of the transformer; as many as `num_attention_heads` where it is absent or null",
    "head_dim": "a size of the transformer; `hidden_size / num_attention_heads` where it is absent or null",
    "intermediate_size": "a size of the transformer",
    "rms_norm_eps": "of the norms",
    "rope_theta": "the base of RoPE, unless `rope_scaling` or `rope_parameters` has it; 10000 where it is absent",
    "rope_scaling": "the base of RoPE, if it is there; any scaling is refused",
    "rope_parameters": "the same as `rope_scaling`, by its newer name",
    "vocab_size": "must be the number of rows of the embedding table",
    "tie_word_embeddings": "the head is the embedding table; another head beside it is refused",
    "max_position_embeddings": "the most tokens of a conversation",
    "bos_token_id": "the first token of a text-to-image prompt",
    "eos_token_id": "ends an answer",
    "image_aspect_ratio": "how an understanding model's pictures are brought to a square",
    "tokenizer_model_max_length": "how many tokens the model was trained on",
    "mm_hidden_size": "must be the number of values of the paired tokenizer's codes",
    "vq_codebook_size": "must be the size of the paired tokenizer's codebook",
    "mm_vision_vq_type": "must be one of the names that released training scripts have for this tokenizer",
    "mm_projector_type": "must be `mlp2x_gelu`",
}
"""Keys that are read, with what for."""

_FALSE = (False, None)
LIMITED: dict[str, tuple[tuple[object, ...], str]] = {
    "hidden_act": (("silu", "swish"), "the exporter's MLP has SiLU"),
    "attention_bias": (_FALSE, "a Llama with biases has one in `o_proj` too, which is not built"),
    "mlp_bias": (_FALSE, "the exporter's MLP has no biases"),
    "partial_rotary_factor": ((1.0, None), "RoPE turns the whole of each head"),
    "use_sliding_window": (_FALSE, "attention is full"),
    "layer_types": (("full_attention", None), "attention is full in every layer"),
    "quantization_config": ((None,), "quantized weights are codes, which are not read"),
    "pruned_heads": (({}, None), "all heads are there"),
    "is_encoder_decoder": (_FALSE, "there is no encoder"),
    "add_cross_attention": (_FALSE, "there is no cross-attention"),
    "tie_encoder_decoder": (_FALSE, "there is no encoder"),
    "forced_bos_token_id": ((None,), "no token is forced"),
    "forced_eos_token_id": ((None,), "no token is forced"),
    "suppress_tokens": ((None,), "no token is suppressed"),
    "begin_suppress_tokens": ((None,), "no token is suppressed"),
    "bad_words_ids": ((None,), "no token is suppressed"),
    "mm_resampler_type": ((None,), "a picture's features go to the projector as they are"),
    "mm_patch_merge_type": (("flat", None), "a picture's features go to the projector as they are"),
    "mm_use_im_start_end": (_FALSE, "no token stands around a picture"),
    "s2": (_FALSE, "pictures are read at one size"),
    "use_mm_proj": ((True, None), "pictures are read through the projector"),
}
"""Keys that may have only these values, each with the reason; of `layer_types`, each entry."""

LLAMA_LIMITED: dict[str, tuple[tuple[object, ...], str]] = {"sliding_window": ((None,), "attention is full")}
"""More of them for the Llama family, whose class in transformers passes this key over, while models beside it use it."""

_HARMLESS = {
    "names only": "_name_or_path architectures transformers_version tokenizer_class finetuning_task problem_type prefix "
    "task_specific_params id2label label2id num_labels",
    "weights are read as float32, whatever they are stored in": "torch_dtype dtype use_bfloat16",
    "for training alone": "attention_dropout initializer_range pretraining_tp gradient_checkpointing tune_mm_mlp_adapter "
    "freeze_mm_mlp_adapter freeze_mm_vision_resampler tune_mm_vision_resampler freeze_backbone mm_projector_lr "
    "mm_vision_tower_lr mm_tunable_parts unfreeze_mm_vision_tower mm_vision_tuning_embedding ignore_text_loss "
    "max_text_token_num use_pos_skipping pos_skipping_range",
    "passed over by transformers, which reads `max_position_embeddings`": "max_sequence_length",
    "how transformers computes the same, or what it returns": "use_cache return_dict output_attentions output_hidden_states "
    "output_scores return_dict_in_generate torchscript tf_legacy_loss attn_implementation _attn_implementation "
    "_attn_implementation_autoset _attn_implementation_internal _flash_attn_2_enabled chunk_size_feed_forward is_decoder "
    "cross_attention_hidden_size remove_invalid_values",
    "the caller chooses how to sample": "temperature top_k top_p typical_p do_sample num_beams num_beam_groups early_stopping "
    "diversity_penalty repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size max_length "
    "min_length num_return_sequences exponential_decay_length_penalty",
    "no such token is read: rows are not padded, and there is no encoder": "pad_token_id sep_token_id decoder_start_token_id "
    "tokenizer_padding_side",
    "without effect where attention is full": "sliding_window max_window_layers",
    "pictures are read through the paired tokenizer": "mm_vision_tower vision_tower mm_vision_select_layer "
    "mm_vision_select_feature mm_use_vq_token s2_scales vision_tower_pretrained delay_load",
    "for `image_aspect_ratio: anyres` alone": "image_grid_pinpoints image_crop_resolution image_split_resolution",
    "for videos, or for a resampler, which is refused": "mm_newline_position mm_spatial_pool_mode mm_spatial_pool_stride "
    "mm_spatial_pool_out_channels add_faster_video add_time_instruction faster_token_stride force_sample",
    "a token that no prompt contains": "mm_use_im_patch_token image_token_index",
}
HARMLESS = {key: reason for reason, keys in _HARMLESS.items() for key in keys.split()}
"""Keys that change nothing that a bundle computes, with the reason."""

_ROPE_KEYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}


def read_architecture(
    directory: HfDirectory, norm_placement: Literal["output", "pre"], ignored_keys: Sequence[str] = ()
) -> TransformerConfig:
    """Read the transformer's sizes from config.json, after every key of it was recognised.

    Args:
        directory: the checkpoint.
        norm_placement: where the norms stand; `output` is the text-to-image model, which has q/k norms too.
        ignored_keys: keys of config.json that are unknown here and that the user knows to be harmless.

    Raises:
        ArgumentError: an ignored key is not one of the unknown ones.
        CheckpointError: config.json asks for what this exporter does not build, has an unknown key, or lacks a size.
    """
    values, path = directory.config, directory.path / "config.json"
    family = family_of(directory)
    if norm_placement == "output" and family is not _LLAMA:
        raise CheckpointError(
            f"{path} gives model_type as {values['model_type']!r}; a text-to-image model is a llava_llama.",
            "Give the text-to-image directory; a model that answers questions is for `tokenflow export understanding`.",
        )
    _require_known_keys(values, path, ignored_keys)
    _require_values(values, path, LIMITED | (LLAMA_LIMITED if family is _LLAMA else {}))
    table = directory.shapes.get(EMBEDDING, ())
    if len(table) != 2:
        raise CheckpointError(f"{directory.path} has no embedding table ({EMBEDDING}).", "Download all of the model's weights.")
    if values.get("vocab_size") is not None and size(directory, "vocab_size") != table[0]:
        raise CheckpointError(
            f"{path} gives vocab_size as {values['vocab_size']}, but {EMBEDDING} has {table[0]} rows.",
            "Check that config.json and the weights are of the same model.",
        )
    if size(directory, "num_hidden_layers") > len(directory.shapes):  # so many keys would take long to list as missing
        raise CheckpointError(
            f"{path} gives num_hidden_layers as {values['num_hidden_layers']}, and there are {len(directory.shapes)} tensors.",
            "Check that config.json and the weights are of the same model.",
        )
    width, heads = size(directory, "hidden_size"), size(directory, "num_attention_heads")
    config = TransformerConfig(
        width=width,
        layers=size(directory, "num_hidden_layers"),
        heads=heads,
        kv_heads=heads if values.get("num_key_value_heads") is None else size(directory, "num_key_value_heads"),
        head_dim=width // heads if values.get("head_dim") is None else size(directory, "head_dim"),
        mlp_width=size(directory, "intermediate_size"),
        norm_eps=_positive(values.get("rms_norm_eps"), "rms_norm_eps", path),
        rope_theta=_rope_theta(values, path),
        norm_placement=norm_placement,
        qk_norm=norm_placement == "output",
        qkv_bias=family.qkv_bias,
    )
    if heads % config.kv_heads or config.head_dim % 2 or (values.get("head_dim") is None and width % heads):
        raise CheckpointError(
            f"{path} gives {width} hidden values, {heads} heads of {config.head_dim} and {config.kv_heads} key/value heads.",
            "Heads must be of one, even size, and those of keys and values a divisor of all.",
        )
    return config


def family_of(directory: HfDirectory) -> Family:
    """The kind of layers that `model_type` names.

    Raises:
        CheckpointError: this exporter does not build it.
    """
    kind = directory.config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise CheckpointError(
            f"{directory.path / 'config.json'} gives model_type as {kind!r}, which this exporter does not build.",
            f"Give a model of one of these types: {', '.join(FAMILIES)}.",
        )
    return FAMILIES[kind]


def head_key(directory: HfDirectory) -> str:
    """The key of the head's weight, which is the embedding table's where config.json ties them.

    Raises:
        CheckpointError: they are tied, and the checkpoint has another head too, or config.json does not say whether they are.
    """
    tied = directory.config.get("tie_word_embeddings")
    if tied not in (True, False, None):
        raise CheckpointError(
            f"{directory.path / 'config.json'} gives tie_word_embeddings as {tied!r}.", "Set it to true or false."
        )
    if not tied:
        return HEAD
    if HEAD in directory.shapes and not torch.equal(directory.tensor(HEAD), directory.tensor(EMBEDDING)):
        raise CheckpointError(
            f"config.json in {directory.path} has tie_word_embeddings, but {HEAD} is not equal to {EMBEDDING}.",
            "Set tie_word_embeddings to false if the model was trained with a head of its own; else remove that tensor.",
        )
    return EMBEDDING


def vocabulary_shapes(directory: HfDirectory, head: str, rows: int, width: int) -> dict[str, tuple[int, ...]]:
    """The shapes of the embedding table and the head by their keys; `head` is the `head_key`.

    Some checkpoints store a tied head too, as a copy of the table.
    """
    return dict.fromkeys([EMBEDDING, head, *([HEAD] if HEAD in directory.shapes else [])], (rows, width))


def size(directory: HfDirectory, key: str) -> int:
    """A size that config.json gives.

    Raises:
        CheckpointError: it is absent, or no positive integer.
    """
    value = directory.config.get(key)
    if type(value) is not int or value < 1:
        raise CheckpointError(
            f"{directory.path / 'config.json'} gives {key} as {value!r}, which is no size.",
            "Give the directory of a released model.",
        )
    return value


def _positive(value: Any, key: str, path: Path) -> float:
    if type(value) not in (int, float) or not 0 < value <= sys.float_info.max:
        raise CheckpointError(
            f"{path} gives {key} as {value!r}, which is no positive number.", "Give the directory of a released model."
        )
    return float(value)


def _require_known_keys(values: Mapping[str, Any], path: Path, ignored_keys: Sequence[str]) -> None:
    known = {*USED, *LIMITED, *HARMLESS}
    unknown = [key for key, value in values.items() if key not in known and value is not None]
    if surplus := [key for key in ignored_keys if key not in unknown]:
        raise ArgumentError(f"{surplus[0]!r} is not an unknown key of {path}.", "Leave that --ignore-key out.")
    if refused := [key for key in unknown if key not in ignored_keys]:
        options = " ".join(f"--ignore-key {key}" for key in refused)
        raise CheckpointError(
            f"{path} has keys that this exporter does not know: {', '.join(refused)}.",
            f"If you know that they change nothing that the model computes, add {options}; else it cannot be exported.",
        )


def _require_values(values: Mapping[str, Any], path: Path, limits: Mapping[str, tuple[tuple[object, ...], str]]) -> None:
    for key, (allowed, reason) in limits.items():
        value = values.get(key, allowed[0])
        if not all(entry in allowed for entry in (value if key == "layer_types" and isinstance(value, list) else [value])):
            raise CheckpointError(
                f"{path} gives {key} as {value!r}, which this exporter does not build: {reason}.",
                f"Give a model whose {key} is {' or '.join(map(repr, allowed))}, as the released ones have it.",
            )


def _rope_theta(values: Mapping[str, Any], path: Path) -> float:
    """The base of RoPE, from where transformers takes it. Released files have it at the top level."""
    given = {key: values[key] for key in ("rope_scaling", "rope_parameters") if values.get(key)}
    key, rope = next(iter(given.items()), ("rope_parameters", {}))
    if not isinstance(rope, dict):
        problem = f"{key} as {rope!r}"
    elif len(given) == 2 and given["rope_scaling"] != given["rope_parameters"]:
        problem = "rope_scaling and rope_parameters that differ"
    elif scaled := [rope[name] for name in ("rope_type", "type") if rope.get(name, "default") != "default"]:
        problem = f"{key} that scales positions by {scaled[0]!r}"
    elif surplus := sorted(key for key, value in rope.items() if key not in _ROPE_KEYS and value is not None):
        problem = f"{key} with {', '.join(surplus)}"
    elif rope.get("partial_rotary_factor") not in (None, 1.0):
        problem = f"{key} with partial_rotary_factor {rope['partial_rotary_factor']!r}"
    else:
        return _positive(rope.get("rope_theta", values.get("rope_theta", 10000.0)), "rope_theta", path)
    raise CheckpointError(
        f"{path} gives {problem}, which this exporter does not build.",
        "Give a model with plain RoPE, as the released ones have; rope_theta may stand at the top level or in rope_parameters.",
    )
