"""Rewrites a graph for onnxruntime's CPU kernels when it is opened: less work, the same results.

- Nearest-neighbour upsampling to twice the side and a 3x3 convolution become four 2x2 convolutions of the small map, one for
  each pixel of a 2x2 block: 4/9 of the products. Several taps of the 3x3 kernel read the same small pixel, so their weights are
  added. Results are equal but for rounding.
- ArgMax over many columns, which compares number by number, becomes a maximum of each block of columns and two short ArgMax:
  that of the maxima finds the block, and that of the block finds the column. Results are equal, the first of equals too.

Engines do not get these: TensorRT has its own kernels for both. Graphs are edited as protobuf, because a device has no onnx.
Weights are not touched: operators of the new graph compute new weights of theirs, and onnxruntime folds them while it loads.
"""

from __future__ import annotations

import mmap
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tokenflow_sdk.files import open_regular
from tokenflow_sdk.passes.protobuf import Message, encoded, fields

__all__ = ["Rewritten", "rewrite_for_cpu"]

_OPSET = 18
"""Oldest version of ONNX's operators in which the new nodes are written."""
_FLOAT = 1
"""float32 among TensorProto's data types."""
_BLOCK = 128
"""Columns of one maximum; blocks of 32 to 256 columns are equally fast."""
_MANY = 1024
"""ArgMax over fewer columns than this stays."""
_TAPS: dict[int, NDArray[np.float32]] = {
    0: np.array([[1, 0, 0], [0, 1, 1]], np.float32),
    1: np.array([[1, 1, 0], [0, 0, 1]], np.float32),
}
"""For the first and the second pixel of two: which of three taps read the left, and which the right small pixel of two."""
_PREFIX = "for_cpu/"
"""Begins the names of new tensors."""
_Attributes = dict[str, "int | str | list[int]"]


class Rewritten(NamedTuple):
    """A graph, and the directory with the files of its weights."""

    graph: bytes
    weights: Path


def rewrite_for_cpu(path: Path) -> Rewritten | None:
    """The graph of an `.onnx` file, rewritten for onnxruntime's CPU kernels; its weights in other files stay there.

    Returns:
        The new graph, or None if there is nothing to rewrite, or the file is damaged, of which onnxruntime says more.

    Raises:
        OSError: the file cannot be read.
    """
    try:
        with open_regular(path) as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            # Most graphs have neither, and are not taken apart; weights may be gigabytes.
            found = max(data.find(b"ArgMax"), data.find(b"Resize")) >= 0
            return _rewritten(data, path.parent) if found else None
    except (ValueError, IndexError):
        return None


@dataclass(frozen=True)
class _Node:
    operator: str
    inputs: list[str]
    outputs: list[str]
    attributes: _Attributes

    def has(self, **expected: int | str | Sequence[int]) -> bool:
        """Whether attributes that are there have these values; others have ONNX's default, which is the expected one here."""
        return all(self.attributes.get(name, value) == value for name, value in expected.items())


class _Graph:
    """What a rewrite asks of a graph: its nodes, and the data types, small constants, shapes and files of its tensors."""

    def __init__(self, data: bytes | mmap.mmap, place: slice) -> None:
        self.nodes: list[_Node] = []
        self.float_tensors: set[str] = set()
        self.constants: dict[str, bytes] = {}
        self.shapes: dict[str, list[int]] = {}
        """0 stands for a dynamic dimension."""
        self.uses: Counter[str] = Counter()
        self.files: set[str] = set()
        parts = Message(data, place)
        for node in parts.messages(1):
            self._add_node(node)
        for tensor in parts.messages(5):
            self._add_initializer(tensor, data)
        for value in parts.messages(12) + parts.messages(13):
            self._add_shape(value)
        self.uses.update(value.text(1) for value in parts.messages(12))

    def _add_node(self, parts: Message) -> None:
        node = _Node(parts.text(4), parts.texts(1), parts.texts(2), dict(map(_attribute, parts.messages(5))))
        self.nodes.append(node)
        self.uses.update(node.inputs)
        if node.operator == "Cast" and node.attributes.get("to") == _FLOAT:
            self.float_tensors.add(node.outputs[0])

    def _add_initializer(self, parts: Message, data: bytes | mmap.mmap) -> None:
        self.files.update(entry.text(2) for entry in parts.messages(13) if entry.text(1) == "location")
        if parts.numbers(2) == [_FLOAT]:
            self.float_tensors.add(parts.text(8))
            self.constants[parts.text(8)] = b"".join(data[at] for at in parts.places(9) if at.stop - at.start <= 64)

    def _add_shape(self, value: Message) -> None:
        tensors = [tensor for kind in value.messages(2) for tensor in kind.messages(1)]
        for shape in [shape for tensor in tensors for shape in tensor.messages(2)]:
            self.shapes[value.text(1)] = [next(iter(size.numbers(1)), 0) for size in shape.messages(1)]


