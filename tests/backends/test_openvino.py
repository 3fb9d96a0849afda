from __future__ import annotations

import importlib
import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tokenflow_sdk.backends import openvino as backend
from tokenflow_sdk.backends.onnxruntime import open_onnxruntime
from tokenflow_sdk.backends.openvino import OpenVinoSession, compile_graph, import_openvino, properties, runs_by_picture
from tokenflow_sdk.backends.session import Session, SessionOptions
from tokenflow_sdk.bundle.bundle import Bundle, find_bundle
from tokenflow_sdk.bundle.model_config import GeneratorConfig, TokenizerConfig
from tokenflow_sdk.errors import ArgumentError, BackendError, CorruptBundleError, MissingPackageError

try:
    import openvino
except ImportError:
    openvino = None

needs_openvino = pytest.mark.skipif(openvino is None, reason="openvino is not installed: pip install 'tokenflow-sdk[openvino]'")
CPU = SessionOptions("cpu", threads=1)


def open_graph(bundle: Path, name: str, options: SessionOptions = CPU) -> Session:
    entry = Bundle.open(bundle, TokenizerConfig).graph(name)
    return OpenVinoSession(compile_graph(bundle / entry.files[0].name, entry, options), entry, options.device)


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'tokenflow-sdk\[openvino\]'"):
        import_openvino()


