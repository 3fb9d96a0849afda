from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.support.small_language_model import IDS, SIZES, exporters_logits, state_of, transformers_model, write_directory
from tokenflow_export.checkpoints.architecture import FAMILIES, HARMLESS, LIMITED, USED, head_key, read_architecture
from tokenflow_export.checkpoints.hf_directory import HfDirectory
from tokenflow_export.language_model.transformers_model import run_transformers
from tokenflow_sdk.errors import ArgumentError, CheckpointError

LLAMA, QWEN2 = SIZES | {"model_type": "llava_llama"}, SIZES | {"model_type": "llava_qwen"}
# As the released training scripts write it.
RELEASED = {
    "_name_or_path": "checkpoints/i2t_sft",
    "architectures": ["LlavaQwenForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "freeze_mm_mlp_adapter": False,
    "hidden_act": "silu",
    "image_aspect_ratio": "pad",
    "image_grid_pinpoints": None,
    "initializer_range": 0.02,
    "max_window_layers": 70,
    "mm_hidden_size": 40,
    "mm_patch_merge_type": "flat",
    "mm_projector_lr": None,
    "mm_projector_type": "mlp2x_gelu",
    "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False,
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "mm_vision_tower": "tokenflow_siglip_32k.pt",
    "mm_vision_vq_type": "TOKENFLOW",
    "rope_scaling": None,
    "sliding_window": 131072,
    "tokenizer_model_max_length": 2048,
    "tokenizer_padding_side": "right",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.3",
    "tune_mm_mlp_adapter": False,
    "use_cache": True,
    "use_mm_proj": True,
    "use_sliding_window": False,
    # and as other versions of those scripts do
    "add_faster_video": False,
    "add_time_instruction": False,
    "delay_load": True,
    "faster_token_stride": 10,
    "force_sample": False,
    "freeze_mm_vision_resampler": False,
    "image_token_index": 39,
    "max_sequence_length": 2048,
    "mm_newline_position": "grid",
    "mm_resampler_type": None,
    "mm_spatial_pool_mode": "bilinear",
    "mm_spatial_pool_out_channels": None,
    "mm_spatial_pool_stride": 2,
    "pos_skipping_range": 4096,
    "tune_mm_vision_resampler": False,
    "use_pos_skipping": False,
    "vision_tower_pretrained": None,
}
# Other values than a plain model has, of every key that is no name, no number of a size, and no switch.
OTHER: dict[str, list[Any]] = {
    "hidden_size": [24],
    "intermediate_size": [16],
    "num_hidden_layers": [1],
    "num_attention_heads": [2],
    "num_key_value_heads": [1, 4],
    "head_dim": [6, 8],
    "vocab_size": [48],
    "max_position_embeddings": [8],
    "rms_norm_eps": [1e-2],
    "initializer_range": [0.5],
    "attention_dropout": [0.5],
    "hidden_act": ["gelu", "relu", "swish"],
    "rope_theta": [20.0, 1_000_000],
    "rope_scaling": [
        {"rope_type": "default", "rope_theta": 20.0},
        {"type": "linear", "factor": 4.0},
        {"rope_type": "dynamic", "factor": 4.0},
        {"factor": 4.0},
    ],
    "rope_parameters": [
        {"rope_type": "default", "rope_theta": 20.0},
        {"rope_theta": 20.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    ],
    "partial_rotary_factor": [0.5, 1.0],
    "layer_types": [["full_attention"] * 2, ["full_attention", "sliding_attention"]],
    "sliding_window": [4],
    "max_window_layers": [0, 1],
    "eos_token_id": [3, [3, 4]],
    "dtype": ["float16"],
    "architectures": [["MistralForCausalLM"]],
    "id2label": [{0: "a"}],
    "label2id": [{"a": 0}],
    "problem_type": ["regression"],
    "model_type": ["llama", "qwen2", "llava", "mistral"],
    "quantization_config": [{"quant_method": "gptq"}],
}


def keys_of(name: str) -> list[str]:
    """Every key that a class of transformers' reads from config.json or writes into it."""
    import transformers

    cls = getattr(transformers, name)
    fields = {field.name for field in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else set()
    return sorted(
        fields | set(cls().to_dict()) | {"rope_theta", "rope_scaling", "partial_rotary_factor", "quantization_config"}
    )


def other_values(key: str, config: Any) -> list[Any]:
    default = config.to_dict().get(key)
    return OTHER.get(key) or [not default if isinstance(default, bool) else "x" if isinstance(default, str) else 1]


@pytest.mark.parametrize("kind", ["llava_llama", "llava_qwen"])
def test_each_key_of_transformers_configs_is_used_or_harmless_or_refused(kind: str, tmp_path: Path) -> None:
    """Whatever a key says, the exporter computes what transformers computes, or names the key."""
    plain, refused = transformers_model(SIZES | {"model_type": kind}), 0
    for key in keys_of(f"{FAMILIES[kind].name}Config"):
        for number, value in enumerate(other_values(key, plain.config)):
            values = SIZES | {"model_type": kind} | {key: value}
            known = values["model_type"] in FAMILIES
            model = transformers_model(values | {"return_dict": True}) if known else plain
            directory = write_directory(tmp_path / f"{key}{number}", values, state_of(model))
            try:
                found = exporters_logits(directory, IDS)
            except CheckpointError as error:
                assert key in str(error), (key, value)
                refused += 1
                continue
            assert (found - model(IDS[None]).logits[0]).abs().max() < 1e-4, (key, value)
    assert refused >= 12


@pytest.mark.parametrize("kind", ["llava_llama", "llava_qwen"])
def test_null_is_as_good_as_absent(kind: str, tmp_path: Path) -> None:
    """To the exporter, and to transformers as it is compared with. What a plain model must have is refused as null, below."""
    values = SIZES | {"model_type": kind}
    needed = {*SIZES, "model_type", "hidden_act"}
    keys = {*keys_of(f"{FAMILIES[kind].name}Config"), *USED, *LIMITED, *HARMLESS, "auto_map", "text_config", "colour"} - needed
    model = transformers_model(values)
    rope = {"rope_type": "default", "factor": None}
    directory = write_directory(tmp_path, dict.fromkeys(keys) | values | {"rope_scaling": rope}, state_of(model))
    expected = model(IDS[None]).logits[0]
    torch.testing.assert_close(exporters_logits(directory, IDS), expected, rtol=0, atol=1e-4)
    with torch.inference_mode():
        torch.testing.assert_close(run_transformers(directory, IDS, lambda text: text)[1], expected, rtol=1e-5, atol=1e-5)


def test_a_key_stands_in_one_table() -> None:
    assert len({*USED, *LIMITED, *HARMLESS}) == len(USED) + len(LIMITED) + len(HARMLESS)


def test_a_config_as_released_is_read(tmp_path: Path) -> None:
    weights = state_of(transformers_model(QWEN2))
    config = read_architecture(write_directory(tmp_path, QWEN2 | RELEASED, weights), "pre")
    assert (config.width, config.layers, config.heads, config.kv_heads, config.head_dim) == (16, 2, 4, 2, 4)
    assert (config.mlp_width, config.norm_eps, config.rope_theta) == (24, 1e-5, 1e4)
    assert (config.norm_placement, config.qk_norm, config.qkv_bias) == ("pre", False, True)
    config = read_architecture(write_directory(tmp_path, LLAMA, weights), "output")
    assert (config.norm_placement, config.qk_norm, config.qkv_bias) == ("output", True, False)
    with pytest.raises(CheckpointError, match="llava_qwen.*text-to-image.*`tokenflow export understanding`"):
        read_architecture(write_directory(tmp_path, QWEN2, weights), "output")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> HfDirectory:
    return write_directory(tmp_path_factory.mktemp("llama"), LLAMA, state_of(transformers_model(LLAMA)))


def refusal(directory: HfDirectory, values: dict[str, Any]) -> str:
    (directory.path / "config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError) as error:
        read_architecture(HfDirectory(directory.path), "pre")
    return str(error.value)


@pytest.mark.parametrize(
    "kind", ["mistral", "llava_mistral", "granite", "minicpm", "smollm3", "qwen3", "frobnicator", None, ["llama"]]
)
def test_other_models_are_refused(kind: object, directory: HfDirectory) -> None:
    assert f"model_type as {kind!r}" in refusal(directory, SIZES | {"model_type": kind})
    assert "model_type as None" in refusal(directory, SIZES)


@pytest.mark.parametrize(
    "change",
    [
        {"sliding_window": 16},
        {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 16},
        {"attention_bias": True},
        {"mlp_bias": True},
        {"embedding_multiplier": 12.0},
        {"residual_multiplier": 0.2},
        {"logits_scaling": 8.0},
        {"scale_emb": 12},
        {"no_rope_layers": [0]},
        {"text_config": dict(SIZES)},
        {"auto_map": {"AutoModel": "x"}},
        {"hidden_act": None},
        {"hidden_act": ["silu"]},
        {"hidden_act": []},
        {"num_hidden_layers": 10**9},
        {"hidden_act": "gelu_pytorch_tanh"},
        {"quantization_config": {"quant_method": "bitsandbytes"}},
        {"mm_patch_merge_type": "spatial_unpad"},
        {"mm_use_im_start_end": True},
        {"vocab_size": 39},
        {"vocab_size": "40"},
        {"hidden_size": None},
        {"hidden_size": 16.0},
        {"num_hidden_layers": True},
        {"intermediate_size": 0},
        {"rms_norm_eps": None},
        {"rms_norm_eps": float("nan")},
        {"rms_norm_eps": 0},
        {"rope_theta": None},
        {"rope_theta": "1e4"},
        {"rope_theta": float("inf")},
        {"rope_theta": 10**400},
        {"rope_theta": -1.0},
        {"partial_rotary_factor": 0.5},
        {"rope_scaling": "linear"},
    ],
    ids=str,
)
def test_what_is_not_built_is_refused_by_name(change: dict[str, Any], directory: HfDirectory) -> None:
    assert next(iter(change)) in refusal(directory, LLAMA | change)


@pytest.mark.parametrize("change", [{"num_attention_heads": 3}, {"num_key_value_heads": 3}, {"head_dim": 5}], ids=str)
def test_heads_that_cannot_be_are_refused(change: dict[str, Any], directory: HfDirectory) -> None:
    assert "key/value heads" in refusal(directory, LLAMA | change)


@pytest.mark.parametrize("place", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize(
    ("rope", "words"),
    [
        *(({"type": kind, "factor": 4.0}, f"scales positions by '{kind}'") for kind in ("linear", "yarn", "longrope", "mrope")),
        ({"rope_type": "default", "type": "yarn"}, "scales positions by 'yarn'"),
        ({"rope_type": None}, "scales positions by None"),
        ({"factor": 4.0}, "with factor"),
        ({"full_attention": {"rope_type": "default", "rope_theta": 1e6}}, "with full_attention"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"rope_type": "default", "rope_theta": None}, "rope_theta as None"),
    ],
    ids=str,
)
def test_rope_that_is_not_plain_is_refused(place: str, rope: dict[str, Any], words: str, directory: HfDirectory) -> None:
    assert words in refusal(directory, LLAMA | {place: rope})


def test_ropes_that_contradict_each_other_are_refused(directory: HfDirectory) -> None:
    both = {
        "rope_scaling": {"rope_type": "default"},
        "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6},
    }
    assert "rope_scaling and rope_parameters that differ" in refusal(directory, LLAMA | both)


def test_an_unknown_key_can_be_declared_harmless(directory: HfDirectory) -> None:
    (directory.path / "config.json").write_text(json.dumps(LLAMA | {"colour": "red", "shape": "round"}))
    odd = HfDirectory(directory.path)
    with pytest.raises(CheckpointError, match="does not know: colour, shape.*--ignore-key colour --ignore-key shape"):
        read_architecture(odd, "pre")
    with pytest.raises(CheckpointError, match="does not know: shape"):
        read_architecture(odd, "pre", ["colour"])
    assert read_architecture(odd, "pre", ["colour", "shape"]) == read_architecture(directory, "pre")
    with pytest.raises(ArgumentError, match="'hidden_size' is not an unknown key"):
        read_architecture(odd, "pre", ["colour", "shape", "hidden_size"])


def test_a_tied_head_is_the_embedding_table_or_refused(tmp_path: Path) -> None:
    model = transformers_model(LLAMA | {"tie_word_embeddings": True})
    state, head = state_of(model), model.lm_head.weight
    tied = LLAMA | {"tie_word_embeddings": True}
    expected = model(IDS[None]).logits[0]
    for name, weights in (("alone", state), ("twice", state | {"lm_head.weight": head})):
        directory = write_directory(tmp_path / name, tied, weights)
        if name == "alone":
            torch.testing.assert_close(exporters_logits(directory, IDS), expected, rtol=0, atol=1e-4)
        assert head_key(directory) == "model.embed_tokens.weight"
    other = write_directory(tmp_path / "other", tied, state | {"lm_head.weight": head + 1e-3})
    with pytest.raises(CheckpointError, match="has tie_word_embeddings, but lm_head.weight is not equal"):
        head_key(other)
    own = write_directory(tmp_path / "own", LLAMA, state | {"lm_head.weight": head + 1e-3})
    assert head_key(own) == "lm_head.weight"
    own.config["tie_word_embeddings"] = "false"
    with pytest.raises(CheckpointError, match="gives tie_word_embeddings as 'false'"):
        head_key(own)


def test_a_table_that_is_missing_is_named(tmp_path: Path) -> None:
    tied = LLAMA | {"tie_word_embeddings": True}
    state = state_of(transformers_model(tied))
    write_directory(tmp_path, tied, state)
    for shape in (None, (), (40,)):
        weights = {key: value for key, value in state.items() if key != "model.embed_tokens.weight"}
        if shape is not None:
            weights["model.embed_tokens.weight"] = torch.zeros(shape)
        save_file(weights | {"lm_head.weight": torch.zeros(40, 16)}, tmp_path / "model.safetensors")
        with pytest.raises(CheckpointError, match=r"has no embedding table \(model.embed_tokens.weight\)"):
            read_architecture(HfDirectory(tmp_path), "pre")
