from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from tests.conftest import ROOT
from tokenflow_sdk.backends.onnxruntime import OnnxRuntimeSession
from tokenflow_sdk.backends.session import SessionOptions
from tokenflow_sdk.backends.zero_points import refuse_aborting_graph
from tokenflow_sdk.bundle.schema import GraphEntry, TensorSpec
from tokenflow_sdk.errors import BackendError

ENTRY = GraphEntry((), (TensorSpec("rows", "uint8", ("n", 4)),), (TensorSpec("sums", "int32", ("n", 2)),))


@pytest.fixture(autouse=True)
def processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")


def graph(path: Path, *zero_points: str) -> Path:
    """A product of 8-bit numbers with the zero points in `zero_points`."""
    values = {"weight": np.full((4, 2), 127, np.int8), "middle": np.uint8(128), "zero": np.int8(0)}
    inputs = ("weight", *zero_points)
    model = ir.from_onnx_text(
        f"""<ir_version: 10, opset_import: ["" : 20]>
        product (uint8[n, 4] rows) => (int32[n, 2] sums) <int8[4, 2] weight, uint8 middle, int8 zero>
        {{ sums = MatMulInteger(rows, {", ".join(inputs)}) }}""",
        initializers=[ir.tensor(values[name], name=name) for name in inputs],
    )
    ir.save(model, path)
    return path


@pytest.mark.parametrize("version", ["1.20.0", "1.23.2", "1.29.0"])
def test_a_graph_at_which_this_version_would_abort_is_never_given_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    monkeypatch.setattr(onnxruntime, "__version__", version)
    monkeypatch.setattr(onnxruntime, "InferenceSession", None)
    path = graph(tmp_path / "transformer.onnx", "middle")
    with pytest.raises(
        BackendError, match=rf"(?s){version} would abort .* transformer.onnx.*onnxruntime>=1.30.*export"
    ) as caught:
        OnnxRuntimeSession(path, ENTRY, SessionOptions(device="cpu"))
    assert caught.value.__cause__ is None


def test_zero_points_mend_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "__version__", "1.23.2")
    with OnnxRuntimeSession(graph(tmp_path / "g.onnx", "middle", "zero"), ENTRY, SessionOptions(device="cpu")) as session:
        sums = session.run({"rows": np.array([[129, 128, 128, 130]], np.uint8)})["sums"]
    assert sums.tolist() == [[381, 381]]


def test_newer_versions_and_other_processors_open_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = graph(tmp_path / "g.onnx", "middle")
    refuse_aborting_graph(path, "1.30.0")
    refuse_aborting_graph(path, "2.0.0")
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    refuse_aborting_graph(path, "1.23.2")


@pytest.mark.parametrize("content", [b"", b"\xff" * 30, b"\x3a\xff\xff\x7f\x0a", b"not a graph", None])
def test_of_what_is_no_graph_onnxruntime_tells_more(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "g.onnx"
    if content is not None:
        path.write_bytes(content)
    refuse_aborting_graph(path, "1.23.2")


def test_the_bundled_model_opens_with_old_versions() -> None:
    graphs = sorted((ROOT / "models" / "tiny").glob("*/*.onnx"))
    assert len(graphs) == 12
    for path in graphs:
        refuse_aborting_graph(path, "1.20.0")
