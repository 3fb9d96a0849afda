"""A graph as rewrites for a CPU see it, and the fields of a graph that they write."""

from __future__ import annotations

import mmap
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokenflow_sdk.passes.protobuf import Message, encoded

__all__ = ["FLOAT", "PREFIX", "Attributes", "Graph", "Node", "node_field", "tensor_field"]

FLOAT = 1
"""float32 among TensorProto's data types."""
PREFIX = "for_cpu/"
"""Begins the names of new tensors."""
Attributes = dict[str, "int | str | list[int]"]


@dataclass(frozen=True)
class Node:
    operator: str
    inputs: list[str]
    outputs: list[str]
    attributes: Attributes

    def has(self, **expected: int | str | Sequence[int]) -> bool:
        """Whether attributes that are there have these values; others have ONNX's default, which is the expected one here."""
        return all(self.attributes.get(name, value) == value for name, value in expected.items())


class Graph:
    """What a rewrite asks of a graph: its nodes, and the data types, small constants, shapes and files of its tensors."""

    def __init__(self, data: bytes | mmap.mmap, place: slice) -> None:
        self.nodes: list[Node] = []
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
        node = Node(parts.text(4), parts.texts(1), parts.texts(2), dict(map(_attribute, parts.messages(5))))
        self.nodes.append(node)
        self.uses.update(node.inputs)
        if node.operator == "Cast" and node.attributes.get("to") == FLOAT:
            self.float_tensors.add(node.outputs[0])

    def _add_initializer(self, parts: Message, data: bytes | mmap.mmap) -> None:
        self.files.update(entry.text(2) for entry in parts.messages(13) if entry.text(1) == "location")
        if parts.numbers(2) == [FLOAT]:
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


def node_field(operator: str, inputs: Sequence[str], output: str, **attributes: int | str | Sequence[int]) -> bytes:
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


def tensor_field(name: str, array: NDArray[Any]) -> bytes:
    kind, dtype = (FLOAT, "<f4") if array.dtype == np.float32 else (7, "<i8")
    return encoded(*((1, size) for size in array.shape), (2, kind), (8, name), (9, array.astype(dtype).tobytes()))
