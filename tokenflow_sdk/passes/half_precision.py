"""Rewrite a float32 graph in mixed precision, with an explicit type on every tensor.

TensorRT builds strongly typed networks, whose precision is that of the graph. Matrix products and convolutions run in float16
or bfloat16, and so do elementwise and layout operators all of whose activations are half already. Everything that is sensitive
to rounding stays in float32: norms, softmax, rotary embeddings, unit normalization, the codebook search, sampling, the
conversion to pixels, and a residual stream to which norms add their output. A `Cast` is inserted wherever the type changes.
float16 has three more bits of mantissa than bfloat16, which has the range of float32.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any, Literal

from tokenflow_sdk.passes.graph import append_output, drop_unused, import_onnx_ir
from tokenflow_sdk.passes.widen import stored_weight

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["HalfType", "compute_nodes", "to_half"]

HalfType = Literal["fp16", "bf16"]

_COMPUTE = frozenset(("MatMul", "Gemm", "Conv", "ConvTranspose"))
"""Operators that run in half precision."""
_FOLLOWS_INPUTS = re.compile(
    "Add|Sub|Mul|Sigmoid|Tanh|Erf|Gelu|Relu|Max|Min|Clip|Reshape|Transpose|Concat|Split|Slice|Squeeze|Unsqueeze|Expand|Pad|"
    "Resize|Gather|Identity|DepthToSpace|SpaceToDepth|Flatten"
)
"""Operators that run in half precision only where all their activations are half already, so that the float32 results of norms
and softmax are not rounded."""
_INT4_WEIGHTS = "DequantizeLinear"
"""Operator that dequantizes int4 weights. Its output has the type of the product, so that no `Cast` keeps TensorRT from fusing
the two."""
_DECISION_TENSORS = ("latent", "logits")
"""Graph outputs from which codes or tokens are chosen; everything computed from them stays in float32."""


def to_half(model: ir.Model, dtype: HalfType, pinned: Collection[str] = ()) -> None:
    """Rewrite a float32 graph in mixed precision, in place.

    Inputs and outputs keep their types, except the pages of keys and values (`k_pages`, `v_pages`, `new_k`, `new_v`), which
    become half.

    Args:
        model: a graph of a bundle, with standard operators only; see `tokenflow_sdk.passes.widen` for one in float16.
        dtype: `fp16` or `bf16`, the type of everything that does not stay in float32.
        pinned: names of nodes that stay in float32 in addition; `compute_nodes` lists the candidates.

    Raises:
        MissingPackageError: onnx_ir is not installed.
    """
    ir = import_onnx_ir()
    graph = model.graph
    half = ir.DataType.FLOAT16 if dtype == "fp16" else ir.DataType.BFLOAT16
    keep = set(pinned) | _decision_nodes(graph) | _postprocessing_nodes(graph)
    rewriter = _TypeRewriter(graph, half)
    for value in graph.inputs:
        if value.name in ("k_pages", "v_pages"):
            value.type = ir.TensorType(half)
    for node in list(graph):
        rewriter.assign_type(node, pinned=node.name in keep)
    rewriter.restore_output_types()
    drop_unused(model)


def compute_nodes(model: ir.Model) -> list[str]:
    """Names of the matrix products and convolutions that `to_half` runs in half precision when nothing is pinned."""
    keep = _decision_nodes(model.graph) | _postprocessing_nodes(model.graph)
    return [str(node.name) for node in model.graph if node.op_type in _COMPUTE and node.name not in keep]


def _decision_nodes(graph: ir.Graph) -> set[str]:
    """Names of the nodes downstream of the latent or the logits, which must stay in float32."""
    names: set[str] = set()
    for output in graph.outputs:
        if output.name in _DECISION_TENSORS:
            names |= {str(node.name) for node in _downstream(output)}
            start = output.producer()
            # The latent output is a transposed view; the codebook search reads the tensor before the transpose.
            while start is not None and start.op_type in ("Transpose", "Reshape"):
                source = start.inputs[0]
                assert source is not None
                names |= {str(node.name) for node in _downstream(source)}
                start = source.producer()
    return names


def _postprocessing_nodes(graph: ir.Graph) -> set[str]:
    """Names of the nodes between the last convolution and the u8 output `images`."""
    names: set[str] = set()
    for output in graph.outputs:
        if output.name != "images":
            continue
        pending = [output.producer()]
        while pending:
            node = pending.pop()
            if node is None or node.op_type in _COMPUTE or node.name in names:
                continue
            names.add(str(node.name))
            pending += [value.producer() for value in node.inputs if value is not None]
    return names


def _downstream(value: ir.Value) -> Iterator[ir.Node]:
    pending, seen = [use.node for use in value.uses()], set()
    while pending:
        node = pending.pop()
        if node.name not in seen:
            seen.add(node.name)
            yield node
            pending += [use.node for output in node.outputs for use in output.uses()]


class _TypeRewriter:
    """Assigns every float tensor its type and inserts a `Cast` where a node needs another one."""

    def __init__(self, graph: ir.Graph, half: Any) -> None:
        self.ir = import_onnx_ir()
        self.graph, self.half, self.full = graph, half, self.ir.DataType.FLOAT
        self.casts: dict[tuple[str, Any], ir.Value] = {}

    def assign_type(self, node: ir.Node, pinned: bool) -> None:
        """Cast a node's float inputs to the type it computes in, and give its outputs that type."""
        if node.op_type == "Cast":
            return
        floats = (self.half, self.full)
        # The scales of a Resize are float32 by definition.
        inputs = node.inputs[:1] if node.op_type == "Resize" else node.inputs
        read = [value for value in inputs if value is not None and value.dtype in floats and not value.is_initializer()]
        follows = (
            _FOLLOWS_INPUTS.fullmatch(node.op_type) is not None
            and bool(read)
            and all(value.dtype == self.half for value in read)
        )
        weights = node.op_type == _INT4_WEIGHTS
        wanted = self.half if not pinned and (node.op_type in _COMPUTE or follows or weights) else self.full
        for index, value in enumerate(inputs):
            if value is not None and value.dtype in floats and value.dtype != wanted:
                node.replace_input_with(index, self._cast(value, wanted))
        for value in node.outputs:
            # The exporter leaves the output type of the int4 weights' DequantizeLinear open.
            if value.dtype in floats or weights:
                value.type = self.ir.TensorType(wanted)

    def restore_output_types(self) -> None:
        """Cast the graph's outputs back to float32, except new keys and values, which get the type of the pages."""
        for index, value in enumerate(list(self.graph.outputs)):
            paged = value.name in ("new_k", "new_v")
            wanted = self.half if paged else self.full
            if value.dtype in (self.half, self.full) and value.dtype != wanted:
                append_output(self.graph, index, "Cast", [value], {"to": wanted})

    def _cast(self, value: ir.Value, wanted: Any) -> ir.Value:
        value = stored_weight(value)
        if value.dtype == wanted:
            return value
        key = (str(value.name), wanted)
        if key not in self.casts:
            cast = self.ir.node("Cast", [value], {"to": wanted}, name=f"{value.name}_to_{wanted.name.lower()}")
            result = cast.outputs[0]
            result.name, result.shape, result.type = f"{cast.name}_out", value.shape, self.ir.TensorType(wanted)
            producer = value.producer()
            if producer is None:
                self.graph.insert_before(self.graph[0], cast)
            else:
                self.graph.insert_after(producer, cast)
            self.casts[key] = result
        return self.casts[key]
