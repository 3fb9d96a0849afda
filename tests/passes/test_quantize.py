from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from tokenflow_sdk.engines.build import engine_graph
from tokenflow_sdk.passes.quantize import LARGEST, ActivationRanges, inner_convolutions, quantize, unscaled_convolutions

FLOATS = {"fp32": (TensorProto.FLOAT, np.float32), "fp16": (TensorProto.FLOAT16, np.float16)}


def convolution(path: Path, weights: np.ndarray, twice: bool = False) -> None:
    """[1, 3, 6, 6] -> a convolution without padding, or the sum of two that read the same."""
    kind = helper.np_dtype_to_tensor_dtype(weights.dtype)
    nodes = [helper.make_node("Conv", ["x", "w"], ["y" if not twice else "y0"], name="conv")]
    if twice:
        nodes.append(helper.make_node("Conv", ["x", "w"], ["y1"], name="other"))
        nodes.append(helper.make_node("Add", ["y0", "y1"], ["y"], name="add"))
    x = helper.make_tensor_value_info("x", kind, [1, 3, 6, 6])
    y = helper.make_tensor_value_info("y", kind, [1, len(weights), 4, 4])
    graph = helper.make_graph(nodes, "g", [x], [y], [numpy_helper.from_array(weights, "w")])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), path)


def rounded(values: np.ndarray, scale: np.ndarray, dtype: str) -> np.ndarray:
    """Q/DQ by hand: the nearest of the type's numbers times the scale, saturating, ties to even."""
    least, largest = {"int8": (-128, 127), "fp8": (-448, 448)}[dtype]
    units = np.clip(values.astype(np.float64) / scale, least, largest)
    if dtype == "int8":
        return np.rint(units) * scale
    exponent = np.maximum(np.floor(np.log2(np.maximum(np.abs(units), 2.0**-9))), -6)
    step = 2.0 ** (exponent - 3)
    return np.rint(units / step) * step * scale