def _attribute(parts: Message) -> tuple[str, int | str | list[int]]:
    """Name and value of a node's attribute; an empty list stands for a value that no rewrite reads."""
    if parts.numbers(3):
        return parts.text(1), parts.numbers(3)[0]
    return parts.text(1), parts.text(4) if parts.places(4) else parts.numbers(8)


def _rewritten(data: bytes | mmap.mmap, directory: Path) -> Rewritten | None:
    whole = slice(0, len(data))
    model = Message(data, whole)
    if not any(opset.text(1) == "" and opset.numbers(2) >= [_OPSET] for opset in model.messages(8)):
        return None
    (place,) = model.places(7)
    graph = _Graph(data, place)
    replaced = dict(_replacements(graph))
    files = {(directory / name).resolve() for name in graph.files}
    if not replaced or len({file.parent for file in files}) > 1:
        return None
    nodes = iter(range(len(graph.nodes)))
    pieces = []
    for number, value in fields(data, place):
        if isinstance(value, int):
            pieces.append(encoded((number, value)))
        elif number == 1:
            pieces += replaced.get(next(nodes), [encoded((1, data[value]))])
        else:
            pieces.append(encoded((number, _initializer(data, value, directory) if number == 5 else data[value])))
    pieces += [encoded((5, _tensor(name, array))) for name, array in _constants().items()]
    new = b"".join(pieces)
    rewritten = encoded(*((number, new if number == 7 else _content(data, value)) for number, value in fields(data, whole)))
    return Rewritten(rewritten, next((file.parent for file in files), directory))


def _content(data: bytes | mmap.mmap, value: int | slice) -> int | bytes:
    return data[value] if isinstance(value, slice) else value


def _initializer(data: bytes | mmap.mmap, place: slice, directory: Path) -> bytes:
    """An initializer; if its weights are in another file, under that file's own name.

    Files may be links, as in the hub's cache. onnxruntime follows them only beside a graph that it reads from a file itself.
    """
    parts = []
    for number, value in fields(data, place):
        content = _content(data, value)
        if number == 13 and isinstance(value, slice):
            entry = Message(data, value)
            if entry.text(1) == "location":
                content = encoded((1, "location"), (2, (directory / entry.text(2)).resolve().name))
        parts.append((number, content))
    return encoded(*parts)


def _replacements(graph: _Graph) -> Iterator[tuple[int, list[bytes]]]:
    """Yield the number of each node to be replaced, and the fields with the nodes that stand in its place."""
    resizes = {node.outputs[0]: i for i, node in enumerate(graph.nodes) if _doubles(graph, node)}
    for i, node in enumerate(graph.nodes):
        if node.operator == "Conv" and node.inputs[0] in resizes and _is_plain_3x3(graph, node):
            resize = resizes[node.inputs[0]]
            yield resize, []
            yield i, list(_four_convolutions(graph.nodes[resize].inputs[0], node))
        elif node.operator == "ArgMax" and _is_long(graph, node):
            yield i, list(_two_steps(node))


def _doubles(graph: _Graph, node: _Node) -> bool:
    """Whether a node resizes maps to twice their sides by nearest neighbour."""
    return (
        node.operator == "Resize"
        and len(node.inputs) == 3
        and node.has(mode="nearest")
        and node.attributes.get("coordinate_transformation_mode") == "asymmetric"
        and node.attributes.get("nearest_mode") == "floor"
        and graph.constants.get(node.inputs[2]) == np.array([1, 1, 2, 2], "<f4").tobytes()
    )


