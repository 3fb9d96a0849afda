"""Half-precision versions of a graph, with every type written into it: what strongly typed engines need.

Convolutions and products become float16 or bfloat16, and what stands between them where all it reads is. Where rounding
would show, float32 stays: norms, softmax, rotations, unit length, the codebook search, sampling, the last step to pixels, and a
residual stream that norms write to. A `Cast` stands wherever a tensor crosses. float16 is the more exact of the two, by three
bits; bfloat16 has float32's range.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from tokenflow_sdk.passes.graph import import_onnx_ir

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["HalfType", "compute_nodes", "to_half"]

HalfType = Literal["fp16", "bf16"]

_COMPUTE = frozenset(("MatMul", "Gemm", "Conv", "ConvTranspose"))
"""Computed in half."""
_FOLLOWS_INPUTS = re.compile(
    "Add|Sub|Mul|Sigmoid|Tanh|Erf|Gelu|Relu|Max|Min|Clip|Reshape|Transpose|Concat|Split|Slice|Squeeze|Unsqueeze|Expand|Pad|"
    "Resize|Gather|Identity|DepthToSpace|SpaceToDepth|Flatten"
)
"""Computed in half where everything they read is half already, so that no norm or softmax is rounded on its way."""
_INT4_WEIGHTS = "DequantizeLinear"
"""Makes the weights of a product from int4. In half itself: engines fuse it with the product where nothing is between."""
_LARGEST = {"FLOAT16": 65504.0, "BFLOAT16": 3.3895313892515355e38}
"""Finite numbers of each type."""
_DECISION_TENSORS = ("latent", "logits")
"""Tensors whose consumers decide codes."""


def to_half(model: ir.Model, dtype: HalfType, pinned: Collection[str] = ()) -> None:
    """Rewrite a float32 graph in place. Inputs and outputs keep their types, except float32 pages, which become half.

    Args:
        model: a graph of a bundle, standard operators only.
        dtype: of what is not kept in float32.
        pinned: names of further nodes that stay in float32 (`compute_nodes` gives all that can be pinned).

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


def compute_nodes(model: ir.Model) -> list[str]:
    """Names of the products and convolutions that `to_half` would run in half: what a precision search tries to pin."""
    keep = _decision_nodes(model.graph) | _postprocessing_nodes(model.graph)
    return [str(node.name) for node in model.graph if node.op_type in _COMPUTE and node.name not in keep]


def _decision_nodes(graph: ir.Graph) -> set[str]:
    """Nodes that compute from a latent or from logits, and the products that make logits."""
    names: set[str] = set()
    for output in graph.outputs:
        if output.name in _DECISION_TENSORS:
            names |= {str(node.name) for node in _downstream(output)}
            start = output.producer()
            # The latent leaves transposed: what it is a view of decides as well.
            while start is not None and start.op_type in ("Transpose", "Reshape"):
                source = start.inputs[0]
                assert source is not None
                names |= {str(node.name) for node in _downstream(source)}
                start = source.producer()
    return names


def _postprocessing_nodes(graph: ir.Graph) -> set[str]:
    """What stands between the last convolution and a picture of integers."""
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
    """Gives every float tensor its type, and puts casts where a node wants another."""

    def __init__(self, graph: ir.Graph, half: Any) -> None:
        self.ir = import_onnx_ir()
        self.graph, self.half, self.full = graph, half, self.ir.DataType.FLOAT
        self.casts: dict[tuple[str, Any], ir.Value] = {}

    def assign_type(self, node: ir.Node, pinned: bool) -> None:
        """Cast a node's float inputs to the type it computes in, and set its outputs'."""
        if node.op_type == "Cast":
            return
        floats = (self.half, self.full)
        # A Resize's scales are float32 always.
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
            # The exporter does not say which type int4 weights become.
            if value.dtype in floats or weights:
                value.type = self.ir.TensorType(wanted)

    def restore_output_types(self) -> None:
        """Give graph outputs the types they had: float32, except new keys and values, which go where the pages are."""
        for index, value in enumerate(list(self.graph.outputs)):
            paged = value.name in ("new_k", "new_v")
            wanted = self.half if paged else self.full
            if value.dtype in (self.half, self.full) and value.dtype != wanted:
                self._append_output(index, "Cast", [value], {"to": wanted})
            if paged:
                self._keep_finite(index)

    def _keep_finite(self, index: int) -> None:
        """Numbers beyond the type's become its largest, and NaN becomes 0. Others may be given the page afterwards, and what
        they do not see is multiplied by 0, which is 0 for finite numbers only."""
        value = self.graph.outputs[index]
        most = _LARGEST[self.half.name]
        numbers = {"zero": 0.0, "least": -most, "largest": most}
        zero, least, largest = (self._constant(f"{value.name}_{name}", number) for name, number in numbers.items())
        missing = self.ir.node("IsNaN", [value], name=f"{value.name}_is_nan")
        self.graph.append(missing)
        missing.outputs[0].name, missing.outputs[0].shape = f"{value.name}_nan", value.shape
        missing.outputs[0].type = self.ir.TensorType(self.ir.DataType.BOOL)
        self._append_output(index, "Where", [missing.outputs[0], zero, value], {})
        self._append_output(index, "Clip", [self.graph.outputs[index], least, largest], {})

    def _constant(self, name: str, number: float) -> ir.Value:
        tensor = self.ir.tensor(np.asarray(number, self.half.numpy()), name=name)
        value: ir.Value = self.ir.Value(name=name, const_value=tensor, shape=tensor.shape, type=self.ir.TensorType(self.half))
        self.graph.register_initializer(value)
        return value

    def _append_output(self, index: int, operator: str, inputs: list[ir.Value], attributes: dict[str, Any]) -> None:
        """Let an output of the graph be what a node makes of it, under its name."""
        old = self.graph.outputs[index]
        name = old.name
        old.name = f"{name}_before_{operator.lower()}"
        node = self.ir.node(operator, inputs, attributes, name=f"{name}_{operator.lower()}")
        self.graph.append(node)
        result = node.outputs[0]
        result.name, result.shape = name, old.shape
        result.type = self.ir.TensorType(attributes["to"]) if operator == "Cast" else old.type
        self.graph.outputs[index] = result

    def _cast(self, value: ir.Value, wanted: Any) -> ir.Value:
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