def test_nobody_is_told_of_its_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "openvino.py").write_text(
        "try:\n    import openvino_telemetry\n    told = True\nexcept ImportError:\n    told = False\n"
    )
    (tmp_path / "openvino_telemetry.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] in ("openvino", "openvino_telemetry")]:
        monkeypatch.delitem(sys.modules, name)
    assert not import_openvino().told
    assert importlib.import_module("openvino_telemetry") is not None
    monkeypatch.delitem(sys.modules, "openvino")
    monkeypatch.delitem(sys.modules, "openvino_telemetry")


def test_products_are_in_float32_and_threads_are_those_of_onnxruntime(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own choice is bfloat16 on recent processors, and threads pinned to cores."""
    monkeypatch.setattr(backend, "available_cores", lambda: 8)
    for threads, streams, all_threads in ((None, "1", "8"), (2, "4", "8"), (3, "2", "6"), (9, "1", "9")):
        found = properties(SessionOptions("auto", threads=threads))
        assert (found["NUM_STREAMS"], found["INFERENCE_NUM_THREADS"]) == (streams, all_threads)
        assert (found["INFERENCE_PRECISION_HINT"], found["DYNAMIC_QUANTIZATION_GROUP_SIZE"]) == ("f32", "0")
        assert found["ENABLE_CPU_PINNING"] == "NO"
    assert properties(SessionOptions("gpu:1"))["INFERENCE_PRECISION_HINT"] == "f32"
    assert properties(SessionOptions("npu"))["INFERENCE_PRECISION_HINT"] == "f16"
    assert "NUM_STREAMS" not in properties(SessionOptions("npu"))


def test_only_what_has_no_open_dimension_but_the_batch_is_run(mini_bundle: Path) -> None:
    assert all(map(runs_by_picture, Bundle.open(mini_bundle, TokenizerConfig).graphs.values()))
    generator = Bundle.open(find_bundle("tiny", "generator"), GeneratorConfig)
    assert not runs_by_picture(generator.graph("transformer"))
    with pytest.raises(
        BackendError, match=r"transformer.onnx has open dimensions besides its batch.*Leave backend= or build_config= out"
    ):
        compile_graph(generator.graph_path("transformer"), generator.graph("transformer"), CPU)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("Exception from core.cpp:1:\nException from plugin.cpp:2:\nno OpenCL here\n\n", "no OpenCL here"),
        ("Exception from core.cpp:1:\nCheck 'x' failed at y.cpp:3\n", "Exception from core.cpp:1:"),
        ("", "RuntimeError"),
    ],
)
def test_errors_say_what_openvino_said(text: str, told: str) -> None:
    assert backend._told(RuntimeError(text)) == told


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_after_a_fork_it_is_refused_or_another_runs(mini_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its threads are not in a child, where calls would hang at times."""
    bundle = Bundle.open(mini_bundle, TokenizerConfig)
    path, entry = bundle.graph_path("features"), bundle.graph("features")
    feeds = {"code_indices": np.zeros((2, 30), np.int32)}
    monkeypatch.setattr(backend, "_started_in", os.getppid())
    monkeypatch.setattr(backend, "keep_in_children", lambda model: None)
    alone = OpenVinoSession(backend.Compiled(object()), entry, "cpu")
    for refused in (lambda: alone.run(feeds), lambda: compile_graph(path, entry, CPU)):
        with pytest.raises(ArgumentError, match=r"before this process was forked.*'spawn'.*or use onnxruntime"):
            refused()
    opened: list[Session] = []

    def in_onnxruntime() -> Session:
        opened.append(open_onnxruntime(path, entry, CPU))
        return opened[-1]

    with OpenVinoSession(backend.Compiled(object()), entry, "cpu", in_onnxruntime) as session:
        first, second = (session.run(feeds)["features"] for _ in range(2))
        assert np.array_equal(first, opened[0].run(feeds)["features"])
        assert np.array_equal(first, second)
        assert len(opened) == 1
    with pytest.raises(ArgumentError, match="closed"):
        opened[0].run(feeds)


@needs_openvino
def test_codes_are_those_of_onnxruntime(mini_bundle: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), np.uint8)
    images.setflags(write=False)
    bundle = Bundle.open(mini_bundle, TokenizerConfig)
    with open_onnxruntime(bundle.graph_path("encode"), bundle.graph("encode"), CPU) as other:
        expected = other.run({"images": images})
    with open_graph(mini_bundle, "encode") as session:
        assert session.device == "cpu"
        found = session.run({"images": images})
        assert session.run({"images": images[:0]}, ["latent"])["latent"].shape == (0, *expected["latent"].shape[1:])
    assert np.array_equal(found["code_indices"], expected["code_indices"])
    assert found["code_indices"].dtype == np.int32
    np.testing.assert_allclose(found["latent"], expected["latent"], atol=1e-4)
    with open_graph(mini_bundle, "decode") as session:
        pictures = session.run({"code_indices": expected["code_indices"]})["images"]
    with open_onnxruntime(bundle.graph_path("decode"), bundle.graph("decode"), CPU) as other:
        wanted = other.run({"code_indices": expected["code_indices"]})["images"]
    assert np.abs(pictures.astype(int) - wanted).max() <= 1


@needs_openvino
def test_no_topk_is_left_in_an_encoder(mini_bundle: Path) -> None:
    bundle = Bundle.open(mini_bundle, TokenizerConfig)
    compiled = compile_graph(bundle.graph_path("encode"), bundle.graph("encode"), CPU).model
    kinds = {str(node.get_rt_info()["layerType"].value) for node in compiled.get_runtime_model().get_ops()}
    assert "TopK" not in kinds
    assert "MatMul" in kinds or "FullyConnected" in kinds
    assert compiled.get_property("INFERENCE_PRECISION_HINT") == openvino.Type.f32


@needs_openvino
def test_threads_get_their_own_results(mini_bundle: Path) -> None:
    images = np.random.default_rng(1).integers(0, 256, (8, 1, 64, 64, 3), np.uint8)
    with open_graph(mini_bundle, "encode") as session, ThreadPoolExecutor(4) as pool:
        expected = [session.run({"images": image}, ["latent"])["latent"] for image in images]
        found = list(pool.map(lambda image: session.run({"images": image}, ["latent"])["latent"], images))
        assert all(map(np.array_equal, found, expected))
        assert 1 <= len(session._idle) <= 4
    session.close()
    with pytest.raises(ArgumentError, match="closed"):
        session.run({"images": images[0]})


@needs_openvino
def test_what_cannot_be_compiled_is_named(mini_bundle: Path, tmp_path: Path) -> None:
    bundle = Bundle.open(mini_bundle, TokenizerConfig)
    path, entry = bundle.graph_path("features"), bundle.graph("features")
    for device in ("gpu:7", "npu"):
        with pytest.raises(BackendError, match=f"device='{device}', but OpenVINO finds only: .*CPU.*device='cpu'"):
            compile_graph(path, entry, SessionOptions(device))
    broken = Path(shutil.copy(path, tmp_path / "features.onnx"))
    broken.write_bytes(broken.read_bytes()[:200])
    with pytest.raises(BackendError, match=r"OpenVINO .* cannot compile features.onnx for CPU: .*tokenflow verify"):
        compile_graph(broken, entry, CPU)
    for wrong in (
        replace(entry, outputs=(replace(entry.outputs[0], dtype="float16"),)),
        replace(entry, outputs=(replace(entry.outputs[0], name="other"),)),
        replace(entry, inputs=(replace(entry.inputs[0], name="other"),)),
    ):
        with pytest.raises(CorruptBundleError, match=r"features.onnx has the (in|out)puts .* instead of"):
            compile_graph(path, wrong, CPU)