def _is_plain_3x3(graph: _Graph, conv: _Node) -> bool:
    """Whether a node is a float32 3x3 convolution that keeps the size, and alone reads its input."""
    return (
        conv.attributes.get("kernel_shape") == [3, 3]
        and conv.attributes.get("pads") == [1, 1, 1, 1]
        and conv.has(strides=[1, 1], dilations=[1, 1], group=1, auto_pad="NOTSET")
        and conv.inputs[1] in graph.float_tensors
        and graph.uses[conv.inputs[0]] == 1
    )


def _four_convolutions(source: str, conv: _Node) -> Iterator[bytes]:
    weight, name, parts = conv.inputs[1], _PREFIX + conv.outputs[0], []
    for row in _TAPS:
        yield _node("MatMul", [f"{_PREFIX}rows_{row}", weight], f"{name}_rows_{row}")
        for column in _TAPS:
            kernel, part = f"{name}_kernel_{row}{column}", f"{name}_{row}{column}"
            yield _node("MatMul", [f"{name}_rows_{row}", f"{_PREFIX}columns_{column}"], kernel)
            # The first pixel of two also reads the small pixel before its own, the second one the next.
            pads = [1 - row, 1 - column, row, column]
            yield _node("Conv", [source, kernel, *conv.inputs[2:]], part, kernel_shape=[2, 2], pads=pads)
            parts.append(part)
    yield _node("Concat", parts, f"{name}_blocks", axis=1)
    yield _node("DepthToSpace", [f"{name}_blocks"], conv.outputs[0], blocksize=2, mode="DCR")


def _is_long(graph: _Graph, node: _Node) -> bool:
    """Whether a node is an ArgMax over the many columns of [B, rows, columns], the first of equals."""
    shape = graph.shapes.get(node.inputs[0], [])
    return (
        len(shape) == 3
        and shape[-1] >= _MANY
        and shape[-1] % _BLOCK == 0
        and node.attributes.get("axis") in (2, 2**64 - 1)  # -1, as protobuf has it
        and node.attributes.get("keepdims") == 0
        and node.has(select_last_index=0)
    )


def _two_steps(node: _Node) -> Iterator[bytes]:
    name, last = _PREFIX + node.outputs[0], f"{_PREFIX}last"
    yield _node("Reshape", [node.inputs[0], f"{_PREFIX}blocks"], f"{name}_blocks")
    yield _node("ReduceMax", [f"{name}_blocks", last], f"{name}_maxima", keepdims=0)
    yield _node("ArgMax", [f"{name}_maxima"], f"{name}_which", axis=-1, keepdims=1)
    yield _node("GatherND", [f"{name}_blocks", f"{name}_which"], f"{name}_block", batch_dims=2)
    yield _node("ArgMax", [f"{name}_block"], f"{name}_column", axis=-1, keepdims=0)
    yield _node("Squeeze", [f"{name}_which", last], f"{name}_number")
    yield _node("Mul", [f"{name}_number", f"{_PREFIX}width"], f"{name}_start")
    yield _node("Add", [f"{name}_start", f"{name}_column"], node.outputs[0])


def _constants() -> dict[str, NDArray[Any]]:
    """The constants of the new nodes; onnxruntime drops those that a graph does not use."""
    taps = {f"rows_{i}": matrix for i, matrix in _TAPS.items()} | {f"columns_{i}": matrix.T for i, matrix in _TAPS.items()}
    whole = {"blocks": np.array([0, 0, -1, _BLOCK]), "last": np.array([-1]), "width": np.array(_BLOCK)}
    return {_PREFIX + name: array for name, array in (taps | whole).items()}


def _node(operator: str, inputs: Sequence[str], output: str, **attributes: int | str | Sequence[int]) -> bytes:
    """A node, as a field of the graph."""
    parts: list[tuple[int, int | str | bytes]] = [*((1, name) for name in inputs), (2, output), (3, output), (4, operator)]
    for name, value in attributes.items():
        if isinstance(value, int):
            content = encoded((1, name), (3, value), (20, 2))
        elif isinstance(value, str):
            content = encoded((1, name), (4, value), (20, 3))
        else:
            content = encoded((1, name), *((8, number) for number in value), (20, 7))
        parts.append((5, content))
    return encoded((1, encoded(*parts)))


def _tensor(name: str, array: NDArray[Any]) -> bytes:
    kind, dtype = (_FLOAT, "<f4") if array.dtype == np.float32 else (7, "<i8")
    return encoded(*((1, size) for size in array.shape), (2, kind), (8, name), (9, array.astype(dtype).tobytes()))
