"""Rewritten graphs, compared with the graphs before."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from tokenflow_sdk.backends.onnxruntime import OnnxRuntimeSession
from tokenflow_sdk.backends.session import SessionOptions
from tokenflow_sdk.bundle.bundle import Bundle, find_bundle
from tokenflow_sdk.bundle.model_config import TokenizerConfig
from tokenflow_sdk.bundle.schema import GraphEntry, TensorSpec
from tokenflow_sdk.passes.cpu import rewrite_for_cpu

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64
NEAREST = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
SAME = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}
Attributes = dict[str, Any]


def save(
    path: Path, nodes: list[onnx.NodeProto], shapes: list[tuple[str, int, list[Any]]], opset: int = 20, **arrays: Any
) -> Path:
    """A graph of the first of `shapes`, its input, to the last, its output."""
    first, *inner, last = (helper.make_tensor_value_info(*shape) for shape in shapes)
    weights = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    graph = helper.make_graph(nodes, "g", [first], [last], weights, value_info=inner)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9), path)
    return path


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
    shapes = [("x", FLOAT, ["batch", 6, 5, 7]), ("y", FLOAT, ["batch", 10, "h", "w"])]
    return save(path, nodes, shapes, opset, **{name: array.astype(np.float32) for name, array in arrays.items()})


def search(path: Path, columns: int = 1024, shape: tuple[Any, ...] = ("batch", 5), **attributes: Any) -> Path:
    """[..., 4] -> the number of the column with the largest product. Columns occur several times, in several blocks."""
    w = np.tile(np.random.default_rng(0).standard_normal((4, -(-columns // 3))).astype(np.float32), 3)[:, :columns]
    attributes = {"axis": -1, "keepdims": 0} | attributes
    rank = len(shape) + attributes["keepdims"]
    nodes = [helper.make_node("MatMul", ["x", "w"], ["p"]), helper.make_node("ArgMax", ["p"], ["i"], **attributes)]
    shapes = [("x", FLOAT, [*shape, 4]), ("p", FLOAT, [*shape, columns]), ("i", INT64, [f"d{n}" for n in range(rank)])]
    return save(path, nodes, shapes, w=w)


def both(path: Path, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    rewritten = rewrite_for_cpu(path)
    assert rewritten is not None
    onnx.checker.check_model(onnx.load_from_string(rewritten.graph), full_check=True)
    before, after = (onnxruntime.InferenceSession(graph).run(None, {"x": x})[0] for graph in (path, rewritten.graph))
    return before, after


def operators(path: Path) -> Counter[str]:
    """How often the rewritten graph has each operator."""
    rewritten = rewrite_for_cpu(path)
    assert rewritten is not None
    return Counter(node.op_type for node in onnx.load_from_string(rewritten.graph).graph.node)


@pytest.mark.parametrize("bias", [True, False])
def test_upsampling_and_a_convolution_are_four_small_ones(tmp_path: Path, bias: bool) -> None:
    """Borders too: the map has odd sides, and each pixel of the result is compared."""
    path = upsampling(tmp_path / "g.onnx", bias=bias)
    before, after = both(path, np.random.default_rng(1).standard_normal((2, 6, 5, 7)).astype(np.float32))
    assert before.shape == after.shape == (2, 10, 10, 14)
    np.testing.assert_allclose(after, before, atol=2e-5)
    found = operators(path)
    assert (found["Resize"], found["Conv"], found["DepthToSpace"]) == (0, 4, 1)


def test_weights_may_be_stored_in_half(tmp_path: Path) -> None:
    model = onnx.load(upsampling(tmp_path / "g.onnx"))
    weight = next(tensor for tensor in model.graph.initializer if tensor.name == "w")
    half = numpy_helper.from_array(numpy_helper.to_array(weight).astype(np.float16), "half")
    model.graph.initializer.remove(weight)
    model.graph.initializer.append(half)
    model.graph.node.insert(0, helper.make_node("Cast", ["half"], ["w"], to=FLOAT))
    onnx.save(model, tmp_path / "h.onnx")
    before, after = both(tmp_path / "h.onnx", np.random.default_rng(1).standard_normal((1, 6, 5, 7)).astype(np.float32))
    np.testing.assert_allclose(after, before, atol=2e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"resize": NEAREST | {"mode": "linear"}},
        {"resize": NEAREST | {"nearest_mode": "ceil"}},
        {"resize": {"mode": "nearest"}},
        {"scales": (1, 1, 3, 3)},
        {"scales": (1, 1, 2, 1)},
        {"side": 5, "conv": {"kernel_shape": [5, 5], "pads": [2, 2, 2, 2]}},
        {"conv": SAME | {"strides": [2, 2]}},
        {"conv": SAME | {"dilations": [2, 2]}},
        {"conv": SAME | {"pads": [0, 0, 0, 0]}},
        {"conv": SAME | {"group": 2}, "channels": 3},
        {"conv": {"kernel_shape": [3, 3], "auto_pad": "SAME_UPPER"}},
        {"used_twice": True},
        {"opset": 17},
    ],
)
def test_other_resizes_and_convolutions_stay(tmp_path: Path, changes: Attributes) -> None:
    assert rewrite_for_cpu(upsampling(tmp_path / "g.onnx", **changes)) is None


def test_an_upsampled_map_that_is_a_result_stays(tmp_path: Path) -> None:
    model = onnx.load(upsampling(tmp_path / "g.onnx"))
    model.graph.output.append(helper.make_tensor_value_info("u", FLOAT, ["batch", 6, 10, 14]))
    onnx.save(model, tmp_path / "g.onnx")
    assert rewrite_for_cpu(tmp_path / "g.onnx") is None


@pytest.mark.parametrize("axis", [-1, 2])
def test_a_search_in_two_steps_finds_the_same_column(tmp_path: Path, axis: int) -> None:
    """Each row's largest product occurs three times, so that the order decides."""
    path = search(tmp_path / "g.onnx", columns=1152, axis=axis)
    before, after = both(path, np.random.default_rng(1).standard_normal((40, 5, 4)).astype(np.float32))
    assert after.dtype == before.dtype == np.int64
    assert np.array_equal(after, before)
    assert after.max() < 384
    assert operators(path)["ReduceMax"] == 1


