"""Weights beside a graph, in every arrangement of files that bundles are found in."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from tokenflow_sdk.engines.build import engine_graph
from tokenflow_sdk.errors import CorruptBundleError
from tokenflow_sdk.passes.graph import load_graph

WEIGHTS = {
    "float": np.linspace(-1, 1, 24, dtype=np.float32).reshape(4, 6),
    "half": np.arange(6, dtype=np.float16),
    "bfloat": np.arange(5).astype(ml_dtypes.bfloat16),
    "bytes": np.arange(-3, 4, dtype=np.int8),
    "nibbles": np.arange(-8, 7).astype(ml_dtypes.int4).reshape(3, 5),
    "number": np.float32(3).reshape(()),
}


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    """A graph whose every weight lies in weights.data."""
    values = {}
    for name, array in WEIGHTS.items():
        tensor = ir.tensor(array, name=name)
        values[name] = ir.Value(name=name, const_value=tensor, shape=tensor.shape, type=ir.TensorType(tensor.dtype))
    nodes = [ir.node("Identity", [value], name=f"copy_{name}") for name, value in values.items()]
    made = ir.Graph(
        [], [node.outputs[0] for node in nodes], nodes=nodes, initializers=list(values.values()), opset_imports={"": 21}
    )
    (tmp_path / "plain").mkdir()
    path = tmp_path / "plain" / "graph.onnx"
    ir.save(ir.Model(made, ir_version=10), path, external_data="weights.data", size_threshold_bytes=0)
    return path


def hard(file: Path, link: Path) -> None:
    os.link(file, link)


def soft(file: Path, link: Path) -> None:
    link.symlink_to(file)


@pytest.mark.parametrize("place", [shutil.copyfile, hard, soft])
def test_weights_are_read_through_links(graph: Path, tmp_path: Path, place: Callable[[Path, Path], object]) -> None:
    (tmp_path / "links").mkdir()
    for file in graph.parent.iterdir():
        place(file, tmp_path / "links" / file.name)
    loaded = load_graph(tmp_path / "links" / "graph.onnx")
    check_weights(loaded)
    ir.save(loaded, tmp_path / "again.onnx", external_data="again.data", size_threshold_bytes=0)
    check_weights(load_graph(tmp_path / "again.onnx"))


def check_weights(model: ir.Model) -> None:
    for name, array in WEIGHTS.items():
        tensor = model.graph.initializers[name].const_value
        assert tensor is not None
        assert not isinstance(tensor, ir.ExternalTensor)
        assert np.array_equal(tensor.numpy().astype(np.float32), array.astype(np.float32))
        assert tensor.dtype == ir.tensor(array).dtype


def test_the_hubs_links_become_an_engines_graph(graph: Path, tmp_path: Path) -> None:
    (tmp_path / "snapshot").mkdir()
    for file in graph.parent.iterdir():
        soft(file, tmp_path / "snapshot" / file.name)
    made = engine_graph(tmp_path / "snapshot" / "graph.onnx", "fp16", tmp_path)
    found = ir.load(made).graph.initializers["float"].const_value
    assert found is not None
    assert np.array_equal(found.numpy(), WEIGHTS["float"])


def test_weights_elsewhere_are_refused(graph: Path, tmp_path: Path) -> None:
    shutil.copyfile(graph.with_name("weights.data"), tmp_path / "weights.data")
    model = ir.load(graph)
    for value in model.graph.initializers.values():
        tensor = value.const_value
        assert isinstance(tensor, ir.ExternalTensor)
        value.const_value = ir.ExternalTensor(
            "../weights.data",
            tensor.offset,
            tensor.length,
            tensor.dtype,
            shape=tensor.shape,
            name=str(tensor.name),
            base_dir=str(graph.parent),
        )
    ir.save(model, graph)
    with pytest.raises(CorruptBundleError, match=r"looks for weights in '\.\./weights\.data', which is not beside it"):
        load_graph(graph)


@pytest.mark.parametrize("length", [0, 100])
def test_short_weights_are_refused(graph: Path, length: int) -> None:
    data = graph.with_name("weights.data")
    data.write_bytes(data.read_bytes()[:length])
    with pytest.raises(CorruptBundleError, match=r"more weights than weights.data holds|weights.data, which cannot be read"):
        load_graph(graph)
