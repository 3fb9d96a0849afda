"""Triton is not here: its schema parses what it would read, and onnxruntime runs the files as its onnxruntime backend would."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format

from tests.conftest import DATA, ROOT
from tokenflow_export.tracing.onnx_export import file_entry
from tokenflow_sdk import Tokenizer
from tokenflow_sdk.backends.providers import CUDA, SETTINGS
from tokenflow_sdk.bundle.bundle import Bundle
from tokenflow_sdk.bundle.model_config import TokenizerConfig
from tokenflow_sdk.bundle.schema import TensorSpec
from tokenflow_sdk.cli import main
from tokenflow_sdk.engines.triton_repository import write_triton_repository
from tokenflow_sdk.errors import BackendError, CorruptBundleError, OutputError

GRAPHS = ["decode", "encode", "features", "semantic"]
TYPES = {"TYPE_UINT8": "tensor(uint8)", "TYPE_INT32": "tensor(int32)", "TYPE_FP32": "tensor(float)"}


@pytest.fixture(scope="module")
def schema() -> Any:
    """`ModelConfig` of model_config.proto, as tritonclient 2.73 carries it."""
    file = descriptor_pb2.FileDescriptorProto.FromString((DATA / "triton_model_config.pb").read_bytes())
    return message_factory.GetMessages([file], descriptor_pool.DescriptorPool())["inference.ModelConfig"]


def config_of(model: Path, schema: Any) -> Any:
    """What Triton reads; unknown fields and values are errors."""
    return text_format.Parse((model / "config.pbtxt").read_text(), schema())


def test_what_is_written_is_in_tritons_schema_and_is_what_the_files_say(
    mini_bundle: Path, tmp_path: Path, schema: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "models"
    assert main(["build", str(mini_bundle), "--triton", str(out)]) == 0
    assert "encode" in capsys.readouterr().out
    assert sorted(os.listdir(tmp_path)) == ["models"]
    assert sorted(os.listdir(out)) == GRAPHS
    for name in GRAPHS:
        config = config_of(out / name, schema)
        assert (config.name, config.backend, config.max_batch_size) == (name, "onnxruntime", 8)
        assert config.HasField("dynamic_batching")
        (cuda,) = config.optimization.execution_accelerators.gpu_execution_accelerator
        assert (cuda.name, dict(cuda.parameters)) == ("cuda", SETTINGS[CUDA])
        assert cuda.parameters["use_tf32"] == "0"
        session = onnxruntime.InferenceSession(out / name / "1" / "model.onnx", providers=["CPUExecutionProvider"])
        for written, tensors in ((config.input, session.get_inputs()), (config.output, session.get_outputs())):
            types = [
                each.DESCRIPTOR.fields_by_name["data_type"].enum_type.values_by_number[each.data_type].name for each in written
            ]
            said = [(each.name, TYPES[kind], list(each.dims)) for each, kind in zip(written, types, strict=True)]
            # Triton requires that a dimension for the batch comes first, and that it is free.
            assert said == [(tensor.name, tensor.type, tensor.shape[1:]) for tensor in tensors]
            assert all(isinstance(tensor.shape[0], str) for tensor in tensors)


def test_requests_that_triton_joins_get_what_each_gets_alone(mini_bundle: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    write_triton_repository(tokenizer.bundle, tmp_path / "models", 4)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), np.uint8)

    def run(name: str, feed: dict[str, Any]) -> list[Any]:
        path = tmp_path / "models" / name / "1" / "model.onnx"
        return list(onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, feed))

    codes = run("encode", {"images": pixels})[0]
    assert np.array_equal(codes, tokenizer.encode_array(pixels))
    pictures = run("decode", {"code_indices": codes})[0]
    # Triton opens the file as it is; a Tokenizer's session rewrites it for the CPU, which rounds otherwise.
    alone = np.concatenate([run("decode", {"code_indices": row[None]})[0] for row in codes])
    assert np.array_equal(pictures, alone)
    assert np.abs(np.subtract(pictures, tokenizer.decode_array(codes), dtype=int)).max() <= 1


def test_weights_beside_a_graph_come_with_it(bundle_copy: Path, tmp_path: Path, schema: Any) -> None:
    bundle, graph = Bundle.open(bundle_copy, TokenizerConfig), ir.load(bundle_copy / "decode.onnx")
    ir.save(graph, bundle_copy / "decode.onnx", external_data="decode.onnx.data", size_threshold_bytes=1024)
    files = tuple(file_entry(bundle_copy / name) for name in ("decode.onnx", "decode.onnx.data"))
    bundle = replace(bundle, graphs={"decode": replace(bundle.graphs["decode"], files=files)})
    write_triton_repository(bundle, tmp_path / "models", 1)
    decode = tmp_path / "models" / "decode"
    assert sorted(os.listdir(decode / "1")) == ["decode.onnx.data", "model.onnx"]
    shutil.rmtree(bundle_copy)
    onnxruntime.InferenceSession(decode / "1" / "model.onnx", providers=["CPUExecutionProvider"])
    # Nothing is joined where a call takes one picture.
    assert not config_of(decode, schema).HasField("dynamic_batching")


@pytest.mark.usefixtures("machine")
def test_engines_are_those_that_were_built(mini_bundle: Path, tmp_path: Path, schema: Any) -> None:
    words = ["build", str(mini_bundle), "--backend", "tensorrt", "--batch-limit", "4", "--triton", str(tmp_path / "models")]
    assert main(words) == 0
    built = {path.read_bytes() for path in (tmp_path / "cache").glob("*.engine")}
    assert {(tmp_path / "models" / name / "1" / "model.plan").read_bytes() for name in GRAPHS} == built
    configs = [config_of(tmp_path / "models" / name, schema) for name in GRAPHS]
    assert {(config.backend, config.max_batch_size) for config in configs} == {("tensorrt", 4)}
    assert not any(config.HasField("optimization") for config in configs)


def test_only_what_was_written_here_is_replaced(mini_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["build", str(mini_bundle), "--triton", str(tmp_path / "models")]
    assert main(words) == 0
    assert main(words) == 2
    assert "give --force" in capsys.readouterr().err
    assert main([*words, "--force", "--batch-limit", "2"]) == 0
    assert "max_batch_size: 2" in (tmp_path / "models" / "encode" / "config.pbtxt").read_text()
    (tmp_path / "models" / "mine").mkdir()
    (tmp_path / "models" / "mine" / "config.pbtxt").write_text('name: "mine"')
    assert main([*words, "--force"]) == 2
    assert "not a Triton repository" in capsys.readouterr().err
    assert (tmp_path / "models" / "mine").exists()


def test_a_damaged_bundle_leaves_nothing(bundle_copy: Path, tmp_path: Path) -> None:
    bundle = Bundle.open(bundle_copy, TokenizerConfig)
    data = (bundle_copy / "decode.onnx").read_bytes()
    (bundle_copy / "decode.onnx").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(CorruptBundleError, match="damaged"):
        write_triton_repository(bundle, tmp_path / "out" / "models", 8)
    assert not (tmp_path / "out").exists()


def test_an_engine_that_is_gone_is_named(mini_bundle: Path, tmp_path: Path) -> None:
    engines = {name: tmp_path / f"{name}.engine" for name in GRAPHS}
    with pytest.raises(BackendError, match=r"decode\.engine is gone|encode\.engine is gone"):
        write_triton_repository(Bundle.open(mini_bundle, TokenizerConfig), tmp_path / "models", 8, engines)
    assert os.listdir(tmp_path) == []


def test_what_cannot_be_joined_is_refused(mini_bundle: Path, tmp_path: Path) -> None:
    bundle = Bundle.open(mini_bundle, TokenizerConfig)
    more = replace(bundle.graphs["encode"], outputs=(*bundle.graphs["encode"].outputs, TensorSpec("mean", "float32", (20,))))
    with pytest.raises(CorruptBundleError, match="mean.* does not begin with the pictures"):
        write_triton_repository(replace(bundle, graphs={"encode": more}), tmp_path / "models", 8)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (["--backend", "tensorrt-rtx"], "Give --backend tensorrt"),
        (["--precision", "fp16"], "choose another --backend"),
        (["--config", "h100", "--backend", "tensorrt-rtx"], "Give --backend tensorrt"),
    ],
)
def test_what_triton_cannot_run_is_said_at_once(
    options: list[str], wanted: str, mini_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["build", str(mini_bundle), "--triton", str(tmp_path / "models"), *options]) == 2
    assert wanted in capsys.readouterr().err
    assert os.listdir(tmp_path) == []


def test_a_generator_is_not_for_triton(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["build", str(ROOT / "models" / "tiny" / "generator"), "--triton", str(tmp_path / "models")]) == 2
    assert "not a tokenizer" in capsys.readouterr().err
    assert main(["build", str(ROOT / "models" / "tiny" / "generator"), "--force"]) == 2
    assert "--triton DIR" in capsys.readouterr().err


def test_a_place_that_cannot_be_written_is_named(mini_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="Writing .*file/models failed"):
        write_triton_repository(Bundle.open(mini_bundle, TokenizerConfig), tmp_path / "file" / "models", 8)