def convolved(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    windows = np.lib.stride_tricks.sliding_window_view(x[0], (3, 3), axis=(1, 2))
    return np.einsum("ihwkl,oikl->ohw", windows, w)[None]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("dtype", ["int8", "fp8"])
def test_a_convolution_is_what_numpy_says(dtype, precision: str, tmp_path: Path) -> None:
    """Inputs by tensor and saturating, weights by output channel, whose sizes differ a thousandfold."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, 3, 6, 6)).astype(FLOATS[precision][1])
    channels = np.array([1, 0.03, 0.001, 30])[:, None, None, None]
    w = (rng.standard_normal((4, 3, 3, 3)) * channels).astype(FLOATS[precision][1])
    convolution(tmp_path / "plain.onnx", w)
    model = ir.load(tmp_path / "plain.onnx")
    quantize(model, ActivationRanges(dtype, {"conv": 1.5, "elsewhere": 1.0}))
    ir.save(model, tmp_path / "rounded.onnx")
    onnx.checker.check_model(tmp_path / "rounded.onnx", full_check=True)
    assert "w" not in model.graph.initializers
    names = {value.dtype for value in model.graph.initializers.values()}
    assert names == {
        ir.DataType.INT8 if dtype == "int8" else ir.DataType.FLOAT8E4M3FN,
        ir.DataType.FLOAT if precision == "fp32" else ir.DataType.FLOAT16,
    }
    assert np.abs(x).max() > 1.5
    kind = FLOATS[precision][1]
    scale_x = kind(1.5 / LARGEST[dtype]).astype(np.float64)
    scale_w = (np.abs(w.astype(np.float32)).max(axis=(1, 2, 3), keepdims=True) / LARGEST[dtype]).astype(kind).astype(np.float64)
    expected = convolved(rounded(x, scale_x, dtype), rounded(w, scale_w, dtype))
    # float16 divides by its own scale, so a number halfway between two may go to the other.
    near = {"fp32": 1e-5, "fp16": 2e-2}[precision] * np.abs(expected).max(axis=(0, 2, 3), keepdims=True)
    for found in (
        ReferenceEvaluator(str(tmp_path / "rounded.onnx")).run(None, {"x": x})[0],
        onnxruntime.InferenceSession(tmp_path / "rounded.onnx").run(None, {"x": x})[0],
    ):
        assert found.dtype == kind
        assert (np.abs(found - expected) <= near).all()
    unrounded = convolved(x.astype(np.float64), w.astype(np.float64))
    assert (np.abs(expected - unrounded).max(axis=(0, 2, 3)) > 1e-4 * np.abs(unrounded).max(axis=(0, 2, 3))).all()


def test_the_oracle_rounds_to_fp8_as_the_type_does() -> None:
    values = np.concatenate([np.linspace(-460, 460, 4001), np.geomspace(1e-4, 448, 4001)])
    expected = values.clip(-448, 448).astype(np.float32).astype(ml_dtypes.float8_e4m3fn).astype(np.float64)
    np.testing.assert_allclose(rounded(values.astype(np.float32), np.float64(1), "fp8"), expected)


def test_convolutions_that_read_the_same_share_its_rounding(tmp_path: Path) -> None:
    convolution(tmp_path / "plain.onnx", np.ones((4, 3, 3, 3), np.float32), twice=True)
    model = ir.load(tmp_path / "plain.onnx")
    quantize(model, ActivationRanges("int8", {"conv": 2.0, "other": 2.0}))
    assert [node.op_type for node in model.graph].count("QuantizeLinear") == 1


def test_weights_of_nothing_stay_nothing(tmp_path: Path) -> None:
    convolution(tmp_path / "plain.onnx", np.zeros((4, 3, 3, 3), np.float16))
    model = ir.load(tmp_path / "plain.onnx")
    quantize(model, ActivationRanges("fp8", {"conv": 1e-30}))
    ir.save(model, tmp_path / "rounded.onnx")
    (found,) = onnxruntime.InferenceSession(tmp_path / "rounded.onnx").run(None, {"x": np.ones((1, 3, 6, 6), np.float16)})
    np.testing.assert_array_equal(found, np.zeros_like(found))


@pytest.mark.parametrize("kind", ["clip", "tiny"])
def test_the_outermost_convolutions_stay(kind: str, mini_bundles) -> None:
    """Those that read codes, and those that write pixels."""
    model = ir.load(mini_bundles(kind) / "decode.onnx")
    every = {str(node.name): str(node.inputs[1].name) for node in model.graph if node.op_type == "Conv"}
    left = {every[name].partition(".weight")[0] for name in set(every) - set(inner_convolutions(model))}
    expected = {"post_quant_conv", "decoder.conv_in", "decoder.conv_out"}
    assert left == (expected | {"decoder.skip"} if kind == "tiny" else expected)


@pytest.mark.parametrize("kind", ["clip", "tiny"])
def test_convolutions_behind_a_norm_are_scaled(kind: str, mini_bundles) -> None:
    """All of a block are, but for what attention sums up. Maps are enlarged, and given other channels, as they are."""
    model = ir.load(mini_bundles(kind) / "decode.onnx")
    weights = {
        str(node.name): str(node.inputs[1].name).removesuffix(".weight") for node in model.graph if node.op_type == "Conv"
    }
    unscaled = {weights[name] for name in unscaled_convolutions(model)}
    inner = {weights[name] for name in inner_convolutions(model)}
    assert unscaled == {name for name in inner if name.rpartition(".")[2] in ("proj_out", "nin_shortcut", "conv")}
    assert {name.rpartition(".")[2] for name in inner - unscaled} == {"conv1", "conv2", "q", "k", "v"}


def test_a_norm_whose_gain_is_stored_in_half_scales_too(mini_bundles) -> None:
    model = ir.load(mini_bundles("clip") / "decode.onnx")
    expected = unscaled_convolutions(model)
    norm = next(node for node in model.graph if node.op_type == "InstanceNormalization")
    gain = next(node for node in model.graph if node.op_type == "Mul" and node.inputs[1].const_value is not None)
    stored = ir.Value(name="half", type=ir.TensorType(ir.DataType.FLOAT16))
    stored.const_value = ir.Tensor(gain.inputs[1].const_value.numpy().astype(np.float16), name="half")
    model.graph.register_initializer(stored)
    cast = ir.node("Cast", [stored], {"to": ir.DataType.FLOAT})
    model.graph.insert_before(norm, cast)
    gain.replace_input_with(1, cast.outputs[0])
    assert unscaled_convolutions(model) == expected


@pytest.mark.parametrize("precision", ["fp16", "bf16", None])
def test_a_decoder_for_engines(precision, mini_bundles, tmp_path: Path) -> None:
    """Every pair has the type of what it stands in; pinned nodes are left alone; the bundle's graph is untouched."""
    graph = mini_bundles("tiny") / "decode.onnx"
    before = graph.read_bytes()
    names = inner_convolutions(ir.load(graph))
    made = engine_graph(graph, precision, tmp_path, names[:1], ActivationRanges("int8", dict.fromkeys(names, 4.0)))
    assert made.parent == tmp_path
    assert graph.read_bytes() == before
    if precision != "bf16":  # onnx lists no bfloat16 convolution at opset 20; TensorRT has one
        onnx.checker.check_model(made, full_check=True)
    nodes = {str(node.name): node for node in ir.load(made).graph}
    half = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16, None: ir.DataType.FLOAT}[precision]
    for name in names[1:]:
        for value in nodes[name].inputs[:2]:
            assert value.producer().op_type == "DequantizeLinear"
            assert value.producer().inputs[1].dtype == half
    assert nodes[names[0]].inputs[0].producer().op_type != "DequantizeLinear"


def test_ranges_are_known_by_all_they_say() -> None:
    ranges = ActivationRanges("int8", {"a": 1.0, "b": 2.0})
    assert ranges.digest == ActivationRanges("int8", {"b": 2.0, "a": 1.0}).digest
    others = (ActivationRanges("fp8", ranges.magnitudes), ActivationRanges("int8", {"a": 1.0, "b": 2.5}), ranges.without(["b"]))
    assert len({ranges.digest, *(other.digest for other in others)}) == 4
