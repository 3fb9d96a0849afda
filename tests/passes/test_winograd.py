"""Convolutions by Winograd's filtering, compared with convolutions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from tests.support.cpu_graphs import Attributes, decoder, operators, rewritten, stored_in_half
from tokenflow_sdk.passes import winograd


def both(path: Path, shape: tuple[int, ...], strips: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """What the convolution gives, and what the strips that stand in its place do."""
    x = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    model = rewritten(path)
    onnx.checker.check_model(model, full_check=True)
    assert operators(model)["SpaceToDepth"] == strips
    results = []
    for each in (onnx.load(path), model):
        each.graph.output.append(helper.make_tensor_value_info("c", TensorProto.FLOAT, None))
        results.append(onnxruntime.InferenceSession(each.SerializeToString()).run(["c"], {"x": x})[0])
    return results[0], results[1]


@pytest.mark.parametrize(
    ("size", "changes"),
    [
        ((64, 56), {}),
        ((62, 59), {}),
        ((61, 57), {"bias": None}),
        ((61, 57), {"bias": ""}),
        ((2, 2048), {}),
        ((60, 64), {"channels": (144, 128), "opset": 18}),
    ],
)
def test_every_pixel_is_the_same_but_for_rounding(tmp_path: Path, size: tuple[int, int], changes: Attributes) -> None:
    """Borders too, and maps whose sides are no multiples of a tile's."""
    channels = changes.get("channels", (128, 136))
    before, after = both(decoder(tmp_path / "g.onnx", size=size, **changes), (2, channels[0], *size))
    assert after.shape == before.shape == (2, channels[1], *size)
    np.testing.assert_allclose(after, before, atol=1e-4)
    assert before.std() > 0.5


@pytest.mark.parametrize(("rows", "strips"), [(16, 1), (8, 2), (3, 6), (1, 16), (0, 16)])
def test_strips_of_a_map_are_those_of_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int, strips: int
) -> None:
    """The map has 16 rows of 15 tiles. Where not even a row's numbers are few enough, strips are of a row."""
    monkeypatch.setattr(winograd, "_MOST", max(1, rows * 15 * 36 * 136))
    before, after = both(decoder(tmp_path / "g.onnx"), (2, 128, 62, 59), strips)
    np.testing.assert_allclose(after, before, atol=1e-4)


def test_weights_may_be_stored_in_half(tmp_path: Path) -> None:
    before, after = both(stored_in_half(decoder(tmp_path / "g.onnx"), "w"), (1, 128, 62, 59))
    np.testing.assert_allclose(after, before, atol=1e-4)


def test_new_weights_are_computed_while_the_graph_is_loaded(tmp_path: Path) -> None:
    """So that a call does not compute them again."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    model = rewritten(decoder(tmp_path / "g.onnx"))
    onnxruntime.InferenceSession(model.SerializeToString(), options)
    assert operators(model)["Gemm"] == 1
    assert operators(onnx.load(tmp_path / "optimized.onnx"))["Gemm"] == 0
