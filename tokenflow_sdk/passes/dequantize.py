"""Replace integer matrix products by float ones.

TensorRT cannot build `MatMulInteger`, which int8 bundles contain. The float weights are the dequantized int8 weights; the
activations are no longer rounded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from tokenflow_sdk.passes.graph import drop_unused

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["dequantize"]


def dequantize(model: ir.Model) -> None:
    """Replace every `MatMulInteger` and its scales by a float32 `MatMul` on the unrounded activations, in place.

    The exporter writes a quantized product as Mul(Mul(Cast(MatMulInteger(q, w)), row scale), column scale), where q are the
    activations rounded to 8 bits. Without that rounding the result is nearer to the unquantized model's. A graph without
    `MatMulInteger` only loses its unused nodes and weights.

    Args:
        model: a graph of a bundle.
    """
    for node in [node for node in model.graph if node.op_type == "MatMulInteger"]:
        _replace(model, node)
    drop_unused(model)


def _replace(model: ir.Model, product: ir.Node) -> None:
    import onnx_ir as ir

    rows, weight = product.inputs[0], product.inputs[1]
    # The product is followed by a Cast, a Mul by the row scale and a Mul by the column scale.
    last = _only_consumer(_only_consumer(_only_consumer(product)))
    scale = next(value for value in last.inputs if value is not None and value.is_initializer())
    assert weight is not None and weight.const_value is not None and scale.const_value is not None
    q, s = weight.const_value, scale.const_value
    name, shape = f"{weight.name}_float", ir.Shape(q.shape.numpy())
    if name not in model.graph.initializers:
        lazy = ir.LazyTensor(
            lambda: ir.tensor(q.numpy().astype(np.float32) * s.numpy()), dtype=ir.DataType.FLOAT, shape=shape, name=name
        )
        model.graph.register_initializer(
            ir.Value(name=name, const_value=lazy, shape=shape, type=ir.TensorType(ir.DataType.FLOAT))
        )
    plain = ir.node("MatMul", [_float_activations(rows), model.graph.initializers[name]], name=f"{product.name}_float")
    model.graph.insert_before(last, plain)
    old, result = last.outputs[0], plain.outputs[0]
    result.name, result.shape, result.type = old.name, old.shape, old.type
    old.name = None
    for index, output in enumerate(model.graph.outputs):
        if output is old:
            model.graph.outputs[index] = result
    ir.convenience.replace_all_uses_with(old, result)
    model.graph.remove(last, safe=True)


def _only_consumer(node: ir.Node) -> ir.Node:
    (use,) = node.outputs[0].uses()
    return use.node


def _float_activations(rows: ir.Value | None) -> ir.Value:
    """The float activations x of quantized ones, Cast(Add(Round(Div(x, scale)), 128))."""
    for operator in ("Cast", "Add", "Round", "Div"):
        node = None if rows is None else rows.producer()
        assert node is not None and node.op_type == operator, f"{operator} expected before an integer product"
        rows = node.inputs[0]
    assert rows is not None
    return rows
