"""Finds graphs at which onnxruntime before 1.30 aborts the process instead of raising an error, by reading their nodes.

Those versions rewrite 8-bit products for x86: before 1.25 on processors without VNNI, then on all. The rewrite writes a zero
point past the end of the inputs of a `MatMulInteger` that has none for its weight. Bundles exported before the exporter wrote
zero points have such products. A graph is read as the protobuf that it is, because a device has no onnx.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from pathlib import Path

from tokenflow_sdk.errors import BackendError

__all__ = ["refuse_aborting_graph"]

_GRAPH, _NODE = 7, 1  # numbers of fields: of ModelProto, of GraphProto
_INPUT, _OPERATOR = 1, 4  # of NodeProto


def refuse_aborting_graph(path: Path, version: str) -> None:
    """Raise an error where opening a graph would abort the process.

    Args:
        path: the `.onnx` file.
        version: of onnxruntime.

    Raises:
        BackendError: a product lacks its zero point, and this version would abort at it.
    """
    old = tuple(map(int, version.split(".")[:2])) < (1, 30)
    if old and platform.machine().lower() in ("x86_64", "amd64") and _lacks_zero_points(path):
        raise BackendError(
            f"onnxruntime {version} would abort the process at {path.name}, whose 8-bit products have no zero points.",
            "Install onnxruntime 1.30 or newer (Python 3.11 or newer), e.g. `pip install 'onnxruntime>=1.30'`, or export the "
            "bundle again with `tokenflow export`.",
        )


def _lacks_zero_points(path: Path) -> bool:
    try:
        data = path.read_bytes()
        for start, end in (span for number, *span in _fields(data, 0, len(data)) if number == _GRAPH):
            for node in (span for number, *span in _fields(data, start, end) if number == _NODE):
                parts = list(_fields(data, *node))
                operator = next((data[a:b] for number, a, b in parts if number == _OPERATOR), b"")
                if operator == b"MatMulInteger" and sum(number == _INPUT for number, _, _ in parts) < 4:
                    return True
    except (OSError, IndexError):
        pass  # unreadable or damaged, of which onnxruntime's own error tells more
    return False


def _fields(data: bytes, at: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Number, start and end of every field of a protobuf message that has a length: messages and texts."""
    while at < end:
        key, at = _varint(data, at)
        kind = key & 7
        if kind == 2:
            size, at = _varint(data, at)
            yield key >> 3, at, at + size
            at += size
        elif kind == 0:
            _, at = _varint(data, at)
        else:
            at += 8 if kind == 1 else 4


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number of 7 bits a byte, and where it ends."""
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
