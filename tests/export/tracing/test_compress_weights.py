from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from tests.support.mini import export_mini, mini_model
from tokenflow_export.tracing.compress_weights import store_in_half
from tokenflow_sdk import Tokenizer


def test_the_same_codes_and_pictures_from_half_the_bytes(tmp_path: Path) -> None:
    model = mini_model("tiny")
    assert all(torch.equal(parameter, parameter.half().float()) for parameter in model.parameters())
    plain, compressed = export_mini(model, tmp_path / "plain"), export_mini(model, tmp_path / "compact", compress=True)
    sizes = [(path / "decode.onnx").stat().st_size for path in (plain, compressed)]
    assert sizes[1] < 0.62 * sizes[0]
    stored = {tensor.name for tensor in onnx.load(compressed / "features.onnx").graph.initializer}
    assert {name.rsplit("_", 1)[0] for name in stored} >= {"sum.up_rows", "sum.up_columns"}
    images = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), np.uint8)
    with Tokenizer.from_pretrained(plain) as a, Tokenizer.from_pretrained(compressed) as b:
        codes = a.encode_array(images)
        np.testing.assert_array_equal(codes, b.encode_array(images))
        np.testing.assert_array_equal(a.decode_array(codes), b.decode_array(codes))


@pytest.mark.parametrize(("value", "stored"), [(0.5, True), (0.1, False), (1e5, False), (np.nan, False)])
def test_only_what_is_exact_is_stored_in_half(value: float, stored: bool) -> None:
    weight = onnx.numpy_helper.from_array(np.full((16, 16), value, np.float32), "weight")
    node = onnx.helper.make_node("MatMul", ["x", "weight"], ["y"])
    infos = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", 16]) for name in ("x", "y")]
    model = ir.from_proto(onnx.helper.make_model(onnx.helper.make_graph([node], "g", infos[:1], infos[1:], [weight])))
    store_in_half(model)
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    kinds = [tensor.data_type for tensor in proto.graph.initializer]
    assert kinds == [onnx.TensorProto.FLOAT16 if stored else onnx.TensorProto.FLOAT]
