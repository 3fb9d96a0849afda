from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from tokenflow_export.precision.emulate_half import emulate, emulated_graph, emulated_sessions
from tokenflow_sdk.backends.session import SessionOptions
from tokenflow_sdk.bundle.bundle import Bundle
from tokenflow_sdk.bundle.model_config import GeneratorConfig
from tokenflow_sdk.passes.graph import load_graph
from tokenflow_sdk.passes.half_precision import HalfType, compute_nodes, to_half

NUMPY: dict[HalfType, Any] = {"fp16": np.float16, "bf16": ml_dtypes.bfloat16}
TORCH: dict[HalfType, torch.dtype] = {"fp16": torch.float16, "bf16": torch.bfloat16}
IR: dict[HalfType, ir.DataType] = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
BOTH = pytest.mark.parametrize("dtype", ["fp16", "bf16"])


def rounded(array: np.ndarray, dtype: HalfType) -> np.ndarray:
    """The oracle: ml_dtypes and NumPy round to the nearest, ties to even."""
    with np.errstate(over="ignore", invalid="ignore"):
        return array.astype(NUMPY[dtype]).astype(np.float32)


def relative(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(a - b)) / np.mean(np.square(b))))


def one_input(nodes: list[onnx.NodeProto], weights: dict[str, np.ndarray], rank: int) -> ir.Model:
    """A float32 graph from `x` to `y`, as the exporter writes them: with the type of every tensor."""
    shape = [f"d{i}" for i in range(rank)]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("x", "y")]
    initializers = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return ir.from_proto(onnx.shape_inference.infer_shapes(model))


def emulated(model: ir.Model, dtype: HalfType) -> Callable[[np.ndarray], np.ndarray]:
    to_half(model, dtype)
    emulate(model, dtype)
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    session = onnxruntime.InferenceSession(proto.SerializeToString())
    return lambda x: session.run(None, {"x": x})[0]


@pytest.fixture(scope="module")
def rounding() -> dict[HalfType, Callable[[np.ndarray], np.ndarray]]:
    """Graphs that do nothing else: a column times 1."""
    found: dict[HalfType, Callable[[np.ndarray], np.ndarray]] = {}
    for dtype in NUMPY:
        nodes = [helper.make_node("MatMul", ["x", "one"], ["y"], name="product")]
        found[dtype] = emulated(one_input(nodes, {"one": np.ones((1, 1), np.float32)}, 2), dtype)
    return found


@BOTH
@settings(deadline=None)
@given(values=st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=50))
def test_numbers_are_rounded_to_the_nearest_and_ties_to_even(dtype: HalfType, values: list[float], rounding) -> None:
    column = np.array(values, np.float32)[:, None]
    np.testing.assert_array_equal(rounding[dtype](column), rounded(column, dtype))


@BOTH
def test_every_tie_is_rounded_to_even(dtype: HalfType, rounding) -> None:
    """Halfway between any two neighbours, from the least to the largest number; and beyond it, infinity."""
    infinity = np.array(np.inf, NUMPY[dtype]).view(np.uint16)
    numbers = np.arange(infinity, dtype=np.uint16).view(NUMPY[dtype]).astype(np.float64)
    ties = ((numbers[1:] + numbers[:-1]) / 2).astype(np.float32)[:, None]
    found = rounding[dtype](ties)
    np.testing.assert_array_equal(found, rounded(ties, dtype))
    assert not (found[:, 0].astype(NUMPY[dtype]).view(np.uint16) & 1).any()
    largest = np.float32([[numbers[-1]], [3.4e38]])
    assert rounding[dtype](largest)[:, 0].tolist() == [numbers[-1], np.inf]


