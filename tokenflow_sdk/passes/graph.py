"""Load a bundle's ONNX graph with onnx_ir, and remove the parts of a graph that a pass left unused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tokenflow_sdk.errors import CorruptBundleError, MissingPackageError

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["append_output", "drop_unused", "import_onnx_ir", "load_graph"]


def import_onnx_ir() -> Any:
    """The module onnx_ir, imported on first use because devices that build no engines do not have it.

    Raises:
        MissingPackageError: onnx_ir is not installed.
    """
    try:
        import onnx_ir
    except ImportError as error:
        raise MissingPackageError(
            "Half-precision engines are made with onnx_ir, which is not installed.", "Run `pip install 'tokenflow-sdk[build]'`."
        ) from error
    return onnx_ir


def load_graph(path: Path) -> ir.Model:
    """Load an ONNX graph, with its external weights memory-mapped.

    Symbolic and hard links to weight files are followed. The hub's cache and some backups consist of links, which onnx_ir's own
    loader refuses; a bundle's files are protected by the hashes in its manifest instead.

    Args:
        path: the `.onnx` file; its external data must lie in the same directory.

    Returns:
        The graph. Weights stay on disk until they are read.

    Raises:
        MissingPackageError: onnx_ir is not installed.
        CorruptBundleError: the graph names weights in another directory, or their file is missing or too short.
    """
    onnx_ir = import_onnx_ir()
    model: ir.Model = onnx_ir.load(path)
    files: dict[str, NDArray[np.uint8]] = {}
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if not isinstance(tensor, onnx_ir.ExternalTensor):
            continue
        if tensor.location not in files:
            if Path(tensor.location).name != tensor.location:
                raise _corrupt(path, f"looks for weights in {tensor.location!r}, which is not beside it")
            try:
                files[tensor.location] = np.memmap(path.with_name(tensor.location), np.uint8, mode="r")
            except (OSError, ValueError) as error:
                raise _corrupt(path, f"has weights in {tensor.location}, which cannot be read ({error})") from error
        start = tensor.offset or 0
        data = files[tensor.location][start : start + tensor.nbytes]
        if len(data) < tensor.nbytes:
            raise _corrupt(path, f"expects more weights than {tensor.location} holds")
        if tensor.dtype.bitwidth < 8:
            value.const_value = onnx_ir.PackedTensor(data, tensor.dtype, shape=tensor.shape, name=tensor.name)
        else:
            array = data.view(tensor.dtype.numpy()).reshape(tensor.shape.numpy())
            value.const_value = onnx_ir.Tensor(array, tensor.dtype, name=tensor.name)
    return model


def _corrupt(path: Path, problem: str) -> CorruptBundleError:
    return CorruptBundleError(f"The graph {path} {problem}.", "Export the bundle again, or fetch it again.")


def append_output(
    graph: ir.Graph, index: int, operator: str, inputs: Sequence[ir.Value], attributes: Mapping[str, Any] = {}
) -> None:
    """Append a node and make its result the graph's output `index`, under the old output's name.

    It has the old output's type; a `Cast` has the one that it casts `to`.
    """
    onnx_ir = import_onnx_ir()
    old = graph.outputs[index]
    name = old.name
    old.name = f"{name}_before_{operator.lower()}"
    node = onnx_ir.node(operator, inputs, attributes, name=f"{name}_{operator.lower()}")
    graph.append(node)
    result = node.outputs[0]
    result.name, result.shape = name, old.shape
    result.type = onnx_ir.TensorType(attributes["to"]) if operator == "Cast" else old.type
    graph.outputs[index] = result


def drop_unused(model: ir.Model) -> None:
    """Remove nodes and weights that no output of the graph depends on, in place."""
    unused = [node for node in model.graph if not any(value.uses() or value.is_graph_output() for value in node.outputs)]
    while unused:
        sources = {value.producer() for node in unused for value in node.inputs if value is not None}
        model.graph.remove(unused, safe=True)
        unused = [
            node
            for node in sources
            if node is not None and not any(value.uses() or value.is_graph_output() for value in node.outputs)
        ]
    for name in [name for name, value in model.graph.initializers.items() if not (value.uses() or value.is_graph_output())]:
        del model.graph.initializers[name]
