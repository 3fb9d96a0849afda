"""Convolutions by Winograd's filtering, compared with convolutions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from tests.support.cpu_graphs import Attributes, decoder, operators, rewritten
from tokenflow_sdk.passes import winograd


def both(path: Path, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """What the convolution gives, and what stands in its place."""
    x = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    results = []
    for model in (onnx.load(path), rewritten(path)):
        model.graph.output.append(helper.make_tensor_value_info("c", TensorProto.FLOAT, None))
        results.append(onnxruntime.InferenceSession(model.SerializeToString()).run(["c"], {"x": x})[0])
    return results[0], results[1]


@pytest.mark.parametrize(
    ("size", "changes"),
    [
        ((24, 24), {}),
        ((26, 23), {}),
        ((25, 27), {"bias": False}),
        ((2, 512), {}),
        ((24, 24), {"channels": (144, 128)}),
    ],
)
def test_every_pixel_is_the_same_but_for_rounding(tmp_path: Path, size: tuple[int, int], changes: Attributes) -> None:
    """Borders too, and maps whose sides are no multiples of a tile's."""
    channels = changes.get("channels", (128, 136))
    before, after = both(decoder(tmp_path / "g.onnx", size=size, **changes), (2, channels[0], *size))
    assert after.shape == before.shape == (2, channels[1], *size)
    np.testing.assert_allclose(after, before, atol=1e-4)
    assert before.std() > 0.5


@pytest.mark.parametrize("most", [36 * 136 * 6, 36 * 136 * 6 * 2, 36 * 136 * 6 * 6])
def test_strips_of_a_map_are_those_of_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    monkeypatch.setattr(winograd, "_MOST", most)
    path = decoder(tmp_path / "g.onnx")
    assert operators(rewritten(path))["SpaceToDepth"] == -(-7 * 6 * 6 * 136 // (most // 6))
    before, after = both(path, (1, 128, 26, 23))
    np.testing.assert_allclose(after, before, atol=1e-4)


def test_weights_may_be_stored_in_half(tmp_path: Path) -> None:
    model = onnx.load(decoder(tmp_path / "g.onnx"))
    weight = next(tensor for tensor in model.graph.initializer if tensor.name == "w")
    half = numpy_helper.from_array(numpy_helper.to_array(weight).astype(np.float16), "half")
    model.graph.initializer.remove(weight)
    model.graph.initializer.append(half)
    model.graph.node.insert(0, helper.make_node("Cast", ["half"], ["w"], to=TensorProto.FLOAT))
    onnx.save(model, tmp_path / "h.onnx")
    assert operators(rewritten(tmp_path / "h.onnx"))["SpaceToDepth"] == 1
    before, after = both(tmp_path / "h.onnx", (1, 128, 26, 23))
    np.testing.assert_allclose(after, before, atol=1e-4)


def test_new_weights_are_computed_while_the_graph_is_loaded(tmp_path: Path) -> None:
    """So that a call does not compute them again."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    onnxruntime.InferenceSession(rewritten(decoder(tmp_path / "g.onnx")).SerializeToString(), options)
    assert operators(onnx.load(tmp_path / "optimized.onnx"))["Transpose"] == 0
