"""Finds graphs at which onnxruntime before 1.30 aborts the process instead of raising an error, by reading their nodes.

Those versions rewrite 8-bit products for x86: before 1.25 on processors without VNNI, then on all. The rewrite writes a zero
point past the end of the inputs of a `MatMulInteger` that has none for its weight. Bundles exported before the exporter wrote
zero points have such products. A graph is read as the protobuf that it is, because a device has no onnx.
"""

from __future__ import annotations

import platform
from pathlib import Path

from tokenflow_sdk.errors import BackendError
from tokenflow_sdk.passes.protobuf import Message

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
        for graph in Message(data, slice(0, len(data))).messages(_GRAPH):
            for node in graph.messages(_NODE):
                if node.text(_OPERATOR) == "MatMulInteger" and len(node.places(_INPUT)) < 4:
                    return True
    except (OSError, ValueError, IndexError):
        pass  # unreadable or damaged, of which onnxruntime's own error tells more
    return False
