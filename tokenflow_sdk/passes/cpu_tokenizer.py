"""Rewrites of a tokenizer's graphs for onnxruntime's CPU kernels.

- Nearest-neighbour upsampling to twice the side and a 3x3 convolution become four 2x2 convolutions of the small map, one for
  each pixel of a 2x2 block: 4/9 of the products. Several taps of the 3x3 kernel read the same small pixel, so their weights are
  added. Results are equal but for rounding.
- Large 3x3 convolutions of a decoder are computed by Winograd's filtering, with 1/4 of the products (`winograd.py`). Results
  differ by up to 6e-5 of their spread. A graph that searches for codes keeps its convolutions: a difference could tip a code.
- ArgMax over many columns, which compares number by number, becomes a maximum of each block of columns and two short ArgMax:
  that of the maxima finds the block, and that of the block finds the column. Results are equal, the first of equals too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokenflow_sdk.passes import winograd
from tokenflow_sdk.passes.cpu_graph import PREFIX, Graph, Node, node_field

__all__ = ["TAPS", "constants", "replacements"]

_BLOCK = 128
"""Columns of one maximum; blocks of 32 to 256 columns are equally fast."""
_MANY = 1024
"""ArgMax over fewer columns than this stays."""
_WIDE, _LEAST = 128, 2**29
"""A convolution from or to fewer channels, or of fewer products, stays: transforms would take what the products save."""
_WIDE_A_THREAD = 64
"""Nor one of fewer channels for each thread: onnxruntime moves the pixels of tiles on a single one, whatever there are."""
_LARGEST = 2**24
"""A map of more pixels than this is a damaged file's."""
TAPS: dict[int, NDArray[np.float32]] = {
    0: np.array([[1, 0, 0], [0, 1, 1]], np.float32),
    1: np.array([[1, 1, 0], [0, 0, 1]], np.float32),
}
"""For the first and the second pixel of two: which of three taps read the left, and which the right small pixel of two."""


def replacements(graph: Graph, threads: int) -> Iterator[tuple[int, list[bytes]]]:
    """Yield the number of each node to be replaced, and the fields with the nodes that stand in its place."""
    resizes = {node.outputs[0]: i for i, node in enumerate(graph.nodes) if _doubles(graph, node)}
    decodes = bool(resizes) and not any(node.operator == "ArgMax" for node in graph.nodes)
    for i, node in enumerate(graph.nodes):
        if node.operator == "Conv" and _is_plain_3x3(graph, node):
            resize = resizes.get(node.inputs[0])
            if resize is not None and graph.uses[node.inputs[0]] == 1:
                yield resize, []
                yield i, list(_four_convolutions(graph.nodes[resize].inputs[0], node))
            elif decodes and _is_large(graph, node, threads):
                yield i, list(winograd.convolution(node, _channels(graph, node), graph.shape(node.inputs[0])[2:]))
        elif node.operator == "ArgMax" and _is_long(graph, node):
            yield i, list(_two_steps(node))


def _doubles(graph: Graph, node: Node) -> bool:
    """Whether a node resizes maps to twice their sides by nearest neighbour."""
    return (
        node.operator == "Resize"
        and len(node.inputs) == 3
        and node.has(mode="nearest")
        and node.attributes.get("coordinate_transformation_mode") == "asymmetric"
        and node.attributes.get("nearest_mode") == "floor"
        and graph.is_constant(node.inputs[2], [1, 1, 2, 2])
    )


def _is_plain_3x3(graph: Graph, conv: Node) -> bool:
    """Whether a node is a float32 3x3 convolution that keeps the size."""
    return (
        conv.attributes.get("kernel_shape") == [3, 3]
        and conv.attributes.get("pads") == [1, 1, 1, 1]
        and conv.has(strides=[1, 1], dilations=[1, 1], group=1, auto_pad="NOTSET")
        and conv.inputs[1] in graph.float_tensors
    )


