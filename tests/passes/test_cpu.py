"""Files of graphs that are rewritten: damaged ones, and weights beside them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from tests.support.cpu_graphs import decoder, search, upsampling
from tokenflow_sdk.backends.onnxruntime import OnnxRuntimeSession
from tokenflow_sdk.backends.session import SessionOptions
from tokenflow_sdk.bundle.schema import GraphEntry, TensorSpec
from tokenflow_sdk.passes.cpu import rewrite_for_cpu


@pytest.mark.parametrize("content", [b"", b"ArgMax", b"\x0a\x06ArgMax\x3a\xff\x01"])
def test_what_is_no_graph_is_left_to_onnxruntime(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "g.onnx").write_bytes(content)
    assert rewrite_for_cpu(tmp_path / "g.onnx", 2) is None


def test_a_graph_that_cannot_be_read_is_not_run_as_it_is(tmp_path: Path) -> None:
    """Pictures would depend, in their last digits, on whether a file could be read."""
    with pytest.raises(FileNotFoundError):
        rewrite_for_cpu(tmp_path / "g.onnx", 2)


@pytest.mark.parametrize("cut", [0.2, 0.5, 0.99])
def test_a_damaged_graph_is_left_to_onnxruntime(tmp_path: Path, cut: float) -> None:
    path = search(tmp_path / "g.onnx")
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * cut)])
    assert rewrite_for_cpu(path, 2) is None


@pytest.mark.parametrize("make", [upsampling, search, decoder])
def test_changed_bytes_are_never_an_error_here(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    path = make(tmp_path / "g.onnx")
    data, rng = path.read_bytes(), np.random.default_rng(0)
    # Nodes come first and shapes last; weights between them are most of the bytes.
    for at in rng.choice([*range(300), *range(len(data) - 200, len(data))], 100):
        path.write_bytes(data[:at] + bytes([rng.integers(256)]) + data[at + 1 :])
        rewrite_for_cpu(path, 2)


def test_weights_in_another_file_are_found_also_by_links(tmp_path: Path) -> None:
    """The hub's cache consists of links."""
    model = onnx.load(upsampling(tmp_path / "g.onnx"))
    expected, x = onnxruntime.InferenceSession(tmp_path / "g.onnx"), np.ones((1, 6, 5, 7), np.float32)
    files, links = tmp_path / "files", tmp_path / "links"
    files.mkdir()
    links.mkdir()
    onnx.save(model, files / "g.onnx", save_as_external_data=True, location="g.data", size_threshold=100)
    assert (files / "g.data").stat().st_size > 2000
    for name in ("g.onnx", "g.data"):
        (links / name).symlink_to(files / name)
    shape = TensorSpec("x", "float32", ("batch", 6, 5, 7)), TensorSpec("y", "float32", ("batch", 10, 10, 14))
    for directory in (files, links):
        entry = GraphEntry((), shape[:1], shape[1:])
        with OnnxRuntimeSession(directory / "g.onnx", entry, SessionOptions(device="cpu", threads=1)) as session:
            np.testing.assert_allclose(session.run({"x": x})["y"], expected.run(None, {"x": x})[0], atol=2e-5)
