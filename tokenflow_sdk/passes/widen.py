"""Rewrite a graph that was exported in float16 as float32, so that the other passes need to know float32 graphs only.

The graph then is what a float32 export of the same weights is, and every precision can be made of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from tokenflow_sdk.passes.graph import import_onnx_ir

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["stored_weight", "widen"]


def widen(model: ir.Model) -> bool:
    """Give every float16 tensor of a graph the type float32, in place.

    Weights stay float16 where they are stored, and a `Cast` widens them. Only scales of int4 weights are stored as float32,
    because TensorRT wants them as constants.

    Args:
        model: a graph of a bundle.

    Returns:
        Whether anything but weights was float16.

    Raises:
        MissingPackageError: onnx_ir is not installed.
    """
    ir = import_onnx_ir()
    graph, full, half = model.graph, ir.DataType.FLOAT, ir.DataType.FLOAT16
    changed = False
    for value in (*graph.inputs, *(output for node in graph for output in node.outputs)):
        if value.dtype == half:
            value.type = ir.TensorType(full)
            changed = True
    for value in [value for value in graph.initializers.values() if value.dtype == half]:
        _widen_weight(graph, value)
    for node in list(graph):
        if node.op_type != "Cast":
            assert "value" not in node.attributes or node.attributes["value"].value.dtype != half, "a constant in float16"
            continue
        if node.attributes["to"].value == half:
            node.attributes["to"] = ir.AttrInt64("to", full)
        source, result = node.inputs[0], node.outputs[0]
        if source is not None and source.dtype == result.dtype == full and not result.is_graph_output():
            ir.convenience.replace_all_uses_with(result, source)
            graph.remove(node, safe=True)
    return changed


def stored_weight(value: ir.Value) -> ir.Value:
    """The float16 weight whose `Cast` to float32 gives `value`; `value` itself if it is anything else."""
    ir = import_onnx_ir()
    producer = value.producer()
    source = producer.inputs[0] if producer is not None and producer.op_type == "Cast" else None
    return source if source is not None and source.is_initializer() and source.dtype == ir.DataType.FLOAT16 else value


def _widen_weight(graph: ir.Graph, weight: ir.Value) -> None:
    """Let all readers of a float16 weight read float32, but those that cast it themselves."""
    ir = import_onnx_ir()
    readers = [use for use in weight.uses() if use.node.op_type != "Cast"]
    if not readers:
        return
    full = ir.TensorType(ir.DataType.FLOAT)
    if any(use.node.op_type == "DequantizeLinear" for use in readers):
        weight.const_value, weight.type = _widened(weight), full
        return
    cast = ir.node("Cast", [weight], {"to": ir.DataType.FLOAT}, name=f"{weight.name}_widened")
    result = cast.outputs[0]
    result.name, result.shape, result.type = f"{cast.name}_out", weight.shape, full
    graph.insert_before(graph[0], cast)
    for use in readers:
        use.node.replace_input_with(use.idx, result)


def _widened(weight: ir.Value) -> Any:
    ir = import_onnx_ir()
    stored = weight.const_value
    assert stored is not None
    return ir.LazyTensor(
        lambda: ir.tensor(stored.numpy().astype(np.float32), name=weight.name),
        dtype=ir.DataType.FLOAT,
        shape=stored.shape,
        name=weight.name,
    )
