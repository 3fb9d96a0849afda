from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from tests.support.mini_generator import GROUPED, export_quietly, generator_shapes, tokenizer_bundle, write_checkpoint
from tokenflow_export.tracing.weight_quantization import quantize_blocks, quantize_weights
from tokenflow_sdk.errors import MissingPackageError
from tokenflow_sdk.passes.finite_pages import keep_pages_finite
from tokenflow_sdk.passes.half_precision import compute_nodes, to_half
from tokenflow_sdk.pictures.images import psnr

EXACT = {
    "ReduceMean",
    "ReduceSum",
    "Softmax",
    "Sqrt",
    "Pow",
    "Reciprocal",
    "ArgMax",
    "TopK",
    "CumSum",
    "LayerNormalization",
    "Sin",
}


def half(graph: Path, out: Path, pinned: tuple[str, ...] = ()) -> ir.Model:
    model = ir.load(graph)
    to_half(model, "fp16", pinned)
    keep_pages_finite(model)
    ir.save(model, out)
    onnx.checker.check_model(out, full_check=True)  # every operator is given types it takes
    return model


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("half")
    checkpoint = write_checkpoint(directory / "hf", GROUPED, generator_shapes(GROUPED, 44, 500, (1, 2)), 40, 500)
    return export_quietly(checkpoint, tokenizer_bundle(directory / "tok", (1, 2), 500), directory / "bundle")


@pytest.mark.parametrize("kind", ["clip", "vitamin", "siglip", "tiny"])
def test_tokenizer_graphs(kind: str, mini_bundles, tmp_path: Path) -> None:
    """Convolutions in half; norms, the search and the last step in float32; borders as before; and nearly the same results."""
    bundle = mini_bundles(kind)
    side = onnxruntime.InferenceSession(bundle / "encode.onnx").get_inputs()[0].shape[1]
    images = np.random.default_rng(0).integers(0, 256, (2, side, side, 3), np.uint8)
    found = {}
    for name, feeds in (("encode", {"images": images}), ("decode", None), ("semantic", None), ("features", None)):
        model = half(bundle / f"{name}.onnx", tmp_path / f"{name}.onnx")
        computing = [node for node in model.graph if node.op_type in ("Conv", "MatMul", "Gemm")]
        in_half = [node for node in computing if node.outputs[0].dtype == ir.DataType.FLOAT16]
        assert len(in_half) >= 0.5 * len(computing) or name == "features"
        for node in model.graph:
            if node.op_type in EXACT:
                assert all(value.dtype != ir.DataType.FLOAT16 for value in (*node.inputs, *node.outputs) if value is not None)
        feeds = feeds or {"code_indices": found["encode"][0][0]}
        sessions = [onnxruntime.InferenceSession(path / f"{name}.onnx") for path in (bundle, tmp_path)]
        found[name] = [session.run(None, feeds) for session in sessions]
        found[name] = [results if name == "encode" else results[0] for results in found[name]]
    latents = found["encode"][0][2], found["encode"][1][2]
    assert 0 < np.abs(latents[0] - latents[1]).max() < 0.05 * np.abs(latents[0]).max()
    assert psnr(*found["decode"]) > 40
    assert np.abs(found["semantic"][0] - found["semantic"][1]).max() < 0.05 * np.abs(found["semantic"][0]).max()


def test_the_search_itself_stays_exact(mini_bundles, tmp_path: Path) -> None:
    """From its own latent, the half-precision graph's codes are those of the plain search."""
    from tokenflow_sdk import Tokenizer
    from tokenflow_sdk.parity.tokenizer import TokenizerReference, scale_cells

    half(mini_bundles("clip") / "encode.onnx", tmp_path / "encode.onnx")
    images = np.random.default_rng(1).integers(0, 256, (1, 64, 64, 3), np.uint8)
    codes, _, latent = onnxruntime.InferenceSession(tmp_path / "encode.onnx").run(None, {"images": images})
    with Tokenizer.from_pretrained(mini_bundles("clip")) as tokenizer:
        codebook = TokenizerReference.load(tokenizer.bundle).codebook
        expected = np.concatenate([nearest for _, nearest in scale_cells(latent[0], codebook, tokenizer.config)])
    np.testing.assert_array_equal(codes[0], expected)


