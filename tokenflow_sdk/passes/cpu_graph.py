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

__all__ = ["FLOAT", "OWN", "PREFIX", "UINT8", "Graph", "Node", "node_field", "tensor_field"]

FLOAT, UINT8, INT64 = 1, 2, 7
"""Data types of TensorProto."""
_DTYPES: dict[int, np.dtype[Any]] = {FLOAT: np.dtype("<f4"), UINT8: np.dtype("u1"), INT64: np.dtype("<i8")}
PREFIX = "for_cpu/"
"""Begins the names of new tensors."""
OWN = "com.microsoft"
"""The domain of operators that only onnxruntime has."""
_Attributes = dict[str, "int | str | list[int]"]


@dataclass(frozen=True)
class Node:
    number: int
    operator: str
    inputs: list[str]
    outputs: list[str]
    attributes: _Attributes

    def has(self, **expected: int | str | Sequence[int]) -> bool:
        """Whether attributes that are there have these values; others have ONNX's default, which is the expected one here."""
        return all(self.attributes.get(name, value) == value for name, value in expected.items())


class Graph:
    """What a rewrite asks of a graph: its nodes, and the data types, small constants, shapes and files of its tensors."""

    def __init__(self, data: bytes | mmap.mmap, place: slice) -> None:
        self.nodes: list[Node] = []
        self.float_tensors: set[str] = set()
        """Initializers of float32, and what is cast to that."""
        self.weight_shapes: dict[str, list[int]] = {}
        """The shapes of initializers, and of those that are cast to float32."""
        self.uses: Counter[str] = Counter()
        self.files: set[str] = set()
        self.nested = False
        """Whether a node has a graph of its own, whose uses of tensors are not counted."""
        self._constants: dict[str, NDArray[Any]] = {}
        self._made_by: dict[str, Node] = {}
        parts = Message(data, place)
        results = {value.text(1): value for value in parts.messages(12)}
        self._described = {value.text(1): value for value in parts.messages(13)} | results
        for tensor in parts.messages(5):
            self._add_initializer(tensor, data)
        for number, node in enumerate(parts.messages(1)):
            self._add_node(number, node)
        self.uses.update(results.keys())

    def is_constant(self, name: str, value: object) -> bool:
        """Whether a tensor is an initializer with this value, a number or a list of numbers."""
        found = self._constants.get(name)
        return found is not None and np.array_equal(found, np.asarray(value))

    def scalar(self, name: str) -> float | None:
        """The value of an initializer of one float32."""
        found = self._constants.get(name)
        return None if found is None or found.ndim or found.dtype != _DTYPES[FLOAT] else float(found)

    def shape(self, name: str) -> list[int]:
        """The shape of a result, or of a tensor of which the file says it; else empty. 0 stands for a dynamic dimension."""
        described = [self._described[name]] if name in self._described else []
        for field in (2, 1, 2):  # type, tensor, shape
            described = [part for each in described for part in each.messages(field)]
        return [next(iter(size.numbers(1)), 0) for shape in described for size in shape.messages(1)]

    def chain(self, name: str, *operators: str, alone: bool = False) -> list[Node]:
        """The nodes that make a tensor one after another, from the last backwards; none if their operators are not these.

        Each reads as its first input what the next in the list makes. `alone`: none, too, if something else reads one's result.
        """
        found: list[Node] = []
        for operator in operators:
            node = self._made_by.get(name)
            if node is None or node.operator != operator or (alone and self.uses[name] != 1):
                return []
            found.append(node)
            name = node.inputs[0]
        return found

    def _add_node(self, number: int, parts: Message) -> None:
        attributes = parts.messages(5)
        self.nested |= any(attribute.places(6) or attribute.places(11) for attribute in attributes)
        # An operator of another domain is another one, though it may have the same name.
        operator = "".join([*parts.texts(7), parts.text(4)])
        node = Node(number, operator, parts.texts(1), parts.texts(2), dict(map(_attribute, attributes)))
        self.nodes.append(node)
        self.uses.update(node.inputs)
        self._made_by.update((output, node) for output in node.outputs)
        if node.operator == "Cast" and node.attributes.get("to") == FLOAT:
            self.float_tensors.add(node.outputs[0])
            if node.inputs[0] in self.weight_shapes:
                self.weight_shapes[node.outputs[0]] = self.weight_shapes[node.inputs[0]]

    def _add_initializer(self, parts: Message, data: bytes | mmap.mmap) -> None:
        self.files.update(entry.text(2) for entry in parts.messages(13) if entry.text(1) == "location")
        name, (kind, *_), shape = parts.text(8), parts.numbers(2), parts.numbers(1)
        self.weight_shapes[name] = shape
        if kind == FLOAT:
            self.float_tensors.add(name)
        small = b"".join(data[at] for at in parts.places(9) if at.stop - at.start <= 64)
        if kind in _DTYPES and small:
            self._constants[name] = np.frombuffer(small, _DTYPES[kind]).reshape(shape)


def _attribute(parts: Message) -> tuple[str, int | str | list[int]]:
    """Name and value of a node's attribute; an empty list stands for a value that no rewrite reads."""
    if parts.numbers(3):
        return parts.text(1), parts.numbers(3)[0]
    return parts.text(1), parts.text(4) if parts.places(4) else parts.numbers(8)


def node_field(
    operator: str, inputs: Sequence[str], output: str, own: bool = False, **attributes: float | str | Sequence[int]
) -> bytes:
    """A node, as a field of the graph. `own`: of an operator that only onnxruntime has."""
    parts: list[tuple[int, float | str | bytes]] = [*((1, name) for name in inputs), (2, output), (3, output), (4, operator)]
    parts += [(7, OWN)] if own else []
    for name, value in attributes.items():
        if isinstance(value, int):
            content = encoded((1, name), (3, value), (20, 2))
        elif isinstance(value, float):
            content = encoded((1, name), (2, value), (20, 1))
        elif isinstance(value, str):
            content = encoded((1, name), (4, value), (20, 3))
        else:
            content = encoded((1, name), *((8, number) for number in value), (20, 7))
        parts.append((5, content))
    return encoded((1, encoded(*parts)))


def tensor_field(name: str, array: NDArray[Any]) -> bytes:
    """An initializer of float32, uint8 or int64, as a field of the graph."""
    kind = next(kind for kind, dtype in _DTYPES.items() if dtype == array.dtype)
    content = encoded(*((1, size) for size in array.shape), (2, kind), (8, name), (9, array.tobytes()))
    return encoded((5, content))
