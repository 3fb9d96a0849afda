"""Make the keys and values that a transformer graph gives finite, so that pages hold finite numbers only.

Pages are reused by other sequences. Attention multiplies masked values by 0, which is 0 only for finite numbers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from tokenflow_sdk.passes.graph import append_output, import_onnx_ir

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["keep_pages_finite"]

_LARGEST = {"FLOAT": 3.4028234663852886e38, "FLOAT16": 65504.0, "BFLOAT16": 3.3895313892515355e38}
"""Largest finite number of each type."""


def keep_pages_finite(model: ir.Model) -> None:
    """Replace infinities of the outputs `new_k` and `new_v` by the largest finite numbers, and NaN by 0, in place.

    Args:
        model: any graph; one without these outputs stays as it is.

    Raises:
        MissingPackageError: onnx_ir is not installed.
    """
    for index, value in enumerate(list(model.graph.outputs)):
        if value.name in ("new_k", "new_v"):
            _keep_finite(model.graph, index)


def _keep_finite(graph: ir.Graph, index: int) -> None:
    onnx_ir = import_onnx_ir()
    value = graph.outputs[index]
    assert value.dtype is not None
    most = _LARGEST[value.dtype.name]
    numbers = {"zero": 0.0, "least": -most, "largest": most}
    zero, least, largest = (_constant(graph, f"{value.name}_{name}", value.dtype, number) for name, number in numbers.items())
    missing = onnx_ir.node("IsNaN", [value], name=f"{value.name}_is_nan")
    graph.append(missing)
    missing.outputs[0].name, missing.outputs[0].shape = f"{value.name}_nan", value.shape
    missing.outputs[0].type = onnx_ir.TensorType(onnx_ir.DataType.BOOL)
    append_output(graph, index, "Where", [missing.outputs[0], zero, value])
    append_output(graph, index, "Clip", [graph.outputs[index], least, largest])


def _constant(graph: ir.Graph, name: str, dtype: ir.DataType, number: float) -> ir.Value:
    onnx_ir = import_onnx_ir()
    tensor = onnx_ir.tensor(np.asarray(number, dtype.numpy()), name=name)
    value: ir.Value = onnx_ir.Value(name=name, const_value=tensor, shape=tensor.shape, type=onnx_ir.TensorType(dtype))
    graph.register_initializer(value)
    return value