def _is_large(graph: Graph, conv: Node, threads: int) -> bool:
    """Whether a convolution has products enough for the transforms to pay, and pixels for weights four times as large."""
    channels, size = _channels(graph, conv), graph.shape(conv.inputs[0])[2:]
    if len(size) != 2 or min(channels, default=0) < max(_WIDE, _WIDE_A_THREAD * threads):
        return False
    pixels = math.prod(size)
    return 9 * math.prod(channels) * pixels >= _LEAST and 4 * max(channels) <= pixels <= _LARGEST


def _channels(graph: Graph, conv: Node) -> list[int]:
    """The channels of a convolution's result and input; none if the file does not say them."""
    return graph.weight_shapes.get(conv.inputs[1], [])[:2]


def _four_convolutions(source: str, conv: Node) -> Iterator[bytes]:
    weight, name, parts = conv.inputs[1], PREFIX + conv.outputs[0], []
    for row in TAPS:
        yield node_field("MatMul", [f"{PREFIX}rows_{row}", weight], f"{name}_rows_{row}")
        for column in TAPS:
            kernel, part = f"{name}_kernel_{row}{column}", f"{name}_{row}{column}"
            yield node_field("MatMul", [f"{name}_rows_{row}", f"{PREFIX}columns_{column}"], kernel)
            # The first pixel of two also reads the small pixel before its own, the second one the next.
            pads = [1 - row, 1 - column, row, column]
            yield node_field("Conv", [source, kernel, *conv.inputs[2:]], part, kernel_shape=[2, 2], pads=pads)
            parts.append(part)
    yield node_field("Concat", parts, f"{name}_blocks", axis=1)
    yield node_field("DepthToSpace", [f"{name}_blocks"], conv.outputs[0], blocksize=2, mode="DCR")


def _is_long(graph: Graph, node: Node) -> bool:
    """Whether a node is an ArgMax over the many columns of [B, rows, columns], the first of equals."""
    shape = graph.shape(node.inputs[0])
    return (
        len(shape) == 3
        and shape[-1] >= _MANY
        and shape[-1] % _BLOCK == 0
        and node.attributes.get("axis") in (2, 2**64 - 1)  # -1, as protobuf has it
        and node.attributes.get("keepdims") == 0
        and node.has(select_last_index=0)
    )


def _two_steps(node: Node) -> Iterator[bytes]:
    name, last = PREFIX + node.outputs[0], f"{PREFIX}last"
    yield node_field("Reshape", [node.inputs[0], f"{PREFIX}blocks"], f"{name}_blocks")
    yield node_field("ReduceMax", [f"{name}_blocks", last], f"{name}_maxima", keepdims=0)
    yield node_field("ArgMax", [f"{name}_maxima"], f"{name}_which", axis=-1, keepdims=1)
    yield node_field("GatherND", [f"{name}_blocks", f"{name}_which"], f"{name}_block", batch_dims=2)
    yield node_field("ArgMax", [f"{name}_block"], f"{name}_column", axis=-1, keepdims=0)
    yield node_field("Squeeze", [f"{name}_which", last], f"{name}_number")
    yield node_field("Mul", [f"{name}_number", f"{PREFIX}width"], f"{name}_start")
    yield node_field("Add", [f"{name}_start", f"{name}_column"], node.outputs[0])


def constants() -> dict[str, NDArray[Any]]:
    """The constants of the new nodes; onnxruntime drops those that a graph does not use."""
    taps = {f"rows_{i}": matrix for i, matrix in TAPS.items()} | {f"columns_{i}": matrix.T for i, matrix in TAPS.items()}
    numbers: dict[str, object] = {"blocks": [0, 0, -1, _BLOCK], "last": [-1], "width": _BLOCK}
    integers = {name: np.array(value, np.int64) for name, value in numbers.items()}
    return {PREFIX + name: array for name, array in (taps | integers).items()} | winograd.constants()
