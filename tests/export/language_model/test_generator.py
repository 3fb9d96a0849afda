from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.mini_generator import SMALLEST, export_quietly, generator_shapes, tokenizer_bundle, write_checkpoint
from tokenflow_export.checkpoints.hf_directory import HfDirectory
from tokenflow_export.cli import main
from tokenflow_export.language_model import agreement, generator
from tokenflow_sdk.bundle.bundle import Bundle
from tokenflow_sdk.bundle.model_config import GeneratorConfig, TokenizerConfig
from tokenflow_sdk.errors import CheckpointError, ParityError
from tokenflow_sdk.model.sampling import sample

SIDES = (1, 2)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "hf", SMALLEST, generator_shapes(SMALLEST, 44, 500, SIDES), 40, 500, shards=2)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle[GeneratorConfig]:
    directory = tmp_path_factory.mktemp("generator")
    checkpoint = write_checkpoint(directory / "hf", SMALLEST, generator_shapes(SMALLEST, 44, 500, SIDES), 40, 500)
    out = export_quietly(checkpoint, tokenizer_bundle(directory / "tok", SIDES, 500), directory / "bundle")
    return Bundle.open(out, GeneratorConfig)


def test_only_image_rows_of_the_head_and_text_rows_of_the_embedding_are_exported(bundle: Bundle[GeneratorConfig]) -> None:
    c = bundle.config
    assert (c.text_size, c.image_token_start, c.codebook_size, c.image_start_ids) == (44, 40, 500, (540,))
    sizes = {name: sum(file.size for file in graph.files) for name, graph in bundle.graphs.items()}
    assert 500 * 32 * 4 < sizes["sample"] < 500 * 32 * 4 + 20_000
    assert 44 * 32 * 4 < sizes["embed_text"] < 44 * 32 * 4 + 10_000
    assert c.tokenizer == "../tok"


def test_the_tokenizer_in_the_bundle_knows_text_alone(bundle: Bundle[GeneratorConfig]) -> None:
    text = json.loads((bundle.path / "tokenizer.json").read_text())
    assert text["added_tokens"] == []


