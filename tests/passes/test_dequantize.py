from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from tests.support.mini_generator import SMALLEST, export_quietly, generator_shapes, tokenizer_bundle, write_checkpoint
from tokenflow_export.precision.generator_search import open_exact
from tokenflow_export.tracing.weight_quantization import ExportPrecision, quantize_weights
from tokenflow_sdk.bundle.bundle import Bundle
from tokenflow_sdk.bundle.model_config import GeneratorConfig
from tokenflow_sdk.parity.certificate import certify
from tokenflow_sdk.parity.generator import GeneratorReference
from tokenflow_sdk.passes.dequantize import dequantize


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same small generator with float32 and with int8 weights."""
    directory = tmp_path_factory.mktemp("dequantize")
    checkpoint = write_checkpoint(directory / "hf", SMALLEST, generator_shapes(SMALLEST, 44, 500, (1, 2)), 40, 500)
    tokenizer = tokenizer_bundle(directory / "tok", (1, 2), 500)
    precisions = {"fp32": ExportPrecision(), "int8": ExportPrecision(weights="int8")}
    return {name: export_quietly(checkpoint, tokenizer, directory / name, value) for name, value in precisions.items()}


def test_integer_products_become_plain_ones_that_are_nearer_to_float32(bundles: dict[str, Path], tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    feeds = {
        "embeddings": rng.standard_normal((2, 3, 32), np.float32),
        "positions": np.tile(np.arange(3, dtype=np.int32), (2, 1)),
        "visible": np.tile(np.arange(1, 4, dtype=np.int32), (2, 1)),
        "context": np.array([0, 5], np.int32),
        "block_tables": np.array([[0], [1]], np.int32),
        "k_pages": rng.standard_normal((4, 16, 2, 16), np.float32),
        "v_pages": rng.standard_normal((4, 16, 2, 16), np.float32),
    }
    model = ir.load(bundles["int8"] / "transformer.onnx")
    before = [node.op_type for node in model.graph]
    dequantize(model)
    after = [node.op_type for node in model.graph]
    assert before.count("MatMulInteger") == 7
    assert "MatMulInteger" not in after
    assert after.count("MatMul") == before.count("MatMul") + 7
    assert after.count("Round") == 0
    assert not [name for name in model.graph.initializers if name.endswith("_int8")]
    ir.save(model, tmp_path / "plain.onnx")
    paths = (bundles["fp32"] / "transformer.onnx", bundles["int8"] / "transformer.onnx", tmp_path / "plain.onnx")
    exact, rounded, plain = (onnxruntime.InferenceSession(path).run(None, feeds)[0] for path in paths)
    assert 0 < np.abs(plain - exact).mean() < np.abs(rounded - exact).mean()


def test_engines_reach_a_result_of_the_reference(bundles: dict[str, Path]) -> None:
    """The graphs' own result is coarser than what engines compute from the same weights."""
    bundle = Bundle.open(bundles["int8"], GeneratorConfig)
    certificate = certify(bundle, open_exact, "fp32", pages=8, page_size=16)
    assert certificate.figures["hidden_error"] < 1e-4
    assert certificate.figures["same_choice"] == 1
    own, exact = GeneratorReference.load(bundle).hidden
    assert np.abs(own - exact).max() > 1e-2
    assert GeneratorReference.load(Bundle.open(bundles["fp32"], GeneratorConfig)).hidden.shape[0] == 1


def test_other_graphs_stay_as_they_are(bundles: dict[str, Path]) -> None:
    model = ir.load(bundles["fp32"] / "transformer.onnx")
    before = [node.name for node in model.graph]
    dequantize(model)
    assert [node.name for node in model.graph] == before


def test_a_product_may_be_what_the_graph_gives() -> None:
    """As the logits of a head, which are drawn from as well."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((32, 8)).astype(np.float32)
    model = ir.from_onnx_text(
        """<ir_version: 10, opset_import: ["" : 20]>
        head (float[rows, 32] hidden) => (float[rows, 8] logits, float[rows, 8] likely) <float[32, 8] weight>
        { logits = MatMul(hidden, weight)
          likely = Softmax(logits) }""",
        initializers=[ir.tensor(weight, name="weight")],
    )
    feeds = {"hidden": rng.standard_normal((5, 32)).astype(np.float32)}
    quantize_weights(model, "int8")
    rounded = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString()).run(None, feeds)
    dequantize(model)
    assert [node.op_type for node in model.graph] == ["MatMul", "Softmax"]
    assert [value.name for value in model.graph.outputs] == ["logits", "likely"]
    plain = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString()).run(None, feeds)
    exact = feeds["hidden"] @ weight
    assert 0 < np.abs(plain[0] - exact).mean() < np.abs(rounded[0] - exact).mean()
    np.testing.assert_allclose(plain[1].sum(axis=1), 1, rtol=1e-5)