def test_a_search_among_equals_finds_the_first(tmp_path: Path) -> None:
    before, after = both(search(tmp_path / "g.onnx"), np.zeros((2, 5, 4), np.float32))
    assert not before.any()
    assert not after.any()


@pytest.mark.parametrize(
    "changes",
    [
        {"columns": 896},
        {"columns": 1100},
        {"shape": ("batch",)},
        {"shape": ("batch", 2, 5)},
        {"axis": 1},
        {"keepdims": 1},
        {"select_last_index": 1},
    ],
)
def test_other_searches_stay(tmp_path: Path, changes: Attributes) -> None:
    assert rewrite_for_cpu(search(tmp_path / "g.onnx", **changes)) is None


@pytest.mark.parametrize("content", [b"", b"ArgMax", b"\x0a\x06ArgMax\x3a\xff\x01"])
def test_what_is_no_graph_is_left_to_onnxruntime(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "g.onnx").write_bytes(content)
    assert rewrite_for_cpu(tmp_path / "g.onnx") is None


def test_a_graph_that_cannot_be_read_is_not_run_as_it_is(tmp_path: Path) -> None:
    """Pictures would depend, in their last digits, on whether a file could be read."""
    with pytest.raises(FileNotFoundError):
        rewrite_for_cpu(tmp_path / "g.onnx")


@pytest.mark.parametrize("cut", [0.2, 0.5, 0.99])
def test_a_damaged_graph_is_left_to_onnxruntime(tmp_path: Path, cut: float) -> None:
    path = search(tmp_path / "g.onnx")
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * cut)])
    assert rewrite_for_cpu(path) is None


@pytest.mark.parametrize("make", [upsampling, search])
def test_changed_bytes_are_never_an_error_here(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    path = make(tmp_path / "g.onnx")
    data, rng = path.read_bytes(), np.random.default_rng(0)
    # Nodes come first and shapes last; weights between them are most of the bytes.
    for at in rng.choice([*range(300), *range(len(data) - 200, len(data))], 100):
        path.write_bytes(data[:at] + bytes([rng.integers(256)]) + data[at + 1 :])
        rewrite_for_cpu(path)


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


def test_the_bundled_model_finds_the_same_codes_and_pictures_within_one() -> None:
    bundle = Bundle.open(find_bundle("tiny", "tokenizer"), TokenizerConfig)
    reference = np.load(bundle.path / "reference.npz")
    for name, feed in (("encode", "images"), ("decode", "code_indices")):
        path, entry = bundle.graph_path(name), bundle.graph(name)
        feeds = {feed: reference[feed][:1]}
        (before,) = onnxruntime.InferenceSession(path).run([entry.outputs[0].name], feeds)
        with OnnxRuntimeSession(path, entry, SessionOptions(device="cpu")) as session:
            after = session.run(feeds, [entry.outputs[0].name])[entry.outputs[0].name]
        differences = np.abs(after.astype(int) - before)
        if name == "encode":
            assert not differences.any()
        else:
            assert differences.max() <= 1
            assert np.count_nonzero(differences) < 1e-3 * differences.size
