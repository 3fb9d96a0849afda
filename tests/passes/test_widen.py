from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from tokenflow_sdk.engines.build import engine_graph
from tokenflow_sdk.passes.widen import widen

TYPES = {None: ir.DataType.FLOAT, "fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
RNG = np.random.default_rng(0)
WEIGHT, ADDED = RNG.standard_normal((4, 4)).astype(np.float16), RNG.standard_normal(4).astype(np.float16)


def write_graph(path: Path) -> Path:
    """As exports in float16 were and are: products in half between casts, and a sum in half."""
    text = """<ir_version: 10, opset_import: ["" : 20]>
        transformer (float[rows, 4] x, float16[rows, 4] k_pages) => (float[rows, 4] hidden, float16[rows, 4] new_k)
        <float16[4, 4] weight, float16[4] added>
        {
            narrow = Cast<to = 10>(x)
            product = MatMul(narrow, weight)
            new_k = Add(product, k_pages)
            sum = Add(new_k, added)
            wide = Cast<to = 1>(sum)
            hidden = Softmax(wide)
        }"""
    model = onnx.parser.parse_model(text)
    for name, array in (("weight", WEIGHT), ("added", ADDED)):
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    onnx.save(onnx.shape_inference.infer_shapes(model), path)
    return path


def half_values(model: ir.Model) -> list[str | None]:
    values = (*model.graph.inputs, *(value for node in model.graph for value in node.outputs))
    return [value.name for value in values if value.dtype == ir.DataType.FLOAT16]


def test_a_float16_graph_becomes_that_of_a_float32_export(tmp_path: Path) -> None:
    model = ir.load(write_graph(tmp_path / "graph.onnx"))
    assert widen(model)
    assert half_values(model) == []
    assert [node.op_type for node in model.graph if node.op_type != "Cast"] == ["MatMul", "Add", "Add", "Softmax"]
    # Weights stay as they are stored, and nothing else is cast.
    assert [node.inputs[0].name for node in model.graph if node.op_type == "Cast"] == ["added", "weight"]  # type: ignore[union-attr]
    assert not widen(model)
    ir.save(model, tmp_path / "wide.onnx")
    onnx.checker.check_model(tmp_path / "wide.onnx", full_check=True)
    x = RNG.standard_normal((3, 4)).astype(np.float32)
    hidden, new_k = onnxruntime.InferenceSession(tmp_path / "wide.onnx").run(None, {"x": x, "k_pages": x})
    right = x @ WEIGHT.astype(np.float32) + x
    np.testing.assert_allclose(new_k, right, rtol=1e-5)
    np.testing.assert_allclose(np.log(hidden[:, 0] / hidden[:, 1]), np.diff(-(right + ADDED))[:, 0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", TYPES)
def test_engines_in_any_precision_are_made_of_it(dtype: Any, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    path = engine_graph(write_graph(tmp_path / "graph.onnx"), dtype, tmp_path / "out")
    onnx.checker.check_model(path, full_check=True)
    model = ir.load(path)
    types = {str(value.name): value.dtype for value in (*model.graph.inputs, *model.graph.outputs)}
    assert (types["k_pages"], types["new_k"]) == (TYPES[dtype],) * 2
    assert (types["x"], types["hidden"]) == (ir.DataType.FLOAT,) * 2
    (product,) = (node for node in model.graph if node.op_type == "MatMul")
    assert [value.dtype for value in (*product.inputs, *product.outputs) if value is not None] == [TYPES[dtype]] * 3
    # A weight is cast once at most, and not at all to the type that it is stored in.
    weight = model.graph.initializers["weight"]
    casts = [use.node for use in weight.uses() if use.node.op_type == "Cast"]
    assert len(casts) == (dtype != "fp16")
    assert weight.dtype == ir.DataType.FLOAT16
