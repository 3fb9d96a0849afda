"""Floating-point operations of a bundle's graph, counted node by node; a multiply-add counts as two. And its weights.

Products and convolutions are counted, as `torch.utils.flop_counter` does; what works element by element, and the lookups and
reductions of the codebook search, are not.
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
"""They hold products too. No bundle has them; a count that left them out would be too small."""


_PLACES = (onnx.TensorProto.INT32, onnx.TensorProto.INT64)


def count_flops(path: Path, batch: int = 1) -> int:
    """Of one call of a graph with `batch` pictures.

    Raises:
        CorruptBundleError: a shape is missing, or a node is of a kind that cannot be counted.
    """
    return sum(node_flops(node) for node in _with_shapes(path, batch).graph)


def count_weights(path: Path) -> int:
    """Numbers in a graph's weights. Whole numbers of 32 and 64 bits are sizes and places, and are left out."""
    stored = onnx.load(path, load_external_data=False).graph.initializer
    return sum(prod(weight.dims) for weight in stored if weight.data_type not in _PLACES)


def node_flops(node: ir.Node) -> int:
    """Of one node, whose shapes are known; 0 where it is neither product nor convolution.

    Raises:
        CorruptBundleError: they are not.
    """
    if node.op_type == "MatMul":
        return 2 * prod(_dims(node, node.outputs[0])) * _dims(node, node.inputs[0])[-1]
    if node.op_type == "Gemm":
        transposed = "transA" in node.attributes and node.attributes["transA"].as_int()
        return 2 * prod(_dims(node, node.outputs[0])) * _dims(node, node.inputs[0])[0 if transposed else 1]
    if node.op_type in ("Conv", "ConvTranspose"):
        # A kernel [out, in / groups, ...] is applied once for each place of the output, a transposed one
        # [in, out / groups, ...] once for each place of the input.
        count, _, *places = _dims(node, node.outputs[0] if node.op_type == "Conv" else node.inputs[0])
        return 2 * count * prod(places) * prod(_dims(node, node.inputs[1]))
    return 0


def _with_shapes(path: Path, batch: int) -> ir.Model:
    """The graph without its weights, every shape inferred anew for a batch.

    Raises:
        CorruptBundleError: a node is of a kind that cannot be counted.
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