@BOTH
def test_a_product_is_that_of_torch(dtype: HalfType) -> None:
    """It multiplies operands of half and adds in float32, as tensor cores do; another order of adding may round otherwise."""
    rng = np.random.default_rng(0)
    x, weight, bias = (rng.standard_normal(shape, np.float32) for shape in ((64, 96), (96, 48), (48,)))
    nodes = [helper.make_node("Gemm", ["x", "w", "b"], ["y"], name="product")]
    found = emulated(one_input(nodes, {"w": weight, "b": bias}, 2), dtype)(x)
    a, b, c = (torch.from_numpy(array).to(TORCH[dtype]) for array in (x, weight, bias))
    expected = torch.addmm(c, a, b).float().numpy()
    assert (found == expected).mean() > 0.99
    assert np.abs(found - expected).max() <= np.spacing(np.abs(expected).max().astype(np.float16)) * (
        1 if dtype == "fp16" else 8
    )
    assert relative(found, x @ weight + bias) > 10 * relative(found, expected)


@BOTH
def test_a_convolution_is_that_of_torch(dtype: HalfType) -> None:
    rng = np.random.default_rng(0)
    x, weight, bias = (rng.standard_normal(shape, np.float32) for shape in ((2, 24, 9, 9), (16, 24, 3, 3), (16,)))
    nodes = [helper.make_node("Conv", ["x", "w", "b"], ["y"], name="convolution", kernel_shape=[3, 3])]
    found = emulated(one_input(nodes, {"w": weight, "b": bias}, 4), dtype)(x)
    a, b, c = (torch.from_numpy(array).to(TORCH[dtype]) for array in (x, weight, bias))
    expected = torch.nn.functional.conv2d(a, b, c).float().numpy()
    assert (found == expected).mean() > 0.99
    exact = torch.nn.functional.conv2d(*map(torch.from_numpy, (x, weight, bias))).numpy()
    assert relative(found, exact) > 10 * relative(found, expected)


@BOTH
def test_results_are_rounded_between_products_too(dtype: HalfType) -> None:
    """A chain in which onnxruntime, given the typed graph, rounds the last result only: optimizers must not do that here."""
    rng = np.random.default_rng(0)
    weights = {f"w{i}": rng.standard_normal((128, 128), np.float32) / np.float32(np.sqrt(128)) for i in range(6)}
    names = ["x", *(f"h{i}" for i in range(5)), "y"]
    nodes = [helper.make_node("MatMul", [names[i], f"w{i}"], [names[i + 1]], name=f"product{i}") for i in range(6)]
    x = rng.standard_normal((64, 128), np.float32)
    found = emulated(one_input(nodes, weights, 2), dtype)(x)
    each = last = rounded(x, dtype)
    for weight in weights.values():
        each = rounded(each @ rounded(weight, dtype), dtype)
        last = last @ rounded(weight, dtype)
    assert relative(found, rounded(last, dtype)) > 3 * relative(found, each)


