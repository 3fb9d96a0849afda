"""Rewrites of a language model's graphs for onnxruntime's CPU kernels: fewer passes over memory between the products.

- An RMS norm, seven nodes, becomes onnxruntime's own operator.
- A rotary embedding, eight nodes of halves of heads, becomes onnxruntime's own operator.
- Rounding rows to 8 bits becomes one QuantizeLinear, with the same result.
- A product of 8-bit integers gets its columns' scales where it writes its result, and its rows' after that.

All but the third round otherwise, so results differ in the last bits, which may tip a number that is rounded to 8 bits later to
the next step.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokenflow_sdk.passes.cpu_graph import FLOAT, PREFIX, UINT8, Graph, Node, node_field

__all__ = ["constants", "replacements"]

_Found = tuple[list[Node], list[bytes]]
"""Nodes before the last one of a pattern, which go; fields with the nodes that stand in the last one's place."""
_SHIFT = 128
"""The zero point of rows in 8 bits."""


def constants() -> dict[str, NDArray[Any]]:
    """The constants of the new nodes; onnxruntime drops those that a graph does not use."""
    numbers: dict[str, object] = {"one_row": [-1], "whole_heads": [0, 0, -1], "zero": 0, "one": 1}
    integers = {PREFIX + name: np.array(value, np.int64) for name, value in numbers.items()}
    return integers | {f"{PREFIX}unscaled": np.array(1, np.float32), f"{PREFIX}middle": np.array(_SHIFT, np.uint8)}


def replacements(graph: Graph) -> Iterator[tuple[int, list[bytes]]]:
    """Yield the number of each node to be replaced, and the fields with the nodes that stand in its place."""
    angles: dict[tuple[str, str], list[str]] = {}
    for node in graph.nodes:
        found: _Found | None = None
        if node.operator == "Mul":
            found = _norm(graph, node) or _product(graph, node)
        elif node.operator == "Cast" and node.attributes.get("to") == UINT8:
            found = _rows_in_8_bits(graph, node)
        elif node.operator == "Concat":
            found = _rotary_embedding(graph, node, angles)
        if found:
            yield from ((gone.number, []) for gone in found[0])
            yield node.number, found[1]


def _norm(graph: Graph, node: Node) -> _Found | None:
    """`x * (1 / sqrt(mean(x ** 2) + eps)) * weight`, in float32, along the last axis."""
    x, weight = node.inputs
    scaled = graph.chain(x, "Mul", alone=True)
    shape = graph.weight_shapes.get(weight, [])
    if not scaled or len(shape) != 1 or shape == [1] or weight not in graph.float_tensors:
        return None
    x, factor = scaled[0].inputs
    chain = graph.chain(factor, "Reciprocal", "Sqrt", "Add", "ReduceMean", "Pow", alone=True)
    if not chain:
        return None
    _, _, shifted, mean, square = chain
    epsilon = graph.scalar(shifted.inputs[1])
    right = square.inputs[0] == x and graph.scalar(square.inputs[1]) == 2 and _is_along_rows(graph, mean)
    if epsilon is None or not right:
        return None
    new = node_field("SimplifiedLayerNormalization", [x, weight], node.outputs[0], axis=-1, epsilon=epsilon, stash_type=FLOAT)
    return [*chain, *scaled], [new]


def _is_along_rows(graph: Graph, node: Node) -> bool:
    """Whether a reduction is over the last axis and keeps it."""
    return len(node.inputs) == 2 and graph.is_constant(node.inputs[1], [-1]) and node.has(keepdims=1)


def _rows_in_8_bits(graph: Graph, node: Node) -> _Found | None:
    """`round(x / scale) + 128` as uint8, where each row of x has a scale of its own, from its largest magnitude."""
    chain = graph.chain(node.inputs[0], "Add", "Round", "Div", alone=True)
    if not chain or graph.scalar(chain[0].inputs[1]) != _SHIFT:
        return None
    x, scale = chain[-1].inputs
    of_scale = graph.chain(scale, "Mul", "Max", "ReduceMax", "Abs")
    if not of_scale:
        return None
    steps, floor, largest, magnitudes = of_scale
    if magnitudes.inputs != [x] or not _is_along_rows(graph, largest):
        return None
    # Then no number leaves the range of 8 bits, where QuantizeLinear differs.
    if graph.scalar(steps.inputs[1]) != np.float32(1 / 127) or not (graph.scalar(floor.inputs[1]) or 0) > 0:
        return None
    name = PREFIX + node.outputs[0]
    return chain, [
        node_field("Flatten", [x], f"{name}_rows", axis=-1),
        node_field("Reshape", [scale, f"{PREFIX}one_row"], f"{name}_scales"),
        node_field("Shape", [f"{name}_scales"], f"{name}_count"),
        node_field("Expand", [f"{PREFIX}middle", f"{name}_count"], f"{name}_middles"),
        node_field("QuantizeLinear", [f"{name}_rows", f"{name}_scales", f"{name}_middles"], f"{name}_quantized", axis=0),
        node_field("Shape", [x], f"{name}_shape"),
        node_field("Reshape", [f"{name}_quantized", f"{name}_shape"], node.outputs[0]),
    ]


