"""Rewritten tokenizers, compared with the graphs before."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper

from tests.support.cpu_graphs import (
    FLOAT,
    NEAREST,
    SAME,
    Attributes,
    decoder,
    operators,
    rewritten,
    search,
    stored_in_half,
    upsampling,
)
from tokenflow_sdk.backends.onnxruntime import OnnxRuntimeSession
from tokenflow_sdk.backends.session import SessionOptions
from tokenflow_sdk.bundle.bundle import Bundle, find_bundle
from tokenflow_sdk.bundle.model_config import TokenizerConfig
from tokenflow_sdk.passes.cpu import rewrite_for_cpu


def both(path: Path, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    model = rewritten(path)
    onnx.checker.check_model(model, full_check=True)
    before, after = (onnxruntime.InferenceSession(graph).run(None, {"x": x})[0] for graph in (path, model.SerializeToString()))
    return before, after


@pytest.mark.parametrize("bias", [True, False])
def test_upsampling_and_a_convolution_are_four_small_ones(tmp_path: Path, bias: bool) -> None:
    """Borders too: the map has odd sides, and each pixel of the result is compared."""
    path = upsampling(tmp_path / "g.onnx", bias=bias)
    before, after = both(path, np.random.default_rng(1).standard_normal((2, 6, 5, 7)).astype(np.float32))
    assert before.shape == after.shape == (2, 10, 10, 14)
    np.testing.assert_allclose(after, before, atol=2e-5)
    found = operators(rewritten(path))
    assert (found["Resize"], found["Conv"], found["DepthToSpace"]) == (0, 4, 1)


def test_weights_may_be_stored_in_half(tmp_path: Path) -> None:
    path = stored_in_half(upsampling(tmp_path / "g.onnx"), "w")
    before, after = both(path, np.random.default_rng(1).standard_normal((1, 6, 5, 7)).astype(np.float32))
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
    assert rewrite_for_cpu(upsampling(tmp_path / "g.onnx", **changes), 2) is None


def test_an_upsampled_map_that_is_a_result_stays(tmp_path: Path) -> None:
    model = onnx.load(upsampling(tmp_path / "g.onnx"))
    model.graph.output.append(helper.make_tensor_value_info("u", FLOAT, ["batch", 6, 10, 14]))
    onnx.save(model, tmp_path / "g.onnx")
    assert rewrite_for_cpu(tmp_path / "g.onnx", 2) is None


def test_large_convolutions_of_a_decoder_have_fewer_products(tmp_path: Path) -> None:
    found = operators(rewritten(decoder(tmp_path / "g.onnx")))
    assert (found["Conv"], found["SpaceToDepth"]) == (2 + 4, 1)  # two transforms, and the four after the enlarging


@pytest.mark.parametrize(
    "changes",
    [
        {"channels": (127, 128)},
        {"channels": (128, 127)},
        {"size": (58, 59)},
        {"channels": (384, 384), "size": (39, 39)},
        {"size": ("h", 59)},
        {"size": (-1, 59)},
        {"size": (2**31, 2**31)},
        {"size": None},
        {"searches": True},
    ],
)
def test_other_convolutions_stay(tmp_path: Path, changes: Attributes) -> None:
    """Those of small maps, which do not pay for the weights of the transforms, and where a difference could tip a code."""
    found = operators(rewritten(decoder(tmp_path / "g.onnx", **changes)))
    assert (found["Conv"], found["SpaceToDepth"]) == (1 + 4, 0)


@pytest.mark.parametrize(("channels", "threads", "found"), [(128, 1, 1), (128, 3, 0), (256, 4, 1), (256, 5, 0)])
def test_many_threads_keep_the_convolutions_of_few_channels(tmp_path: Path, channels: int, threads: int, found: int) -> None:
    """What one thread does alone would take longer than all of them with the convolution."""
    path = decoder(tmp_path / "g.onnx", channels=(channels, channels), size=(64, 64))
    assert operators(rewritten(path, threads))["SpaceToDepth"] == found


def test_large_convolutions_of_an_encoder_stay(tmp_path: Path) -> None:
    assert rewrite_for_cpu(decoder(tmp_path / "g.onnx", resize=NEAREST | {"mode": "linear"}), 2) is None


@pytest.mark.parametrize("axis", [-1, 2])
def test_a_search_in_two_steps_finds_the_same_column(tmp_path: Path, axis: int) -> None:
    """Each row's largest product occurs three times, so that the order decides."""
    path = search(tmp_path / "g.onnx", columns=1152, axis=axis)
    before, after = both(path, np.random.default_rng(1).standard_normal((40, 5, 4)).astype(np.float32))
    assert after.dtype == before.dtype == np.int64
    assert np.array_equal(after, before)
    assert after.max() < 384
    assert operators(rewritten(path))["ReduceMax"] == 1


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
    assert rewrite_for_cpu(search(tmp_path / "g.onnx", **changes), 2) is None


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
