"""Checks that an ONNX graph reads its weights from files that `bundle.json` lists, and so from files whose hashes are known.

A backend opens whatever file a graph names. The names are found in the graph's bytes (https://protobuf.dev/programming-guides/encoding),
because the runtime has no onnx package and should not read gigabytes of weights for them: everything else is stepped over.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping
from pathlib import Path

from tokenflow_sdk.bundle.schema import GraphEntry
from tokenflow_sdk.errors import CorruptBundleError
from tokenflow_sdk.files import open_regular
from tokenflow_sdk.passes.protobuf import fields

__all__ = ["check_external_data"]

_AGAIN = "Export the bundle again with `tokenflow export`, or fetch it from a source that you trust."
_MESSAGES: Mapping[str, Mapping[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "graph": {1: "node", 5: "tensor", 15: "sparse tensor"},
    "node": {4: "operator", 5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse tensor", 23: "sparse tensor"},
    "sparse tensor": {1: "tensor", 2: "tensor"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "tensor": {13: "external data"},
}
"""Kinds of messages in an ONNX file (onnx.proto), each with the fields that lead to a tensor, by number."""
_COMPILED = b"EPContext"
"""onnxruntime's operator for what a backend compiled; an attribute names the file that holds it."""


def check_external_data(directory: Path, entry: GraphEntry) -> None:
    """Check that all weights outside a graph's `.onnx` file are within the files that its entry lists beside it.

    Args:
        directory: of the bundle.
        entry: the graph's.

    Raises:
        CorruptBundleError: the file is no ONNX graph, or reads another file, or more of a file than there is.
    """
    path = directory / entry.files[0].name
    sizes = {file.name: file.size for file in entry.files[1:]}
    try:
        with open_regular(path) as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            # Most graphs hold their weights, and searching for bytes is a hundred times faster than taking a graph apart.
            if max(data.find(b"location"), data.find(_COMPILED)) >= 0:
                for reference in _external_data(data):
                    _check_reference(path, reference, sizes)
    except (OSError, ValueError, IndexError) as error:
        raise CorruptBundleError(f"{path} is no ONNX graph: {error}.", _AGAIN) from error


def _check_reference(path: Path, reference: Mapping[str, str], sizes: Mapping[str, int]) -> None:
    location = reference.get("location", "")
    if location not in sizes:
        raise CorruptBundleError(
            f"{path} reads weights from {location!r}, which bundle.json does not list among the files of this graph.", _AGAIN
        )
    numbers = [reference.get(key, "0") for key in ("offset", "length")]
    # A longer number is beyond any file.
    if (
        not all(text.isascii() and text.isdigit() and len(text) < 20 for text in numbers)
        or sum(map(int, numbers)) > sizes[location]
    ):
        raise CorruptBundleError(
            f"{path} reads {numbers[1]} bytes from byte {numbers[0]} of {location}, which has {sizes[location]}.", _AGAIN
        )


def _external_data(data: mmap.mmap) -> Iterator[dict[str, str]]:
    """Yield the keys and values of the external data of every tensor of a model.

    Raises:
        ValueError, IndexError: the bytes are no ONNX model, or it is one that a backend compiled, whose weights are elsewhere.
    """
    unread = [("model", slice(0, len(data)))]
    while unread:
        kind, message = unread.pop()
        inside, entries = _MESSAGES[kind], []
        for number, value in fields(data, message):
            inner = inside.get(number)
            if inner is None or isinstance(value, int):
                continue
            if inner == "external data":
                texts = {part: data[at].decode(errors="replace") for part, at in fields(data, value) if isinstance(at, slice)}
                entries.append((texts.get(1, ""), texts.get(2, "")))
            elif inner == "operator":
                if data[value] == _COMPILED:
                    raise ValueError("it is compiled for one device")
            else:
                unread.append((inner, value))
        if entries:
            reference = dict(entries)
            if len(reference) < len(entries):
                raise ValueError("it says twice where a tensor is")
            yield reference
