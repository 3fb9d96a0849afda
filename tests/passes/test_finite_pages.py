from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from tokenflow_sdk.passes.finite_pages import keep_pages_finite
from tokenflow_sdk.passes.half_precision import to_half

STEP = """<ir_version: 10, opset_import: ["" : 20]>
    step (float[rows, 4] x) => (float[rows, 4] new_k, float[rows, 4] hidden) <float[4, 4] weight>
    { new_k = MatMul(x, weight)
      hidden = Relu(new_k) }"""


@pytest.mark.parametrize("half", [False, True])
def test_stored_keys_are_finite(half: bool, tmp_path: Path) -> None:
    model = ir.from_onnx_text(STEP, initializers=[ir.tensor(np.eye(4, dtype=np.float32), name="weight")])
    if half:
        to_half(model, "fp16")
    keep_pages_finite(model)
    ir.save(model, tmp_path / "step.onnx")
    onnx.checker.check_model(tmp_path / "step.onnx", full_check=True)
    session = onnxruntime.InferenceSession(tmp_path / "step.onnx")
    dtype = np.float16 if half else np.float32
    most, over = np.finfo(dtype).max, np.float32(1e5 if half else np.inf)
    # A product with infinities has NaN beside them; rows of a diagonal matrix have not, as long as they are finite.
    if half:
        new_k, _ = session.run(None, {"x": np.diag([1.5, over, -over, 3]).astype(np.float32)})
        np.testing.assert_array_equal(np.diag(new_k), np.array([1.5, most, -most, 3], dtype))
    x = np.array([[1.5, over, -over, 1e5], [-2, 0, 3, np.nan], [1, 2, 3, 4]], np.float32)
    new_k, hidden = session.run(None, {"x": x})
    assert new_k.dtype == dtype
    assert np.isfinite(new_k).all()
    assert not np.isfinite(hidden[1]).all()
    np.testing.assert_array_equal(new_k[2], [1, 2, 3, 4])


def test_graphs_without_pages_stay_as_they_are() -> None:
    model = ir.from_onnx_text(STEP.replace("new_k", "embeddings"))
    keep_pages_finite(model)
    assert [node.op_type for node in model.graph] == ["MatMul", "Relu"]