def test_generator_graphs(generator: Path, tmp_path: Path) -> None:
    for name in ("embed_text", "embed_image", "transformer", "sample"):
        model = half(generator / f"{name}.onnx", tmp_path / f"{name}.onnx")
        types = {value.name: value.dtype for value in (*model.graph.inputs, *model.graph.outputs)}
        for pages in ("k_pages", "v_pages", "new_k", "new_v"):
            assert types.get(pages, ir.DataType.FLOAT16) == ir.DataType.FLOAT16
        for wide in ("embeddings", "hidden", "logits", "noise"):
            assert types.get(wide, ir.DataType.FLOAT) == ir.DataType.FLOAT
    rng = np.random.default_rng(0)
    feeds = {
        "embeddings": rng.standard_normal((2, 3, 64), np.float32),
        "positions": np.tile(np.arange(3, dtype=np.int32), (2, 1)),
        "visible": np.tile(np.arange(1, 4, dtype=np.int32), (2, 1)),
        "context": np.array([0, 5], np.int32),
        "block_tables": np.array([[0], [1]], np.int32),
        "k_pages": rng.standard_normal((4, 16, 2, 16), np.float32),
        "v_pages": rng.standard_normal((4, 16, 2, 16), np.float32),
    }
    expected = onnxruntime.InferenceSession(generator / "transformer.onnx").run(None, feeds)
    feeds |= {name: feeds[name].astype(np.float16) for name in ("k_pages", "v_pages")}
    found = onnxruntime.InferenceSession(tmp_path / "transformer.onnx").run(None, feeds)
    assert 0 < np.abs(found[0] - expected[0]).max() < 0.02
    assert found[1].dtype == np.float16
    # A sequence that went wrong leaves nothing behind that could spoil others.
    feeds["embeddings"][0] = np.nan
    again = onnxruntime.InferenceSession(tmp_path / "transformer.onnx").run(None, feeds)
    assert np.isnan(again[0][0]).all()
    np.testing.assert_array_equal(again[0][1], found[0][1])
    for kept, right in zip(again[1:], found[1:], strict=True):
        assert not kept[:, 0].any()
        np.testing.assert_array_equal(kept[:, 1], right[:, 1])


def test_pinned_nodes_stay_in_float32(mini_bundles, tmp_path: Path) -> None:
    graph = mini_bundles("clip") / "decode.onnx"
    names = compute_nodes(ir.load(graph))
    assert names
    model = half(graph, tmp_path / "all.onnx", tuple(names))
    assert all(node.outputs[0].dtype != ir.DataType.FLOAT16 for node in model.graph if node.op_type == "Conv")
    codes = np.random.default_rng(0).integers(0, 500, (1, 30), np.int32)
    sessions = [onnxruntime.InferenceSession(path) for path in (graph, tmp_path / "all.onnx")]
    np.testing.assert_array_equal(*(session.run(None, {"code_indices": codes})[0] for session in sessions))


def test_without_onnx_ir_the_extra_is_named(mini_bundles, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ir.load(mini_bundles("clip") / "features.onnx")
    monkeypatch.setitem(sys.modules, "onnx_ir", None)
    with pytest.raises(MissingPackageError, match=r"tokenflow-sdk\[build\]"):
        to_half(model, "fp16")


@pytest.mark.parametrize("pinned", [False, True])
def test_weights_of_4_bits_are_half_too(pinned: bool, tmp_path: Path) -> None:
    """The exporter writes no type between them and their product."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((32, 8)).astype(np.float32)
    model = ir.from_onnx_text(
        """<ir_version: 10, opset_import: ["" : 20]>
        head (float[rows, 32] hidden) => (float[rows, 8] logits) <float[32, 8] weight>
        { logits = MatMul(hidden, weight) }""",
        initializers=[ir.tensor(weight, name="weight")],
    )
    quantize_weights(model, "int4")
    ir.save(model, tmp_path / "int4.onnx")
    (product,) = (node.name for node in ir.load(tmp_path / "int4.onnx").graph if node.op_type == "MatMul")
    rewritten = half(tmp_path / "int4.onnx", tmp_path / "half.onnx", (str(product),) if pinned else ())
    types = {node.op_type: node.outputs[0].dtype for node in rewritten.graph if node.op_type != "Cast"}
    assert types["DequantizeLinear"] == ir.DataType.FLOAT16
    assert types["MatMul"] == (ir.DataType.FLOAT if pinned else ir.DataType.FLOAT16)
    hidden = rng.standard_normal((5, 32)).astype(np.float32)
    settings = onnxruntime.SessionOptions()
    # Optimized, it would round what the product reads to 8 bits.
    settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    (found,) = onnxruntime.InferenceSession(tmp_path / "half.onnx", settings).run(None, {"hidden": hidden})
    q, scales = quantize_blocks(weight)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, hidden @ (q.astype(np.float32) * scales), atol=0.01)
