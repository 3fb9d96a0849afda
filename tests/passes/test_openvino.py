from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tokenflow_sdk.backends.onnxruntime import open_onnxruntime
from tokenflow_sdk.backends.openvino import OpenVinoSession, compile_graph, properties
from tokenflow_sdk.backends.session import SessionOptions
from tokenflow_sdk.bundle.bundle import Bundle
from tokenflow_sdk.bundle.model_config import TokenizerConfig
from tokenflow_sdk.passes.openvino import rewrite

openvino = pytest.importorskip("openvino", reason="openvino is not installed: pip install 'tokenflow-sdk[openvino]'")
ops = pytest.importorskip("openvino.opset13")
CPU = SessionOptions("cpu", threads=1)
RNG = np.random.default_rng(0)


def kinds(model: Any) -> list[str]:
    return [node.get_type_name() for node in model.get_ops()]


def computed(model: Any, *arrays: np.ndarray) -> np.ndarray:
    (found,) = openvino.Core().compile_model(model, "CPU", properties(CPU))(arrays).values()
    return found


@pytest.mark.parametrize("stable", [True, False])
def test_searches_give_the_lowest_of_the_best_without_topk(stable: bool) -> None:
    values = np.random.default_rng(0).integers(-3, 3, (2, 5, 300)).astype(np.float32)
    values[0, 0], values[0, 1, ::2], values[0, 2] = 7, np.inf, -np.inf
    values[0, 3], values[0, 3, 100] = -0.0, 0.0
    given = ops.parameter([-1, 5, 300], np.float32, name="values")
    top = ops.topk(given, np.int64(1), -1, "max", "value", index_element_type="i64", stable=stable)
    model = openvino.Model([ops.squeeze(top.output(1), np.int64(-1))], [given])
    two = ops.topk(given, np.int64(2), -1, "max", "value", index_element_type="i32")
    both = ops.topk(given, np.int64(1), -1, "max", "value", index_element_type="i32")
    least = ops.topk(given, np.int64(1), -1, "min", "value", index_element_type="i32")
    others = openvino.Model([two.output(1), *both.outputs(), least.output(1)], [given])
    for each in (model, others):
        rewrite(each, on_cpu=True)
    assert "TopK" not in kinds(model)
    assert kinds(others).count("TopK") == 3
    found = computed(model, values)
    assert found.dtype == np.int64
    assert np.array_equal(found, values.argmax(-1))


def upsampled(
    kernel: tuple[int, int] = (3, 3), bias: Any = None, half: bool = False, eight: bool = False, **changed: Any
) -> tuple[Any, np.ndarray]:
    """A map [1, 4, 5, 3] enlarged and convolved to 6 channels, and the weights; with scales of 2.2 and 2.3 it is as large."""
    told = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor", "scales": [2.0, 2.0]}
    told |= {"pads": [1, 1], "strides": [1, 1], "dilations": [1, 1]} | changed
    given = ops.parameter([1, 4, 5, 3], np.float32, name="map")
    how = [told.pop(name) for name in ("mode", "scales", "pads", "strides", "dilations")]
    scales = np.array(how[1], np.float32)
    large = ops.interpolate(given, scales, how[0], "scales", axes=np.array([2, 3]), **told)
    weight = RNG.standard_normal((6, 4, *kernel)).astype(np.float16 if half else np.float32)
    constant = ops.convert(ops.constant(weight), "f32") if half else ops.constant(weight)
    if eight:
        constant = ops.multiply(ops.convert(ops.constant(weight.astype(np.int8)), "f32"), ops.constant(np.float32(0.1)))
    last = ops.convolution(large, constant, how[3], how[2], how[2], how[4])
    if bias is not None:
        last = ops.add(last, ops.constant(bias)) if bias.shape[1] != 6 else ops.add(ops.constant(bias), last)
    return openvino.Model([ops.relu(last)], [given]), weight.astype(np.float32)


