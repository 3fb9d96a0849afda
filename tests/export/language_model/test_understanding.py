from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from tests.support.mini_generator import tokenizer_bundle
from tests.support.mini_understander import (
    GEOMETRIES,
    SMALLEST,
    byte_fallback_tokenizer,
    byte_level_tokenizer,
    export_quietly,
    reference_model,
    reference_projector,
    write_checkpoint,
)
from tokenflow_export.checkpoints.architecture import read_architecture
from tokenflow_export.checkpoints.hf_directory import HfDirectory
from tokenflow_export.cli import main
from tokenflow_export.language_model import agreement, understanding
from tokenflow_export.language_model.chat_template import chat_template, stop_ids
from tokenflow_export.language_model.understanding import _context
from tokenflow_export.precision.generator_search import open_exact
from tokenflow_export.tracing.weight_quantization import ExportPrecision
from tokenflow_sdk import AnswerParams, Tokenizer, Understander
from tokenflow_sdk.bundle.bundle import Bundle
from tokenflow_sdk.bundle.model_config import TokenizerConfig, UnderstanderConfig
from tokenflow_sdk.errors import CheckpointError, ParityError
from tokenflow_sdk.parity.certificate import certify
from tokenflow_sdk.parity.understander import UnderstanderReference

SIDES = (1, 2)
FEATURES = np.random.default_rng(0).standard_normal((4, 40)).astype(np.float32)


def checkpoint_of(directory: Path, config: dict) -> Path:
    return write_checkpoint(directory, config, reference_model(config), reference_projector(config["hidden_size"]))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return checkpoint_of(tmp_path / "hf", SMALLEST)


@pytest.fixture
def tokenizer(tmp_path: Path) -> Bundle[TokenizerConfig]:
    return tokenizer_bundle(tmp_path / "tok", SIDES, 500)