@pytest.mark.parametrize("window", [8, 40, 500])
def test_the_sampling_graph_is_its_numpy_twin(bundle: Bundle[GeneratorConfig], window: int) -> None:
    """Same noise, same codes; rows of one call have settings of their own."""
    session = onnxruntime.InferenceSession(bundle.path / "sample.onnx")
    rng = np.random.default_rng(window)
    rows, count = 3, 400
    feeds = {
        "conditional": rng.standard_normal((rows, count, 32), dtype=np.float32),
        "unconditional": rng.standard_normal((rows, count, 32), dtype=np.float32),
        "guidance": np.array([0.0, 0.5, 2.0], np.float32),
        "top_k": np.array([1, window // 2, window], np.int32),
        "top_p": np.array([0.0, 0.7, 1.0], np.float32),
        "noise": rng.random((rows, count), dtype=np.float32),
        "ranks": np.arange(window, dtype=np.int32),
    }
    codes, logits = session.run(["code_indices", "logits"], feeds)
    for row in range(rows):
        expected = sample(logits[row], int(feeds["top_k"][row]), float(feeds["top_p"][row]), feeds["noise"][row])
        assert (codes[row] == expected).mean() >= 0.995
    assert (codes[0] == logits[0].argmax(axis=-1)).all()


@pytest.mark.parametrize("stored", [False, True])
def test_a_tied_head_is_the_image_rows_of_the_embedding(stored: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the graphs, which take long."""
    config, shapes = SMALLEST | {"tie_word_embeddings": True}, generator_shapes(SMALLEST, 44, 500, SIDES)
    del shapes["lm_head.weight"]
    checkpoint = write_checkpoint(tmp_path / "hf", config, shapes, 40, 500)
    table = HfDirectory(checkpoint).tensor("model.embed_tokens.weight")
    if stored:
        weights = load_file(checkpoint / "model.safetensors")
        save_file(weights | {"lm_head.weight": table.clone()}, checkpoint / "model.safetensors")
    written: list[Any] = []
    monkeypatch.setattr(generator, "write_bundle", written.append)
    export_quietly(checkpoint, tokenizer_bundle(tmp_path / "tok", SIDES, 500), tmp_path / "out")
    written[0].job.directory.require(written[0].expected_shapes())
    assert torch.equal(written[0]._image_head(), table[40:540])


def test_shards_and_bins_are_the_same_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    sharded = HfDirectory(checkpoint)
    binary = tmp_path / "bin"
    binary.mkdir()
    (binary / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    torch.save({key: sharded.tensor(key).half() for key in sharded.shapes}, binary / "pytorch_model.bin")
    single = HfDirectory(binary)
    assert single.shapes == sharded.shapes
    key = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(single.tensor(key), sharded.tensor(key).half().float())
    assert single.tensor(key).dtype == torch.float32


def without(directory: Path, key: str) -> None:
    index = directory / "model.safetensors.index.json"
    shards = json.loads(index.read_text())["weight_map"]
    path = directory / shards.pop(key)
    save_file({name: value for name, value in load_file(path).items() if name != key}, path)
    index.write_text(json.dumps({"weight_map": shards}))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda d: (d / "config.json").unlink(), "config.json cannot be read"),
        (lambda d: (d / "config.json").write_text("{"), "config.json is not valid JSON"),
        (lambda d: (d / "config.json").write_text("{}"), "gives model_type as None"),
        (lambda d: (d / "model-00002-of-00002.safetensors").unlink(), "lacks 1 of 2 shards"),
        (lambda d: (d / "model-00002-of-00002.safetensors").write_bytes(b"x" * 100), "cannot be read"),
        (lambda d: (d / "model.safetensors.index.json").unlink(), "holds no weights"),
        (lambda d: (d / "tokenizer.json").unlink(), "tokenizer.json cannot be read.*Download"),
        (lambda d: (d / "tokenizer.json").write_text("{}"), "tokenizer.json cannot be read"),
        (lambda d: without(d, "lm_head.weight"), r"1 missing \(first: lm_head.weight\)"),
        (lambda d: without(d, "model.embed_tokens.weight"), r"has no embedding table \(model.embed_tokens.weight\)"),
        (
            lambda d: (d / "config.json").write_text(json.dumps(SMALLEST | {"num_hidden_layers": 2})),
            r"missing \(first: model.layers.1",
        ),
        (lambda d: (d / "config.json").write_text(json.dumps(SMALLEST | {"intermediate_size": 40})), "mis-shaped"),
    ],
)
def test_damaged_directories_are_named(damage, words: str, checkpoint: Path, tmp_path: Path) -> None:
    damage(checkpoint)
    tokenizer_bundle(tmp_path / "tok", SIDES, 500)
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(CheckpointError, match=words):
        export_quietly(checkpoint, Bundle.open(tmp_path / "tok", TokenizerConfig), tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == before


def test_a_tokenizer_bundle_of_other_scales_does_not_fit(checkpoint: Path, tmp_path: Path) -> None:
    other = tokenizer_bundle(tmp_path / "tok", (1, 2, 3), 500)
    with pytest.raises(CheckpointError, match=r"model\.pos_1LC|model\.lvl_embed"):
        export_quietly(checkpoint, other, tmp_path / "out")


def test_a_graph_that_differs_is_not_written(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement, "MAX_ERROR", 0.0)
    with pytest.raises(ParityError, match="exported graphs differ from the exporter's own"):
        export_quietly(checkpoint, tokenizer_bundle(tmp_path / "tok", SIDES, 500), tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["hf", "tok"]


def test_a_signal_leaves_nothing_behind(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer_bundle(tmp_path / "tok", SIDES, 500)
    seen = []

    def ended(*_: object) -> None:
        seen.extend(os.listdir(tmp_path))
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(generator, "_embed_text_spec", ended)
    words = ["--checkpoint", checkpoint, "--tokenizer", tmp_path / "tok", "--out", tmp_path / "out"]
    assert main(["generator", *map(str, words)]) == 128 + signal.SIGTERM
    assert "interrupted; nothing was written" in capsys.readouterr().err
    assert any(name.startswith(".out.export-") for name in seen)
    assert sorted(os.listdir(tmp_path)) == ["hf", "tok"]


def test_the_command_line(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer_bundle(tmp_path / "tok", SIDES, 500)
    words = ["--checkpoint", checkpoint, "--tokenizer", tmp_path / "tok", "--out", tmp_path / "out"]
    assert main(["generator", *map(str, words)]) == 0
    assert "hidden states differ from the exporter's own PyTorch model by" in capsys.readouterr().out
    Bundle.open(tmp_path / "out", GeneratorConfig).verify()
    assert main(["generator", *map(str, words)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert main(["generator", *map(str, words[:1]), str(tmp_path / "nowhere"), *map(str, words[2:])]) == 2
    assert "config.json cannot be read" in capsys.readouterr().err