def enlarged_and_convolved(image: np.ndarray, weight: np.ndarray, bias: np.ndarray | float) -> np.ndarray:
    """A slow oracle: each output pixel is the sum over a window of the enlarged and padded map."""
    large = np.pad(image[0].repeat(2, axis=1).repeat(2, axis=2), ((0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(large, (3, 3), axis=(1, 2))
    return np.maximum(np.einsum("ihwkl,oikl->ohw", windows, weight)[None] + bias, 0)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("bias", [None, RNG.standard_normal((1, 6, 1, 1)), RNG.standard_normal((1, 1, 10, 6))])
def test_upsampling_and_a_convolution_are_four_of_the_small_map(bias: np.ndarray | None, half: bool) -> None:
    bias = None if bias is None else bias.astype(np.float32)
    model, weight = upsampled(bias=bias, half=half)
    rewrite(model, on_cpu=True)
    assert kinds(model).count("Convolution") == 4
    assert "Interpolate" not in kinds(model)
    image = RNG.standard_normal((1, 4, 5, 3)).astype(np.float32)
    expected = enlarged_and_convolved(image, weight, 0 if bias is None else bias)
    np.testing.assert_allclose(computed(model, image), expected, atol=2e-5)


@pytest.mark.parametrize(
    "changed",
    [
        {"mode": "linear"},
        {"coordinate_transformation_mode": "half_pixel"},
        {"nearest_mode": "ceil"},
        {"scales": [2.0, 3.0]},
        {"scales": [2.2, 2.3]},
        {"eight": True},
        {"pads": [0, 0]},
        {"strides": [2, 2]},
        {"dilations": [2, 2], "pads": [1, 1]},
        {"kernel": (5, 5)},
    ],
)
def test_other_convolutions_and_resizes_stay(changed: dict[str, Any]) -> None:
    model, _ = upsampled(**changed)
    before = kinds(model)
    rewrite(model, on_cpu=True)
    assert kinds(model) == before


def normalized(sizes: list[int], groups: int, axis: int = 2, **changed: Any) -> Any:
    given = ops.parameter(sizes, np.float32, name="map")
    rows = ops.reshape(given, np.array([sizes[0], groups, -1]), False)
    told = {"normalize_variance": True, "eps": 1e-3, "eps_mode": "inside_sqrt"} | changed
    norm = ops.mvn(rows, np.array([axis]), **told)
    return openvino.Model([ops.reshape(norm, np.array(sizes), False)], [given])


def test_what_else_reads_an_upsampled_map_or_its_convolution_is_as_it_was() -> None:
    model, weight = upsampled(bias=np.ones((1, 6, 1, 1), np.float32))
    (large,) = (node for node in model.get_ops() if node.get_type_name() == "Interpolate")
    (conv,) = (node for node in model.get_ops() if node.get_type_name() == "Convolution")
    outputs = [model.get_results()[0].input_value(0), large.output(0), ops.relu(conv).output(0)]
    several = openvino.Model([ops.result(output) for output in outputs], model.get_parameters())
    rewrite(several, on_cpu=True)
    image = RNG.standard_normal((1, 4, 5, 3)).astype(np.float32)
    found = list(openvino.Core().compile_model(several, "CPU", properties(CPU))(image).values())
    np.testing.assert_allclose(found[0], enlarged_and_convolved(image, weight, 1), atol=2e-5)
    np.testing.assert_array_equal(found[1], image.repeat(2, axis=2).repeat(2, axis=3))
    np.testing.assert_allclose(found[2], enlarged_and_convolved(image, weight, 0), atol=2e-5)


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("axis", [2, -1])
def test_a_norm_of_groups_is_that_of_its_map(groups: int, axis: int) -> None:
    """Also where the mean is a thousand times the deviation, and where all is equal."""
    model = normalized([1, 6, 7, 9], groups, axis)
    rewrite(model, on_cpu=True)
    assert "MVN" not in kinds(model)
    for image in (RNG.standard_normal((1, 6, 7, 9)), RNG.standard_normal((1, 6, 7, 9)) + 1000, np.full((1, 6, 7, 9), 3.0)):
        rows = image.astype(np.float32).astype(np.float64).reshape(groups, -1)
        expected = (rows - rows.mean(1, keepdims=True)) / np.sqrt(rows.var(1, keepdims=True) + 1e-3)
        found = computed(model, image.astype(np.float32))
        np.testing.assert_allclose(found.reshape(groups, -1), expected, atol=1e-3 if image.mean() > 100 else 1e-5)


@pytest.mark.parametrize(
    ("sizes", "changed"),
    [
        ([2, 6, 7, 9], {}),
        ([1, 6, 7], {}),
        ([1, 6, 7, 9], {"axis": 1}),
        ([1, 6, 7, 9], {"normalize_variance": False}),
        ([1, 6, 7, 9], {"eps_mode": "outside_sqrt"}),
    ],
)
def test_other_norms_stay(sizes: list[int], changed: dict[str, Any]) -> None:
    model = normalized(sizes, 2, **changed)
    rewrite(model, on_cpu=True)
    assert "MVN" in kinds(model)


def test_a_gpu_computes_its_own_way_and_a_graph_that_searches_as_before() -> None:
    model = normalized([1, 6, 7, 9], 2)
    rewrite(model, on_cpu=False)
    assert "MVN" in kinds(model)
    given = model.get_parameters()[0]
    top = ops.topk(model.get_results()[0].input_value(0), np.int64(1), -1, "max", "value", index_element_type="i32")
    searching = openvino.Model([top.output(1)], [given])
    rewrite(searching, on_cpu=True)
    assert "MVN" in kinds(searching)
    assert "TopK" not in kinds(searching)
    # Also where its search is another than those that are replaced.
    model = normalized([1, 6, 7, 9], 2)
    two = ops.topk(model.get_results()[0].input_value(0), np.int64(2), -1, "max", "value", index_element_type="i32")
    searching = openvino.Model([two.output(1)], model.get_parameters())
    rewrite(searching, on_cpu=True)
    assert "MVN" in kinds(searching)
    assert "TopK" in kinds(searching)


@pytest.mark.parametrize("kind", ["clip", "tiny"])
def test_a_decoder_has_no_norm_and_no_upsampling_left_and_an_encoder_its_own(kind: str, mini_bundles: Any) -> None:
    directory: Path = mini_bundles(kind)
    bundle = Bundle.open(directory, TokenizerConfig)
    found = {}
    for name in ("encode", "decode"):
        compiled = compile_graph(bundle.graph_path(name), bundle.graph(name), CPU)
        nodes = compiled.model.get_runtime_model().get_ops()
        found[name] = {str(node.get_rt_info()["layerType"].value) for node in nodes}
    assert not found["decode"] & {"MVN", "Interpolate"}
    assert "DepthToSpace" in found["decode"]
    assert "MVN" in found["encode"]
    config = bundle.config
    codes = RNG.integers(0, config.codebook_size, (1, config.n_codes), np.int32)
    entry = bundle.graph("decode")
    with open_onnxruntime(bundle.graph_path("decode"), entry, CPU) as other:
        expected = other.run({"code_indices": codes})["images"]
    with OpenVinoSession(compile_graph(bundle.graph_path("decode"), entry, CPU), entry, "cpu") as session:
        pictures = session.run({"code_indices": codes})["images"]
    assert np.abs(pictures.astype(int) - expected).max() <= 1