@pytest.mark.parametrize(
    ("keys", "preprocess"),
    [
        ({"image_aspect_ratio": "pad"}, "pad-grey"),
        ({"image_aspect_ratio": "square"}, "squash"),
        ({"image_aspect_ratio": None}, "squash"),
        ({}, "squash"),
    ],
)
def test_pictures_are_prepared_as_in_training(
    keys: dict[str, Any],
    preprocess: str,
    checkpoint: Path,
    tokenizer: Bundle[TokenizerConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without the graphs, which take long."""
    damaged_config(**keys)(checkpoint)
    written = []
    monkeypatch.setattr(understanding, "write_bundle", written.append)
    export_quietly(checkpoint, tokenizer, tmp_path / "out")
    assert [source.config.preprocess for source in written] == [preprocess]


def test_the_bundle_says_what_the_directory_says(checkpoint: Path, tokenizer: Bundle[TokenizerConfig], tmp_path: Path) -> None:
    (checkpoint / "generation_config.json").write_text(json.dumps({"eos_token_id": [260, 259]}))
    bundle = Bundle.open(export_quietly(checkpoint, tokenizer, tmp_path / "chat"), UnderstanderConfig)
    c = bundle.config
    assert (c.width, c.layers, c.kv_heads, c.head_dim, c.context, c.vocabulary) == (32, 1, 2, 8, 1024, 288)
    assert (c.image_tokens, c.code_dim, c.patch_nums, c.tokenizer) == (4, 40, SIDES, "../tok")
    assert c.stop_ids == (259, 260)
    assert c.preprocess == "squash"
    assert c.template == chat_template(byte_level_tokenizer(), tmp_path)
    assert list(bundle.graphs) == ["embed_text", "project", "transformer", "head"]
    assert bundle.parity["hidden_error"] < 1e-4
    assert bundle.parity["same_code"] == 1.0
    bundle.verify()
    reference = UnderstanderReference.load(bundle)
    assert (reference.features.shape, reference.hidden.shape, reference.likeliest.shape) == ((4, 40), (1, 56, 32), (1, 56))
    assert len(reference) == 56


@pytest.mark.parametrize("precision", [ExportPrecision("fp32", "int8"), ExportPrecision("fp16", "int4")], ids=str)
def test_fewer_bits_are_smaller_and_measured(
    precision: ExportPrecision, checkpoint: Path, tokenizer: Bundle[TokenizerConfig], tmp_path: Path
) -> None:
    out = export_quietly(checkpoint, tokenizer, tmp_path / "chat", precision)
    bundle = Bundle.open(out, UnderstanderConfig)
    sizes = {name: sum(file.size for file in graph.files) for name, graph in bundle.graphs.items()}
    assert sizes["head"] < 288 * 32 * 4 / 2 + 12_000
    assert bundle.parity["hidden_cosine"] > 0.9
    assert bundle.parity["overlap"] > 0.7
    reference = UnderstanderReference.load(bundle)
    assert len(reference.hidden) == len(reference.likeliest) == (2 if precision.weights == "int8" else 1)
    if precision.weights == "int8":
        certificate = certify(bundle, open_exact, "fp32", pages=16, page_size=16)
        assert certificate.figures["hidden_error"] < 1e-4
        assert certificate.figures["same_choice"] == 1
    with Understander.from_pretrained(out, tokenizer=Tokenizer(tokenizer)) as understander:
        params = AnswerParams(max_tokens=8, stop_ids=())
        alone = understander.answer(FEATURES, "what?", params=params)
        together = understander.answer_batch([(FEATURES, "what?"), (FEATURES, "and?")], params=params)
        assert together[0].token_ids == alone.token_ids


def test_a_tied_head_may_be_saved_as_well(tokenizer: Bundle[TokenizerConfig], tmp_path: Path) -> None:
    config = SMALLEST | {"tie_word_embeddings": True}
    checkpoint = checkpoint_of(tmp_path / "hf", config)
    shard = checkpoint / "model-00001-of-00002.safetensors"
    weights = load_file(shard)
    table = HfDirectory(checkpoint).tensor("model.embed_tokens.weight")
    save_file(weights | {"lm_head.weight": table}, shard)
    index = checkpoint / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"] | {"lm_head.weight": shard.name}
    index.write_text(json.dumps({"weight_map": weight_map}))
    bundle = Bundle.open(export_quietly(checkpoint, tokenizer, tmp_path / "chat"), UnderstanderConfig)
    assert bundle.parity["same_code"] == 1.0


def test_rope_is_read_where_either_library_version_writes_it(tmp_path: Path) -> None:
    old = checkpoint_of(tmp_path / "old", GEOMETRIES["llama"])
    config = read_architecture(HfDirectory(old), "pre")
    assert (config.rope_theta, config.qkv_bias, config.norm_placement) == (5e3, False, "pre")
    values = json.loads((old / "config.json").read_text())
    theta = values.pop("rope_theta")
    (old / "config.json").write_text(json.dumps(values | {"rope_parameters": {"rope_type": "default", "rope_theta": theta}}))
    assert read_architecture(HfDirectory(old), "pre") == config
    (old / "config.json").write_text(json.dumps(values))
    assert read_architecture(HfDirectory(old), "pre") == replace(config, rope_theta=10000.0)


def test_templates_follow_the_control_tokens(tmp_path: Path) -> None:
    vicuna = chat_template(byte_fallback_tokenizer(), tmp_path)
    assert (vicuna.opening[0], vicuna.closing) == (1, (2,))
    assert stop_ids(vicuna, {"eos_token_id": 2}, tmp_path, 300) == (2,)
    assert stop_ids(vicuna, {}, tmp_path, 300) == (2,)
    (tmp_path / "generation_config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="generation_config.json is not an object"):
        stop_ids(vicuna, {}, tmp_path, 300)


@pytest.mark.parametrize(("trained", "context"), [(None, 1024), (64, 64), (4096, 1024)])
def test_the_context_is_that_of_training(trained: int | None, context: int, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SMALLEST | {"tokenizer_model_max_length": trained}))
    (tmp_path / "pytorch_model.bin").touch()
    assert _context(HfDirectory(tmp_path)) == context


def damaged_config(**values: object):
    return lambda d: (d / "config.json").write_text(json.dumps(SMALLEST | values))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda d: (d / "config.json").unlink(), "config.json cannot be read"),
        (lambda d: (d / "model-00002-of-00002.safetensors").unlink(), "lacks 1 of 2 shards"),
        (lambda d: (d / "tokenizer.json").unlink(), "tokenizer.json cannot be read"),
        (lambda d: (d / "tokenizer.json").write_text(byte_level_tokenizer().to_str().replace("<|im_", "<|in_")), "has neither"),
        (damaged_config(vocab_size=None), "gives vocab_size as None"),
        (damaged_config(max_position_embeddings="long"), "gives max_position_embeddings as 'long'"),
        (damaged_config(tokenizer_model_max_length=True), "gives tokenizer_model_max_length as True"),
        (damaged_config(mm_hidden_size=1152), "gives mm_hidden_size as 1152"),
        (damaged_config(eos_token_id=True), "gives eos_token_id as True"),
        (damaged_config(vocab_size=289), r"gives vocab_size as 289, but model.embed_tokens.weight has 288 rows"),
        (damaged_config(num_hidden_layers=2), r"missing \(first: model.layers.1"),
        (damaged_config(intermediate_size=40), "mis-shaped"),
        (damaged_config(rope_scaling={"type": "yarn", "factor": 4.0}), "scales positions by 'yarn'"),
        (damaged_config(use_sliding_window=True), "use_sliding_window as True.*attention is full"),
        (damaged_config(hidden_act="gelu"), "hidden_act as 'gelu'.*SiLU"),
        (damaged_config(image_aspect_ratio="anyres"), "gives image_aspect_ratio as 'anyres'"),
        (damaged_config(image_aspect_ratio="anyres_max_9"), "gives image_aspect_ratio as 'anyres_max_9'"),
        (damaged_config(image_aspect_ratio=["pad"]), "gives image_aspect_ratio as"),
    ],
)
def test_damaged_directories_are_named(
    damage, words: str, checkpoint: Path, tokenizer: Bundle[TokenizerConfig], tmp_path: Path
) -> None:
    damage(checkpoint)
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(CheckpointError, match=words):
        export_quietly(checkpoint, tokenizer, tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == before


def test_a_head_that_is_missing_or_surplus_is_named(tokenizer: Bundle[TokenizerConfig], tmp_path: Path) -> None:
    tied = checkpoint_of(tmp_path / "hf", SMALLEST | {"tie_word_embeddings": True})
    (tied / "config.json").write_text(json.dumps(SMALLEST))
    with pytest.raises(CheckpointError, match=r"1 missing \(first: lm_head.weight\)"):
        export_quietly(tied, tokenizer, tmp_path / "out")


def test_features_of_another_width_do_not_fit(checkpoint: Path, tmp_path: Path) -> None:
    other = tokenizer_bundle(tmp_path / "other", SIDES, 500, semantic_dim=16)
    words = r"mis-shaped \(first: model.mm_projector.0.weight \[32, 40\] instead of \[32, 24\]"
    with pytest.raises(CheckpointError, match=words):
        export_quietly(checkpoint, other, tmp_path / "out")


def test_a_graph_that_differs_is_not_written(
    checkpoint: Path, tokenizer: Bundle[TokenizerConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agreement, "MAX_ERROR", 0.0)
    with pytest.raises(ParityError, match="exported graphs differ from transformers"):
        export_quietly(checkpoint, tokenizer, tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["hf", "tok"]


def test_the_command_line(
    checkpoint: Path, tokenizer: Bundle[TokenizerConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--checkpoint", checkpoint, "--tokenizer", tokenizer.path, "--out", tmp_path / "out"]
    assert main(["understanding", *map(str, words)]) == 0
    assert "likeliest token the same at 100.0% of positions" in capsys.readouterr().out
    assert main(["understanding", *map(str, words)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert main(["understanding", *map(str, words), "--weights", "int8", "--dtype", "fp16"]) == 2
    assert "Leave --dtype fp16 out" in capsys.readouterr().err