def evaluate(node: onnx.NodeProto, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    """One node in float32, the slow way: onnx's own reference, or PyTorch where that has none or takes minutes."""
    settings = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    if node.op_type == "Gelu":
        approximate = settings.get("approximate", b"none").decode()
        return [torch.nn.functional.gelu(torch.from_numpy(inputs[node.input[0]]), approximate=approximate).numpy()]
    if node.op_type != "Conv":
        return ReferenceEvaluator(node).run(None, inputs)
    x, weight, *bias = (torch.from_numpy(inputs[name]) for name in node.input)
    top, left, bottom, right = settings.get("pads", (0, 0, 0, 0))
    x = torch.nn.functional.pad(x, (left, right, top, bottom))
    strides, groups = tuple(settings.get("strides", (1, 1))), settings.get("group", 1)
    return [torch.nn.functional.conv2d(x, weight, *bias, stride=strides, groups=groups).numpy()]


def check_node_by_node(graph: Path, dtype: HalfType, feeds: dict[str, np.ndarray], work: Path) -> None:
    """Every tensor of half holds nothing but numbers of half, and those that its node gives for the tensors before it."""
    path = emulated_graph(graph, dtype, work)
    typed, model = load_graph(work / graph.name), load_graph(path)
    values = {value.name: value for node in model.graph for value in node.outputs if value.dtype != IR[dtype]}
    outputs = [value.name for value in model.graph.outputs]
    model.graph.outputs.extend(value for name, value in values.items() if name not in outputs)
    ir.save(model, work / "marked.onnx", external_data="marked.onnx.data")
    session = onnxruntime.InferenceSession(work / "marked.onnx")
    tensors = dict(zip((value.name for value in session.get_outputs()), session.run(None, feeds), strict=True)) | feeds
    weights = {name: value.const_value.numpy() for name, value in typed.graph.initializers.items()}
    halves = {name for name, value in typed.graph.initializers.items() if value.dtype == IR[dtype]}
    tensors |= {name: array.astype(np.float32) if name in halves else array for name, array in weights.items()}
    judged = 0
    for node in typed.graph:
        if not any(value.dtype == IR[dtype] for value in node.outputs):
            continue
        proto = ir.to_proto(node)
        if node.op_type == "Cast":
            results = [tensors[node.inputs[0].name]]
            if node.inputs[0].is_initializer():
                tensors[node.outputs[0].name] = rounded(results[0], dtype)
                assert node.outputs[0].name not in values
                continue
        else:
            results = evaluate(proto, {value.name: tensors[value.name] for value in node.inputs if value is not None})
        for value, result in zip(node.outputs, results, strict=True):
            found = tensors[value.name]
            np.testing.assert_array_equal(found, rounded(found, dtype), err_msg=value.name)
            assert (found == rounded(result, dtype)).mean() > 0.97, f"{node.op_type} {value.name}"
            assert relative(found, result) < (2e-3 if dtype == "fp16" else 1e-2)
            judged += 1
    assert judged > 5 or graph.stem == "features"


@BOTH
@pytest.mark.parametrize("kind", ["clip", "vitamin", "siglip", "tiny"])
def test_tokenizer_graphs_node_by_node(kind: str, dtype: HalfType, mini_bundles, tmp_path: Path) -> None:
    bundle = mini_bundles(kind)
    rng = np.random.default_rng(0)
    side = onnxruntime.InferenceSession(bundle / "encode.onnx").get_inputs()[0].shape[1]
    images = rng.integers(0, 256, (1, side, side, 3), np.uint8)
    codes = rng.integers(0, 500, (1, 30), np.int32)
    for name in ("encode", "decode", "semantic", "features"):
        feeds = {"images": images} if name == "encode" else {"code_indices": codes}
        check_node_by_node(bundle / f"{name}.onnx", dtype, feeds, tmp_path)


@BOTH
def test_transformer_graph_node_by_node(dtype: HalfType, mini_generator: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    feeds = {
        "embeddings": rng.standard_normal((2, 3, 32), np.float32),
        "positions": np.tile(np.arange(3, dtype=np.int32), (2, 1)),
        "visible": np.tile(np.arange(1, 4, dtype=np.int32), (2, 1)),
        "context": np.array([0, 5], np.int32),
        "block_tables": np.array([[0], [1]], np.int32),
        "k_pages": rounded(rng.standard_normal((4, 16, 2, 16), np.float32), dtype),
        "v_pages": rounded(rng.standard_normal((4, 16, 2, 16), np.float32), dtype),
    }
    check_node_by_node(mini_generator / "transformer.onnx", dtype, feeds, tmp_path)
    session = onnxruntime.InferenceSession(tmp_path / "transformer_emulated.onnx")
    assert {value.type for value in session.get_inputs() if value.name.endswith("_pages")} == {"tensor(float)"}
    hidden, new_k, _ = session.run(None, feeds)
    np.testing.assert_array_equal(new_k, rounded(new_k, dtype))
    unrounded = feeds | {"k_pages": feeds["k_pages"] * np.float32(1 + 2**-13)}
    np.testing.assert_array_equal(session.run(None, unrounded)[0], hidden)


def test_float16_is_near_what_onnxruntime_makes_of_the_typed_graph(mini_bundle: Path, tmp_path: Path) -> None:
    """It rounds less there: weights, and what leaves the graph."""
    images = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), np.uint8)
    emulated_path = emulated_graph(mini_bundle / "encode.onnx", "fp16", tmp_path)
    paths = (mini_bundle / "encode.onnx", tmp_path / "encode.onnx", emulated_path)
    exact, typed, found = (onnxruntime.InferenceSession(path).run(["latent"], {"images": images})[0] for path in paths)
    assert 0 < relative(typed, exact) < relative(found, exact) < 5e-3
    assert relative(found, typed) < 1.2 * relative(found, exact)


