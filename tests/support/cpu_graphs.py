"""Small graphs for rewrites for a CPU, with what they look for in tokenizers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tokenflow_sdk.passes.cpu import rewrite_for_cpu

__all__ = [
    "FLOAT",
    "NEAREST",
    "SAME",
    "Attributes",
    "decoder",
    "operators",
    "rewritten",
    "save",
    "search",
    "stored_in_half",
    "upsampling",
]

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64
NEAREST = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
SAME = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}
Attributes = dict[str, Any]
Shape = tuple[str, int, Sequence[Any]]
"""Name, type and shape of a tensor."""


def save(
    path: Path,
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[Shape],
    outputs: Sequence[Shape],
    arrays: dict[str, Any],
    inner: Sequence[Shape] = (),
    opset: int = 20,
) -> Path:
    """A graph with these weights; the file gives the shapes of `inner` tensors too."""
    values = [[helper.make_tensor_value_info(*shape) for shape in group] for group in (inputs, outputs, inner)]
    weights = [numpy_helper.from_array(np.asarray(array), name) for name, array in arrays.items()]
    graph = helper.make_graph(nodes, "g", *values[:2], weights, value_info=values[2])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9), path)
    return path


def stored_in_half(path: Path, name: str) -> Path:
    """The same graph in another file, with a weight in float16 that is cast to float32."""
    model = onnx.load(path)
    weight = next(tensor for tensor in model.graph.initializer if tensor.name == name)
    half = numpy_helper.from_array(numpy_helper.to_array(weight).astype(np.float16), "half")
    model.graph.initializer.remove(weight)
    model.graph.initializer.append(half)
    model.graph.node.insert(0, helper.make_node("Cast", ["half"], [name], to=FLOAT))
    onnx.save(model, path.with_name("half.onnx"))
    return path.with_name("half.onnx")


def rewritten(path: Path, threads: int = 2) -> onnx.ModelProto:
    found = rewrite_for_cpu(path, threads)
    assert found is not None
    return onnx.load_from_string(found.graph)


def operators(model: onnx.ModelProto) -> Counter[str]:
    """How often a graph has each operator."""
    return Counter(node.op_type for node in model.graph.node)


def upsampling(
    path: Path,
    resize: Attributes = NEAREST,
    conv: Attributes = SAME,
    scales: tuple[float, ...] = (1, 1, 2, 2),
    side: int = 3,
    channels: int = 6,
    bias: bool = True,
    used_twice: bool = False,
    opset: int = 20,
) -> Path:
    """[B, 6, 5, 7] -> resized and convolved to 10 channels."""
    rng = np.random.default_rng(0)
    arrays = {"w": rng.standard_normal((10, channels, side, side)), "b": rng.standard_normal(10), "s": np.array(scales)}
    nodes = [
        helper.make_node("Resize", ["x", "", "s"], ["u"], **resize),
        helper.make_node("Conv", ["u", "w", "b"] if bias else ["u", "w"], ["c"], **conv),
        helper.make_node("ReduceSum" if used_twice else "Identity", ["u"] if used_twice else ["c"], ["r"]),
        helper.make_node("Add", ["c", "r"], ["y"]),
    ]
    weights = {name: array.astype(np.float32) for name, array in arrays.items()}
    x, y = ("x", FLOAT, ["batch", 6, 5, 7]), ("y", FLOAT, ["batch", 10, "h", "w"])
    return save(path, nodes, [x], [y], weights, opset=opset)


def decoder(
    path: Path,
    channels: tuple[int, int] = (128, 136),
    size: tuple[Any, Any] | None = (62, 59),
    bias: str | None = "b",
    resize: Attributes = NEAREST,
    searches: bool = False,
    opset: int = 20,
) -> Path:
    """A convolution whose result is enlarged and convolved to three channels; the file says the sizes of its map."""
    rng = np.random.default_rng(0)
    shapes = {"w": (channels[1], channels[0], 3, 3), "b": (channels[1],), "v": (3, channels[1], 3, 3)}
    # Divided by the root of 9 * 128 products, so that results are about as large as what they are made of.
    weights = {name: (rng.standard_normal(shape) / 34).astype(np.float32) for name, shape in shapes.items()}
    nodes = [
        helper.make_node("Relu", ["x"], ["r"]),
        helper.make_node("Conv", ["r", "w"] if bias is None else ["r", "w", bias], ["c"], **SAME),
        helper.make_node("Resize", ["c", "", "s"], ["u"], **resize),
        helper.make_node("Conv", ["u", "v"], ["y"], **SAME),
    ]
    x, y = ("x", FLOAT, ["batch", channels[0], "h", "w"]), ("y", FLOAT, ["batch", 3, "H", "W"])
    outputs: list[Shape] = [y]
    if searches:
        nodes.append(helper.make_node("ArgMax", ["y"], ["i"], axis=1))
        outputs.append(("i", INT64, ["batch", 1, "H", "W"]))
    inner: list[Shape] = [] if size is None else [("r", FLOAT, ["batch", channels[0], *size])]
    scales = {"s": np.array([1, 1, 2, 2], np.float32)}
    return save(path, nodes, [x], outputs, weights | scales, inner=inner, opset=opset)


def search(path: Path, columns: int = 1024, shape: tuple[Any, ...] = ("batch", 5), **attributes: Any) -> Path:
    """[..., 4] -> the number of the column with the largest product. Columns occur several times, in several blocks."""
    w = np.tile(np.random.default_rng(0).standard_normal((4, -(-columns // 3))).astype(np.float32), 3)[:, :columns]
    attributes = {"axis": -1, "keepdims": 0} | attributes
    rank = len(shape) + attributes["keepdims"]
    nodes = [helper.make_node("MatMul", ["x", "w"], ["p"]), helper.make_node("ArgMax", ["p"], ["i"], **attributes)]
    x, p, i = ("x", FLOAT, [*shape, 4]), ("p", FLOAT, [*shape, columns]), ("i", INT64, [f"d{n}" for n in range(rank)])
    return save(path, nodes, [x], [i], {"w": w}, inner=[p])
