"""Counts the floating-point operations and the weights of a bundle's graph. A multiply-add counts as two operations.

As in `torch.utils.flop_counter`, matrix products and convolutions are counted, and element-wise operations, lookups and
reductions are not.
"""

from __future__ import annotations

from math import prod
from pathlib import Path

import onnx
import onnx_ir as ir

from tokenflow_sdk.errors import CorruptBundleError

__all__ = ["count_flops", "count_weights", "node_flops"]

_UNCOUNTED = (
    *("Attention", "ConvInteger", "DeformConv", "DFT", "Einsum", "GRU", "LSTM", "MatMulInteger", "QLinearConv"),
    *("QLinearMatMul", "RNN", "If", "Loop", "Scan"),
)
"""Operators that contain products which are not counted here. No bundle has them; a graph that does is refused."""


_INDEX_TYPES = (onnx.TensorProto.INT32, onnx.TensorProto.INT64)


def count_flops(path: Path, batch: int = 1) -> int:
    """Count the operations of one call of a graph with `batch` pictures.

    Raises:
        CorruptBundleError: a shape is missing, or an operator cannot be counted.
    """
    return sum(node_flops(node) for node in _with_shapes(path, batch).graph)


def count_weights(path: Path) -> int:
    """Count the weights of a graph. Integers of 32 and 64 bits are shapes and indices, and are left out."""
    stored = onnx.load(path, load_external_data=False).graph.initializer
    return sum(prod(weight.dims) for weight in stored if weight.data_type not in _INDEX_TYPES)


def node_flops(node: ir.Node) -> int:
    """Count the operations of one node; 0 if it is neither a product nor a convolution.

    Raises:
        CorruptBundleError: its shapes are not known.
    """
    if node.op_type == "MatMul":
        return 2 * prod(_dims(node, node.outputs[0])) * _dims(node, node.inputs[0])[-1]
    if node.op_type == "Gemm":
        transposed = "transA" in node.attributes and node.attributes["transA"].as_int()
        return 2 * prod(_dims(node, node.outputs[0])) * _dims(node, node.inputs[0])[0 if transposed else 1]
    if node.op_type in ("Conv", "ConvTranspose"):
        # A kernel [out, in / groups, ...] is applied once for each position of the output, and a transposed one
        # [in, out / groups, ...] once for each position of the input.
        count, _, *places = _dims(node, node.outputs[0] if node.op_type == "Conv" else node.inputs[0])
        return 2 * count * prod(places) * prod(_dims(node, node.inputs[1]))
    return 0


def _with_shapes(path: Path, batch: int) -> ir.Model:
    """Load a graph without its weights, with all shapes inferred for a batch.

    Raises:
        CorruptBundleError: an operator cannot be counted.
    """
    proto = onnx.load(path, load_external_data=False)
    for node in proto.graph.node:
        if node.op_type in _UNCOUNTED or node.domain not in ("", "ai.onnx"):
            raise CorruptBundleError(
                f"{node.name} is a {node.domain or 'standard'} {node.op_type}, whose operations cannot be counted.",
                "Export the bundle again with this version, which writes products and convolutions only.",
            )
    del proto.graph.value_info[:]
    for value in (*proto.graph.input, *proto.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param == "batch":
                dim.dim_value = batch
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto, strict_mode=True, data_prop=True))


def _dims(node: ir.Node, value: ir.Value | None) -> list[int]:
    shape = None if value is None else value.shape
    if shape is None or not shape.is_static():
        raise CorruptBundleError(
            f"The graph does not say which shape {'an input' if value is None else value.name} of {node.name} has.",
            "Export the bundle again.",
        )
    return list(shape.numpy())
