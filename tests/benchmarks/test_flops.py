from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import conv2d, conv_transpose2d
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.gpu.flops import count_flops, count_weights
from tests.support.mini import mini_model
from tokenflow_export.tokenizer.graphs import DecodeGraph, EncodeGraph
from tokenflow_sdk.errors import CorruptBundleError

Shapes = dict[str, tuple[int | str, ...]]


def write_graph(path: Path, nodes: list[onnx.NodeProto], inputs: Shapes, output: str, rank: int) -> Path:
    """A graph whose output says only how many axes it has."""
    feeds = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()]
    result = helper.make_tensor_value_info(output, TensorProto.FLOAT, [None] * rank)
    onnx.save(helper.make_model(helper.make_graph(nodes, "graph", feeds, [result])), path)
    return path


def one_node(path: Path, kind: str, shapes: list[tuple[int | str, ...]], rank: int, **attributes: object) -> Path:
    inputs = {f"x{i}": shape for i, shape in enumerate(shapes)}
    node = helper.make_node(kind, list(inputs), ["y"], name="node", **attributes)
    return write_graph(path, [node], inputs, "y", rank)


@pytest.mark.parametrize(
    ("kind", "shapes", "rank", "attributes", "expected"),
    [
        ("MatMul", [(3, 5), (5, 7)], 2, {}, 2 * 3 * 5 * 7),
        ("MatMul", [("batch", 4, 3, 5), (4, 5, 7)], 4, {}, 2 * 2 * 4 * 3 * 5 * 7),
        ("MatMul", [("batch", 3, 5), (5,)], 2, {}, 2 * 2 * 3 * 5),
        ("Gemm", [(3, 5), (5, 7), (7,)], 2, {}, 2 * 3 * 5 * 7),
        ("Gemm", [(5, 3), (7, 5)], 2, {"transA": 1, "transB": 1}, 2 * 3 * 5 * 7),
        # 4 x 4 places, of 8 channels, each reading 3 x 3 places of 6 channels.
        ("Conv", [("batch", 6, 9, 9), (8, 6, 3, 3)], 4, {"strides": [2, 2]}, 2 * 2 * (4 * 4) * 8 * 6 * 9),
        ("Conv", [(1, 6, 4, 4), (8, 3, 1, 1), (8,)], 4, {"group": 2}, 2 * (4 * 4) * 8 * 3),
        # Each of 5 x 5 places, of 6 channels, writes to 2 x 2 places of 8 channels.
        ("ConvTranspose", [("batch", 6, 5, 5), (6, 8, 2, 2)], 4, {"strides": [2, 2]}, 2 * 2 * (5 * 5) * 6 * 8 * 4),
        ("Relu", [("batch", 6)], 2, {}, 0),
    ],
)
def test_one_node_by_hand(kind, shapes, rank, attributes, expected: int, tmp_path: Path) -> None:
    """Two pictures."""
    assert count_flops(one_node(tmp_path / "graph.onnx", kind, shapes, rank, **attributes), 2) == expected


def test_nodes_add_up(tmp_path: Path) -> None:
    first, second = (helper.make_node("MatMul", [a, "w"], [b], name=b) for a, b in (("x", "y"), ("y", "z")))
    path = write_graph(tmp_path / "graph.onnx", [first, second], {"x": ("batch", 4), "w": (4, 4)}, "z", 2)
    assert count_flops(path) == 2 * (2 * 16)
    assert count_flops(path, 3) == 3 * count_flops(path)