def test_bfloat16_costs_eight_times_as_much(mini_bundle: Path, tmp_path: Path) -> None:
    """It has three bits less."""
    images = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), np.uint8)
    paths = [mini_bundle / "encode.onnx"]
    for dtype in NUMPY:
        (tmp_path / dtype).mkdir()
        paths.append(emulated_graph(mini_bundle / "encode.onnx", dtype, tmp_path / dtype))
    exact, fp16, bf16 = (onnxruntime.InferenceSession(path).run(["latent"], {"images": images})[0] for path in paths)
    assert 5 < relative(bf16, exact) / relative(fp16, exact) < 12


def test_pinned_nodes_are_not_rounded(mini_bundle: Path, tmp_path: Path) -> None:
    graph = mini_bundle / "decode.onnx"
    path = emulated_graph(graph, "bf16", tmp_path, compute_nodes(load_graph(graph)))
    codes = np.random.default_rng(0).integers(0, 500, (1, 30), np.int32)
    sessions = [onnxruntime.InferenceSession(path) for path in (graph, path)]
    np.testing.assert_array_equal(*(session.run(None, {"code_indices": codes})[0] for session in sessions))


def test_weights_that_are_stored_in_half_keep_their_numbers() -> None:
    """As in compact bundles: float16 weights behind a cast."""
    weight = rounded(np.random.default_rng(0).standard_normal((8, 8), np.float32), "fp16")
    nodes = [
        helper.make_node("Cast", ["compact"], ["w"], name="cast", to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["x", "w"], ["y"], name="product"),
    ]
    identity = np.eye(8, dtype=np.float32)
    for dtype in NUMPY:
        found = emulated(one_input(nodes, {"compact": weight.astype(np.float16)}, 2), dtype)(identity)
        np.testing.assert_array_equal(found, rounded(weight, dtype))


def test_sessions_are_those_of_the_bundle(mini_generator: Path, tmp_path: Path) -> None:
    """Their borders are checked against bundle.json, and nodes are pinned by graph."""
    bundle = Bundle.open(mini_generator, GeneratorConfig)
    names = compute_nodes(load_graph(mini_generator / "embed_image.onnx"))
    feeds = {
        "features": np.random.default_rng(0).standard_normal((1, 2, 40), np.float32),
        "level": np.ones(1, np.int32),
        "places": np.arange(2, dtype=np.int32),
    }
    found = []
    for pinned in ({}, {"transformer": names}, {"embed_image": names}):
        entry = bundle.graph("embed_image")
        opening = emulated_sessions(bundle, "bf16", tmp_path, pinned)
        with opening(mini_generator / "embed_image.onnx", entry, SessionOptions()) as session:
            found.append(session.run(feeds)["embeddings"])
    exact = onnxruntime.InferenceSession(mini_generator / "embed_image.onnx").run(None, feeds)[0]
    np.testing.assert_array_equal(found[0], found[1])
    assert relative(found[0], exact) > 1e-4
    np.testing.assert_allclose(found[2], exact, rtol=1e-5, atol=1e-6)