def _product(graph: Graph, node: Node) -> _Found | None:
    """A product of integers as float32, times the scales of its rows, times a scale for each column."""
    chain = graph.chain(node.inputs[0], "Mul", "Cast", "MatMulInteger", alone=True)
    if not chain:
        return None
    rows, cast, product = chain
    scales = node.inputs[1]
    shape = graph.weight_shapes.get(product.inputs[1], [])
    columns = len(shape) == 2 and graph.weight_shapes.get(scales) == shape[1:] and scales in graph.float_tensors
    if not columns or len(product.inputs) != 4 or cast.attributes.get("to") != FLOAT:
        return None
    scaled = f"{PREFIX}{node.outputs[0]}_scaled"
    inputs = [*product.inputs[:2], f"{PREFIX}unscaled", scales, *product.inputs[2:]]
    return chain, [
        node_field("MatMulIntegerToFloat", inputs, scaled, own=True),
        node_field("Mul", [scaled, rows.inputs[1]], node.outputs[0]),
    ]


def _rotary_embedding(graph: Graph, node: Node, angles: dict[tuple[str, str], list[str]]) -> _Found | None:
    """`[a * cos - b * sin, b * cos + a * sin]` of the halves a, b of each head of [B, Q, heads, D], in float32.

    Each row has cosines and sines of its own.

    Args:
        graph, node: the node joins the halves.
        angles: what `_angles` made before, for each pair of cosines and sines; added to.
    """
    if len(node.inputs) != 2 or node.attributes.get("axis") not in (3, 2**64 - 1):  # -1, as protobuf has it
        return None
    sums = [*graph.chain(node.inputs[0], "Sub", alone=True), *graph.chain(node.inputs[1], "Add", alone=True)]
    terms = [term for total in sums for name in total.inputs for term in graph.chain(name, "Mul", alone=True)]
    if len(sums) != 2 or len(terms) != 4:
        return None
    (a, cos), (b, sin), *second = (term.inputs for term in terms)
    splits = graph.chain(a, "Split")
    if not splits or splits[0].outputs != [a, b] or len(splits[0].inputs) != 1:
        return None
    (split,) = splits
    if split.attributes.get("axis") != 3 or not split.has(num_outputs=2) or len(graph.shape(split.inputs[0])) != 4:
        return None
    sources = [_of_positions(graph, cos, "Cos"), _of_positions(graph, sin, "Sin")]
    if second != [[b, cos], [a, sin]] or graph.uses[a] != 2 or graph.uses[b] != 2 or not all(sources):
        return None
    new = []
    if (cos, sin) not in angles:
        angles[cos, sin] = [f"{PREFIX}{node.outputs[0]}_{part}" for part in ("positions", "cos", "sin")]
        new = _angles(sources, angles[cos, sin])
    name, x = PREFIX + node.outputs[0], split.inputs[0]
    return [*sums, *terms, split], [
        *new,
        node_field("Reshape", [x, f"{PREFIX}whole_heads"], f"{name}_joined"),
        node_field("RotaryEmbedding", [f"{name}_joined", *angles[cos, sin]], f"{name}_turned", own=True),
        node_field("Shape", [x], f"{name}_shape"),
        node_field("Reshape", [f"{name}_turned", f"{name}_shape"], node.outputs[0]),
    ]


def _of_positions(graph: Graph, name: str, operator: str) -> str:
    """The cosines or sines [B, Q, D / 2] of which a tensor is a view [B, Q, 1, D / 2], the same for each head; else empty."""
    chain = graph.chain(name, "Unsqueeze", operator, "Mul", "Cast")
    right = chain and graph.is_constant(chain[0].inputs[1], [2]) and chain[-1].attributes.get("to") == FLOAT
    return chain[0].inputs[0] if right else ""


def _angles(sources: list[str], names: list[str]) -> list[bytes]:
    """Nodes that make of cosines and sines [B, Q, D / 2] tables of one row a token, and the numbers [B, Q] of its rows."""
    positions, *tables = names
    count, shape = f"{positions}_count", f"{positions}_shape"
    return [
        *(node_field("Flatten", [source], table, axis=-1) for source, table in zip(sources, tables, strict=True)),
        node_field("Shape", [sources[0]], shape, start=0, end=2),
        node_field("ReduceProd", [shape], count, keepdims=0),
        node_field("Range", [f"{PREFIX}zero", count, f"{PREFIX}one"], f"{positions}_in_a_row"),
        node_field("Reshape", [f"{positions}_in_a_row", shape], positions),
    ]