@settings(deadline=None, max_examples=60)
@given(
    transposed=st.booleans(),
    batch=st.integers(1, 3),
    groups=st.integers(1, 3),
    channels=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    size=st.tuples(st.integers(4, 9), st.integers(4, 9)),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.integers(1, 3),
    padding=st.integers(0, 1),
)
def test_convolutions_as_pytorch_counts_them(
    transposed, batch, groups, channels, size, kernel, stride, padding, tmp_path_factory
) -> None:
    read, written = (count * groups for count in channels)
    weight = (read, written // groups, *kernel) if transposed else (written, read // groups, *kernel)
    x, w = torch.empty(batch, read, *size, device="meta"), torch.empty(weight, device="meta")
    function = conv_transpose2d if transposed else conv2d
    with FlopCounterMode(display=False) as counter:
        function(x, w, stride=stride, padding=padding, groups=groups)
    kind = "ConvTranspose" if transposed else "Conv"
    attributes = {"strides": [stride] * 2, "pads": [padding] * 4, "group": groups}
    path = tmp_path_factory.mktemp("graphs") / "graph.onnx"
    one_node(path, kind, [("batch", read, *size), weight], 4, **attributes)
    assert count_flops(path, batch) == counter.get_total_flops()


def test_a_tokenizer_as_pytorch_counts_it(mini_bundle: Path) -> None:
    """The modules that were exported, on no data: attention as the two products it is."""
    model = mini_model("clip")
    size, codes = model.config.image_size, sum(side * side for side in model.config.patch_nums)
    images = torch.empty(2, size, size, 3, dtype=torch.uint8, device="meta")
    indices = torch.empty(2, codes, dtype=torch.int32, device="meta")
    for name, module, value in (("encode", EncodeGraph(model), images), ("decode", DecodeGraph(model), indices)):
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            module.to("meta")(value)
        assert count_flops(mini_bundle / f"{name}.onnx", 2) == counter.get_total_flops() > 0


@pytest.mark.parametrize(("kind", "attributes"), [("Einsum", {"equation": "ab,bc->ac"}), ("Attention", {})])
def test_what_cannot_be_counted_is_an_error(kind: str, attributes: dict, tmp_path: Path) -> None:
    inputs = [(2, 3), (3, 4)] if kind == "Einsum" else [(1, 2, 3, 4)] * 3
    with pytest.raises(CorruptBundleError, match=f"node is a standard {kind}"):
        count_flops(one_node(tmp_path / "graph.onnx", kind, inputs, len(inputs[0]), **attributes))


def test_operators_of_others_are_an_error(tmp_path: Path) -> None:
    node = helper.make_node("FusedMatMul", ["x", "x"], ["y"], name="node", domain="com.microsoft")
    graph = write_graph(tmp_path / "graph.onnx", [node], {"x": (2, 2)}, "y", 2)
    with pytest.raises(CorruptBundleError, match="node is a com.microsoft FusedMatMul"):
        count_flops(graph)


def test_a_shape_that_depends_on_values_is_an_error(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("NonZero", ["x"], ["where"], name="search"),
        helper.make_node("Cast", ["where"], ["found"], name="cast", to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["w", "found"], ["y"], name="product"),
    ]
    graph = write_graph(tmp_path / "graph.onnx", nodes, {"x": (4, 4), "w": (5, 2)}, "y", 2)
    with pytest.raises(CorruptBundleError, match="which shape y of product has"):
        count_flops(graph)


def test_weights_of_a_graph(tmp_path: Path) -> None:
    """Those of every float and 8-bit type; no shapes."""
    kinds = {"w": np.float32, "h": np.float16, "q": np.int8, "shape": np.int64}
    stored = [numpy_helper.from_array(np.ones((3, 5), kind), name) for name, kind in kinds.items()]
    node = helper.make_node("MatMul", ["x", "w"], ["y"], name="node")
    path = write_graph(tmp_path / "graph.onnx", [node], {"x": ("batch", 3)}, "y", 2)
    proto = onnx.load(path)
    proto.graph.initializer.extend(stored)
    onnx.save(proto, path)
    assert count_weights(path) == 3 * 15


@pytest.mark.parametrize("kind", ["clip"])
def test_weights_of_a_model(kind: str, mini_bundle: Path) -> None:
    """The graph folds what it can, and has both halves of the codebook in one."""
    model = mini_model(kind)
    parts = (model.decoder, model.post_quant_conv)
    counted = sum(weight.numel() for part in parts for weight in part.parameters())
    assert counted == pytest.approx(count_weights(mini_bundle / "decode.onnx"), rel=0.05)


def test_weights_are_not_read(mini_bundle: Path, tmp_path: Path) -> None:
    """Counting a model of gigabytes takes seconds: the graph's file is enough."""
    graph = tmp_path / "encode.onnx"
    proto = onnx.load(mini_bundle / "encode.onnx")
    onnx.save(proto, graph, save_as_external_data=True, location="weights.bin", size_threshold=1024)
    (tmp_path / "weights.bin").unlink()
    assert count_flops(graph) == count_flops(mini_bundle / "encode.onnx")
