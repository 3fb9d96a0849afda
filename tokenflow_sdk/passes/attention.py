"""Rewrite grouped-query attention in the form that TensorRT runs as one fused kernel.

A bundle's graph stacks the queries that share a key/value head, [B, kv_heads, groups * Q, D]: a CPU then reads each key once.
TensorRT finds no attention in that. It does where each query head has keys and values of its own, [B, heads, Q, D]. They are
repeated while they are gathered from their pages, and no scores are written to memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from tokenflow_sdk.passes.graph import import_onnx_ir

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["repeat_key_value_heads"]

_SCORES_RANK = 5
"""Scores are [B, kv_heads, groups, Q, T] before the bias is added."""


def repeat_key_value_heads(model: ir.Model) -> int:
    """Give each query head its own head of keys and values, in place. The results are the same but for rounding.

    Args:
        model: a graph of a bundle, in float32 as exported. A graph without grouped-query attention is left as it is.

    Returns:
        Number of rewritten attentions.

    Raises:
        MissingPackageError: onnx_ir is not installed.
    """
    rewriter = _Rewriter(model.graph)
    return sum(rewriter.rewrite(node) for node in list(model.graph) if node.op_type == "Softmax")


class _Rewriter:
    def __init__(self, graph: ir.Graph) -> None:
        self.ir = import_onnx_ir()
        self.graph = graph
        self.biases: dict[str, ir.Value] = {}

    def rewrite(self, softmax: ir.Node) -> bool:
        """Rewrite the attention around a softmax; False if it is not grouped-query attention."""
        add = _producer(softmax.inputs[0], "Add")
        scores = _producer(add.inputs[0], "Reshape") if add else None
        product = _producer(scores.inputs[0], "MatMul") if scores else None
        weights = _consumer(softmax.outputs[0], "Reshape")
        mixed = _consumer(weights.outputs[0], "MatMul") if weights else None
        if add is None or scores is None or product is None or weights is None or mixed is None:
            return False
        shape = scores.outputs[0].shape
        if shape is None or len(shape) != _SCORES_RANK or shape[2] == 1:
            return False
        (stacked, transposed), (_, values) = _operands(product), _operands(mixed)
        batch, kv_heads, groups, queries, keys = shape
        assert isinstance(kv_heads, int) and isinstance(groups, int) and values.shape is not None
        heads, dim = kv_heads * groups, values.shape[-1]
        q = self._insert(product, "Reshape", stacked, [0, heads, -1, dim], (batch, heads, queries, dim))
        k = self._repeat(product, transposed, groups, (batch, heads, dim, keys))
        v = self._repeat(mixed, values, groups, (batch, heads, keys, dim))
        for node, inputs in ((product, (q, k)), (mixed, (softmax.outputs[0], v))):
            for index, value in enumerate(inputs):
                node.replace_input_with(index, value)
        add.replace_input_with(0, product.outputs[0])
        add.replace_input_with(1, self._squeezed(add))
        for node in (product, add, softmax):
            node.outputs[0].shape = self.ir.Shape([batch, heads, queries, keys])
        mixed.outputs[0].shape = self.ir.Shape([batch, heads, queries, dim])
        self.graph.remove([scores, weights], safe=True)
        return True

    def _repeat(self, before: ir.Node, value: ir.Value, groups: int, shape: tuple[Any, ...]) -> ir.Value:
        """Keys or values [B, kv_heads, x, y] as [B, kv_heads * groups, x, y]."""
        batch, heads, *rest = shape
        kv_heads = heads // groups
        apart = self._insert(before, "Unsqueeze", value, [2], (batch, kv_heads, 1, *rest))
        repeated = self._insert(before, "Expand", apart, [1, 1, groups, 1, 1], (batch, kv_heads, groups, *rest))
        sizes = [size if isinstance(size, int) else -1 for size in rest]
        return self._insert(before, "Reshape", repeated, [0, heads, *sizes], shape)

    def _squeezed(self, add: ir.Node) -> ir.Value:
        """The bias [B, 1, 1, Q, T], which all layers share, as [B, 1, Q, T]."""
        _, bias = _operands(add)
        name = str(bias.name)
        if name not in self.biases:
            assert bias.shape is not None
            shape = [size for axis, size in enumerate(bias.shape) if axis != 2]
            self.biases[name] = self._insert(add, "Squeeze", bias, [2], tuple(shape))
        return self.biases[name]

    def _insert(self, before: ir.Node, operator: str, value: ir.Value, numbers: list[Any], shape: tuple[Any, ...]) -> ir.Value:
        """A node in front of another one, of an operator whose second input is a list of integers."""
        name = f"{value.name}_{operator.lower()}_for_{before.name}"
        tensor = self.ir.tensor(np.asarray(numbers, np.int64), name=f"{name}_{operator.lower()}_numbers")
        constant = self.ir.Value(
            name=tensor.name, const_value=tensor, shape=tensor.shape, type=self.ir.TensorType(self.ir.DataType.INT64)
        )
        self.graph.register_initializer(constant)
        node = self.ir.node(operator, [value, constant], name=name)
        result: ir.Value = node.outputs[0]
        result.name, result.shape, result.type = f"{name}_out", self.ir.Shape(list(shape)), value.type
        self.graph.insert_before(before, node)
        return result


def _operands(node: ir.Node) -> tuple[ir.Value, ir.Value]:
    """The inputs of an operator of two."""
    left, right = node.inputs
    assert left is not None and right is not None
    return left, right


def _producer(value: ir.Value | None, operator: str) -> ir.Node | None:
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == operator else None


def _consumer(value: ir.Value, operator: str) -> ir.Node | None:
    nodes = [use.node for use in value.uses()]
    return nodes[0] if len(nodes) == 1 and nodes[0].op_type == operator else None
