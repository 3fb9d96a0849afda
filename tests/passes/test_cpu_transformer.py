"""Rewritten language models, compared with the graphs before and with NumPy."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from tests.support.cpu_graphs import FLOAT, operators, rewritten, save
from tokenflow_sdk.backends.onnxruntime import OnnxRuntimeSession
from tokenflow_sdk.backends.session import SessionOptions
from tokenflow_sdk.bundle.bundle import Bundle, find_bundle
from tokenflow_sdk.bundle.model_config import GeneratorConfig, UnderstanderConfig
from tokenflow_sdk.bundle.schema import GraphEntry, TensorSpec
from tokenflow_sdk.passes.cpu import rewrite_for_cpu

HALF, INT32, UINT8 = TensorProto.FLOAT16, TensorProto.INT32, TensorProto.UINT8
WIDTH, COLUMNS, HEADS, HALF_HEAD = 48, 20, 3, 8
ROWS: list[Any] = ["batch", "queries", WIDTH]
node = helper.make_node


def norm(path: Path, kind: int = FLOAT, stored_in_half: bool = False, watched: str = "", **changes: Any) -> Path:
    """An RMS norm as the exporter writes it; `watched` is an inner tensor that is a result as well."""
    dtype = np.float16 if kind == HALF else np.float32
    weight = np.random.default_rng(0).standard_normal(WIDTH).astype(np.float16 if stored_in_half else dtype)
    arrays = {"two": np.array(2, dtype), "axis": np.array([-1]), "eps": np.array(1e-5, dtype), "weight": weight} | changes
    keepdims = int(arrays.pop("keepdims", 1))
    nodes = [node("Cast", ["weight"], ["wide"], to=FLOAT)] if stored_in_half else []
    nodes += [
        node("Pow", ["x", "two"], ["square"]),
        node("ReduceMean", ["square", "axis"], ["mean"], keepdims=keepdims),
        node("Add", ["mean", "eps"], ["shifted"]),
        node("Sqrt", ["shifted"], ["root"]),
        node("Reciprocal", ["root"], ["factor"]),
        node("Mul", ["x", "factor"], ["scaled"]),
        node("Mul", ["scaled", "wide" if stored_in_half else "weight"], ["y"]),
    ]
    outputs = [("y", kind, ROWS), *([(watched, kind, [*ROWS[:2], 1])] if watched else [])]
    return save(path, nodes, [("x", kind, ROWS)], outputs, arrays)


def product(
    path: Path, watched: str = "", of: int = FLOAT, scale_of: str = "x", zero_points: bool = True, **changes: Any
) -> Path:
    """A product with a weight in 8 bits, as the exporter writes it; `watched`, of type `of`, is a result too."""
    rng = np.random.default_rng(0)
    weight = rng.integers(-127, 128, (WIDTH, COLUMNS)).astype(np.int8)
    weight[:, 0], weight[:, 1] = 127, -127
    arrays = {
        "axis": np.array([-1]),
        "least": np.float32(1e-12),
        "step": np.float32(1 / 127),
        "shift": np.float32(128),
        "middle": np.uint8(128),
        "weight": weight,
        "zero": np.int8(0),
        "columns": rng.random(COLUMNS).astype(np.float32),
    } | changes
    nodes = [
        node("Neg", ["x"], ["negative"]),
        node("Abs", [scale_of], ["magnitude"]),
        node("ReduceMax", ["magnitude", "axis"], ["largest"], keepdims=1),
        node("Max", ["largest", "least"], ["floor"]),
        node("Mul", ["floor", "step"], ["scale"]),
        node("Div", ["x", "scale"], ["steps"]),
        node("Round", ["steps"], ["rounded"]),
        node("Add", ["rounded", "shift"], ["shifted"]),
        node("Cast", ["shifted"], ["q"], to=UINT8),
        node("MatMulInteger", ["q", "weight", *(["middle", "zero"] if zero_points else [])], ["integers"]),
        node("Cast", ["integers"], ["floats"], to=FLOAT),
        node("Mul", ["floats", "scale"], ["by_row"]),
        node("Mul", ["by_row", "columns"], ["y"]),
    ]
    outputs = [("y", FLOAT, [*ROWS[:2], COLUMNS]), *([(watched, of, ["b", "q", "w"])] if watched else [])]
    return save(path, nodes, [("x", FLOAT, ROWS)], outputs, arrays)


def rotary(
    path: Path,
    axis: int | None = 3,
    view: int = 2,
    first: str = "Sub",
    swapped: bool = False,
    watched: str = "",
    kind: int = FLOAT,
) -> Path:
    """The rotary embedding of two tensors of heads, as the exporter writes it."""
    nodes = [
        # A graph without a norm or a product in 8 bits is not looked at.
        node("Reciprocal", ["q_in"], ["unused"]),
        *(node("Identity", [f"{x}_in"], [x]) for x in ("q", "k")),
        node("Unsqueeze", ["positions", "last"], ["places"]),
        node("Cast", ["places"], ["floats"], to=kind),
        node("Mul", ["floats", "speeds"], ["angles"]),
        node("Cos", ["angles"], ["cos"]),
        node("Sin", ["angles"], ["sin"]),
        node("Unsqueeze", ["cos", "heads"], ["cos_view"]),
        node("Unsqueeze", ["sin", "heads"], ["sin_view"]),
    ]
    for x in ("q", "k"):
        a, b = (f"{x}_b", f"{x}_a") if swapped else (f"{x}_a", f"{x}_b")
        nodes += [
            node("Split", [x], [f"{x}_a", f"{x}_b"], num_outputs=2, **({} if axis is None else {"axis": axis})),
            node("Mul", [a, "cos_view"], [f"{x}_1"]),
            node("Mul", [b, "sin_view"], [f"{x}_2"]),
            node(first, [f"{x}_1", f"{x}_2"], [f"{x}_first"]),
            node("Mul", [b, "cos_view"], [f"{x}_3"]),
            node("Mul", [a, "sin_view"], [f"{x}_4"]),
            node("Add", [f"{x}_3", f"{x}_4"], [f"{x}_second"]),
            node("Concat", [f"{x}_first", f"{x}_second"], [f"{x}_turned"], axis=-1),
        ]
    shape = ["batch", "queries", HEADS, 2 * HALF_HEAD]
    speeds = (1 / 100 ** (np.arange(HALF_HEAD) / HALF_HEAD)).astype(np.float32 if kind == FLOAT else np.float64)
    arrays = {"last": np.array([2]), "heads": np.array([view]), "speeds": speeds}
    outputs = [(f"{x}_turned", kind, shape) for x in ("q", "k")]
    outputs += [(watched, kind, [*shape[:3], HALF_HEAD])] if watched else []
    inputs = [("positions", INT32, shape[:2]), *((f"{x}_in", kind, shape) for x in ("q", "k"))]
    return save(path, nodes, inputs, outputs, arrays, inner=[(x, kind, shape) for x in ("q", "k")])


def run(model: Path | onnx.ModelProto, **feeds: np.ndarray) -> list[np.ndarray]:
    graph = str(model) if isinstance(model, Path) else model.SerializeToString()
    found: list[np.ndarray] = onnxruntime.InferenceSession(graph).run(None, feeds)
    return found


def numbers(*shape: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("stored_in_half", [False, True])
def test_an_rms_norm_is_one_node(tmp_path: Path, stored_in_half: bool) -> None:
    path, x = norm(tmp_path / "g.onnx", stored_in_half=stored_in_half), 3 * numbers(2, 5, WIDTH) + 1
    model = rewritten(path)
    assert operators(model) == Counter({"SimplifiedLayerNormalization": 1} | ({"Cast": 1} if stored_in_half else {}))
    weight = next(numpy_helper.to_array(each) for each in model.graph.initializer if each.name == "weight").astype(float)
    expected = x.astype(float) / np.sqrt((x.astype(float) ** 2).mean(-1, keepdims=True) + 1e-5) * weight
    np.testing.assert_allclose(run(model, x=x)[0], expected, rtol=1e-6)


@pytest.mark.parametrize(
    "changes",
    [
        {"two": np.float32(3)},
        {"axis": np.array([1])},
        {"eps": np.full((1, 1, 1), 1e-5, np.float32)},
        {"weight": np.ones((1, WIDTH), np.float32)},
        {"weight": np.ones(1, np.float32)},
        {"keepdims": 0},
        {"watched": "mean"},
        {"watched": "factor"},
        {"kind": HALF},
    ],
)
def test_other_norms_stay(tmp_path: Path, changes: dict[str, Any]) -> None:
    assert rewrite_for_cpu(norm(tmp_path / "g.onnx", **changes), 2) is None


def test_rows_are_rounded_to_the_same_8_bits(tmp_path: Path) -> None:
    """Halves between two steps, rows of zeros and of one large number included."""
    path = product(tmp_path / "g.onnx", watched="q", of=UINT8)
    x = numbers(3, 4, WIDTH)
    x[0, 0], x[0, 1, 0] = 0, 1e30
    x[0, 2] = np.resize([127, 0.5, 1.5, 2.5, -0.5, -1.5, -126.5], WIDTH)
    after = rewritten(path)
    assert operators(after)["QuantizeLinear"] == 1
    assert not operators(after)["Round"]
    np.testing.assert_array_equal(run(after, x=x)[1], run(path, x=x)[1])


def test_products_of_integers_are_exact_and_scaled(tmp_path: Path) -> None:
    """Rows of the largest numbers too, of which pairs of products do not fit into 16 bits."""
    path, x = product(tmp_path / "g.onnx"), numbers(2, 5, WIDTH)
    x[0, :2] = [[1], [-1]]
    model = rewritten(path)
    assert (operators(model)["MatMulIntegerToFloat"], operators(model)["MatMulInteger"]) == (1, 0)
    found = {each.name: numpy_helper.to_array(each) for each in model.graph.initializer}
    scale = np.abs(x).max(-1, keepdims=True) * np.float32(1 / 127)
    integers = np.round(x / scale).astype(np.int64) @ found["weight"].astype(np.int64)
    entry = GraphEntry((), (TensorSpec("x", "float32", tuple(ROWS)),), (TensorSpec("y", "float32", (*ROWS[:2], COLUMNS)),))
    with OnnxRuntimeSession(path, entry, SessionOptions(device="cpu")) as session:
        np.testing.assert_allclose(session.run({"x": x})["y"], integers * scale.astype(float) * found["columns"], rtol=1e-6)


@pytest.mark.parametrize(
    "changes", [{"first": "Add"}, {"swapped": True}, {"view": 1}, {"axis": None}, {"kind": TensorProto.DOUBLE}]
)
def test_other_turns_of_heads_stay(tmp_path: Path, changes: dict[str, Any]) -> None:
    assert rewrite_for_cpu(rotary(tmp_path / "g.onnx", **changes), 2) is None


@pytest.mark.parametrize("watched", ["q_1", "q_a", "q_first"])
def test_a_turn_of_heads_whose_parts_are_results_stays(tmp_path: Path, watched: str) -> None:
    path = rotary(tmp_path / "g.onnx", watched=watched)
    feeds = {"positions": np.array([[5]], np.int32)} | {x: numbers(1, 1, HEADS, 2 * HALF_HEAD) for x in ("q_in", "k_in")}
    model = rewritten(path)
    assert operators(model)["RotaryEmbedding"] == 1
    for before, after in zip(*(run(each, **feeds) for each in (path, model)), strict=True):
        np.testing.assert_allclose(after, before, atol=1e-6)


def test_graphs_with_graphs_in_them_stay(tmp_path: Path) -> None:
    """What those read is not counted."""
    model = onnx.load(norm(tmp_path / "g.onnx"))
    inner = helper.make_graph(
        [node("Identity", ["mean"], ["m"])], "inner", [], [helper.make_tensor_value_info("m", FLOAT, None)]
    )
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "yes"))
    model.graph.node.append(node("If", ["yes"], ["m_out"], then_branch=inner, else_branch=inner))
    onnx.save(model, tmp_path / "g.onnx")
    assert rewrite_for_cpu(tmp_path / "g.onnx", 2) is None


def test_operators_of_other_domains_are_others(tmp_path: Path) -> None:
    model = onnx.load(norm(tmp_path / "g.onnx"))
    next(each for each in model.graph.node if each.op_type == "Pow").domain = "mine"
    onnx.save(model, tmp_path / "g.onnx")
    assert rewrite_for_cpu(tmp_path / "g.onnx", 2) is None


def test_a_graph_may_have_onnxruntimes_operators_already(tmp_path: Path) -> None:
    model = onnx.load(norm(tmp_path / "g.onnx"))
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    onnx.save(model, tmp_path / "g.onnx")
    after = rewritten(tmp_path / "g.onnx")
    assert [each.domain for each in after.opset_import].count("com.microsoft") == 1
    x = numbers(1, 1, WIDTH)
    np.testing.assert_allclose(run(after, x=x)[0], run(tmp_path / "g.onnx", x=x)[0], rtol=1e-6)


@pytest.mark.parametrize("config", [GeneratorConfig, UnderstanderConfig])
def test_the_bundled_transformers_have_no_passes_left(config: type[GeneratorConfig | UnderstanderConfig]) -> None:
    path = Bundle.open(find_bundle("tiny", config.kind), config).graph_path("transformer")
    before, after = operators(onnx.load(path)), operators(rewritten(path))
    assert not set(after) & {"Round", "Reciprocal", "Sqrt", "Pow", "Sub", "Split", "MatMulInteger"}
    assert after["SimplifiedLayerNormalization"] == before["Reciprocal"] > 0
    assert after["MatMulIntegerToFloat"] == before["MatMulInteger"] > 0
    assert after["QuantizeLinear"] == before["Round"] > 0
    assert after["RotaryEmbedding"] == before["Split"] > 0


@pytest.mark.parametrize("make", [norm, product, rotary])
def test_changed_bytes_are_never_an_error_here(tmp_path: Path, make: Any) -> None:
    path = make(tmp_path / "g.onnx")
    data, rng = path.read_bytes(), np.random.default_rng(0)
    for at in rng.choice(len(data), 200):
        path.write_bytes(data[:at] + bytes([rng.integers(256)]) + data[at + 1 :])
        rewrite_for_cpu(path, 2)
