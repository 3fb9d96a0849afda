"""Emulates half precision on a CPU as engines compute it: operands in half, sums in float32, every result rounded to half.

onnxruntime alone does not compute that on a CPU: it has no products in bfloat16, and where it has none in float16, it computes
the whole graph in float32 and rounds only the weights and the outputs. So the graph in half precision is rewritten to float32,
and every tensor that was in half is rounded by a pair of casts, which onnxruntime keeps.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from tokenflow_sdk.backends.onnxruntime import open_onnxruntime
from tokenflow_sdk.backends.session import OpenSession, Session, SessionOptions
from tokenflow_sdk.bundle.bundle import Bundle
from tokenflow_sdk.bundle.schema import GraphEntry
from tokenflow_sdk.engines.build import engine_graph
from tokenflow_sdk.passes.graph import drop_unused, load_graph
from tokenflow_sdk.passes.half_precision import HalfType

__all__ = ["emulate", "emulated_graph", "emulated_sessions"]

_MOVING = frozenset(
    (
        *("Reshape", "Transpose", "Concat", "Split", "Slice", "Squeeze", "Unsqueeze", "Expand", "Gather", "Identity"),
        *("Flatten", "DepthToSpace", "SpaceToDepth", "Relu", "Max", "Min"),
    )
)
"""Operators that only move or select numbers, so the results for rounded inputs are rounded already."""


def emulate(model: ir.Model, dtype: HalfType) -> None:
    """Rewrite a graph that `to_half` has converted, in place: all float32, and rounded to `dtype` wherever it was in `dtype`.

    Tensors keep their names, which then name the rounded ones. Weights are rounded once, when they are written. Inputs and
    outputs in half, such as pages, become float32.
    """
    emulator = _Emulator(model.graph, ir.DataType.FLOAT16 if dtype == "fp16" else ir.DataType.BFLOAT16)
    for value in model.graph.initializers.values():
        emulator.widen(value)
    for value in model.graph.inputs:
        emulator.enter(value)
    for node in list(model.graph):
        emulator.rewrite(node)
    drop_unused(model)


def emulated_graph(graph: Path, dtype: HalfType, directory: Path, pinned: Collection[str] = ()) -> Path:
    """Write a float32 graph for onnxruntime that computes what an engine computes in half precision.

    Args:
        graph: a graph of a bundle.
        dtype: of the engine.
        directory: where the new graph and its weights are written.
        pinned: nodes that stay in float32.

    Raises:
        CorruptBundleError: the weights are not where the graph says.
    """
    model = load_graph(engine_graph(graph, dtype, directory, pinned))
    emulate(model, dtype)
    path = directory / f"{graph.stem}_emulated.onnx"
    ir.save(model, path, external_data=f"{path.name}.data")
    return path


def emulated_sessions(
    bundle: Bundle[Any], dtype: HalfType, directory: Path, pinned: Mapping[str, Collection[str]]
) -> OpenSession:
    """Make a function that opens the graphs of a bundle in onnxruntime so that they compute what engines would.

    Args:
        bundle: whose graphs are opened.
        dtype: of the engines.
        directory: where the rewritten graphs are kept while they are opened.
        pinned: nodes that stay in float32, by graph.
    """
    names = {entry.files[0].name: name for name, entry in bundle.graphs.items()}

    def open_session(path: Path, entry: GraphEntry, options: SessionOptions) -> Session:
        graph = emulated_graph(path, dtype, directory, pinned.get(names[path.name], ()))
        return open_onnxruntime(graph, entry, options)

    return open_session


class _Emulator:
    """Rewrites a graph so that its nodes compute in float32 and their results are rounded to `half`."""

    def __init__(self, graph: ir.Graph, half: ir.DataType) -> None:
        self.graph, self.half = graph, half

    def widen(self, value: ir.Value) -> None:
        """Turn a weight that is stored in half into float32; its values stay the same."""
        if value.dtype == self.half:
            value.const_value = _lazily(value.const_value, self.half, str(value.name))
            value.type = ir.TensorType(ir.DataType.FLOAT)

    def enter(self, value: ir.Value) -> None:
        """Turn an input in half into float32, and round it before it is read."""
        if value.dtype == self.half:
            self._round(value, f"{value.name}_rounded")

    def rewrite(self, node: ir.Node) -> None:
        """Make a node compute in float32, and round those of its results that were in half."""
        halves = [value for value in node.outputs if value.dtype == self.half]
        if node.op_type == "Cast" and halves:
            node.attributes["to"] = ir.AttrInt64("to", ir.DataType.FLOAT)
            source = node.inputs[0]
            assert source is not None
            if source.is_initializer() and source.dtype == ir.DataType.FLOAT:
                self._round_weights(source, halves[0])
                return
        for value in halves:
            if node.op_type in _MOVING:
                value.type = ir.TensorType(ir.DataType.FLOAT)
            else:
                name = str(value.name)
                value.name = f"{name}_exact"
                self._round(value, name)

    def _round_weights(self, source: ir.Value, cast: ir.Value) -> None:
        """Replace the result of a cast of weights by a weight that is rounded already."""
        name = f"{cast.name}_weights"
        tensor = _lazily(source.const_value, self.half, name)
        weights = ir.Value(name=name, const_value=tensor, shape=tensor.shape, type=ir.TensorType(ir.DataType.FLOAT))
        self.graph.register_initializer(weights)
        cast.type = weights.type
        ir.convenience.replace_all_uses_with(cast, weights)

    def _round(self, value: ir.Value, name: str) -> None:
        """Insert casts that round `value`, and let all its readers read the rounded tensor, which is called `name`."""
        uses, producer = list(value.uses()), value.producer()
        value.type = ir.TensorType(ir.DataType.FLOAT)
        down = ir.node("Cast", [value], {"to": self.half}, name=f"{name}_round")
        up = ir.node("Cast", [down.outputs[0]], {"to": ir.DataType.FLOAT}, name=f"{name}_restore")
        for result, own, kind in ((down.outputs[0], f"{name}_narrow", self.half), (up.outputs[0], name, ir.DataType.FLOAT)):
            result.name, result.shape, result.type = own, value.shape, ir.TensorType(kind)
        if producer is None:
            self.graph.insert_before(self.graph[0], [down, up])
        else:
            self.graph.insert_after(producer, [down, up])
        for use in uses:
            use.node.replace_input_with(use.idx, up.outputs[0])
        for index, output in enumerate(list(self.graph.outputs)):
            if output is value:
                self.graph.outputs[index] = up.outputs[0]


def _lazily(tensor: Any, half: ir.DataType, name: str) -> ir.LazyTensor:
    """A float32 tensor of weights rounded to half, which is computed when it is written."""

    def rounded() -> ir.Tensor[Any]:
        # Numbers too large for the type become infinite, as in an engine.
        with np.errstate(over="ignore"):
            return ir.Tensor(tensor.numpy().astype(half.numpy()).astype(np.float32), name=name)

    return ir.LazyTensor(rounded, dtype=ir.DataType.FLOAT, shape=ir.Shape(tensor.shape.numpy()), name=name)
