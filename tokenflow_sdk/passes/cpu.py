"""Rewrites a graph for onnxruntime's CPU kernels when it is opened: less work, the same results but for rounding.

Engines do not get this: TensorRT has its own kernels. Graphs are edited as protobuf, because a device has no onnx. Weights are
not touched: operators of the new graph compute new weights of theirs, and onnxruntime folds them while it loads.
"""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import NamedTuple

from tokenflow_sdk.files import open_regular
from tokenflow_sdk.passes import cpu_tokenizer, cpu_transformer
from tokenflow_sdk.passes.cpu_graph import OWN, Graph, tensor_field
from tokenflow_sdk.passes.protobuf import Message, encoded, fields

__all__ = ["Rewritten", "rewrite_for_cpu"]

_OPSET = 18
"""Oldest version of ONNX's operators in which the new nodes are written."""
_OPERATORS = (b"ArgMax", b"Resize", b"MatMulInteger", b"Reciprocal")
"""A graph that is rewritten has one of them."""


class Rewritten(NamedTuple):
    """A graph, and the directory with the files of its weights."""

    graph: bytes
    weights: Path


def rewrite_for_cpu(path: Path, threads: int) -> Rewritten | None:
    """The graph of an `.onnx` file, rewritten for onnxruntime's CPU kernels; its weights in other files stay there.

    Args:
        path: the file.
        threads: that will run a call.

    Returns:
        The new graph, or None if there is nothing to rewrite, or the file is damaged, of which onnxruntime says more.

    Raises:
        OSError: the file cannot be read.
    """
    try:
        with open_regular(path) as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            # Other graphs are not taken apart; weights may be gigabytes.
            found = any(data.find(operator) >= 0 for operator in _OPERATORS)
            return _rewritten(data, path.parent, threads) if found else None
    except (ValueError, IndexError):
        return None


def _rewritten(data: bytes | mmap.mmap, directory: Path, threads: int) -> Rewritten | None:
    whole = slice(0, len(data))
    model = Message(data, whole)
    opsets = {opset.text(1): opset.numbers(2) for opset in model.messages(8)}
    if opsets.get("", []) < [_OPSET]:
        return None
    (place,) = model.places(7)
    graph = Graph(data, place)
    if graph.nested:
        return None
    replaced = dict([*cpu_tokenizer.replacements(graph, threads), *cpu_transformer.replacements(graph)])
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
    constants = cpu_tokenizer.constants() | cpu_transformer.constants()
    pieces += [tensor_field(name, array) for name, array in constants.items()]
    new = b"".join(pieces)
    rewritten = encoded(*((number, new if number == 7 else _content(data, value)) for number, value in fields(data, whole)))
    if OWN not in opsets:
        rewritten += encoded((8, encoded((1, OWN), (2, 1))))
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
