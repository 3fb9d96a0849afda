"""Makes the files of a graph smaller without changing its results.

Weights whose values float16 can hold exactly are stored in float16 and cast to float32 in the graph. A matrix that resizes maps
is stored as the two small matrices whose Kronecker product it is. Backends fold both into constants.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from tokenflow_export.tracing.resizes import map_matrix
from tokenflow_sdk.pictures.resize import area_matrix, bicubic_matrix

__all__ = ["store_in_half", "store_resizes"]

_SMALLEST = 256
"""Weights with fewer values than this are not worth an extra node."""


def store_in_half(model: ir.Model) -> None:
    """Replace each float32 weight whose values all are float16 values by a float16 weight and a `Cast`.

    Weights that were not rounded to float16 before are left as they are.
    """
    for name, value in list(model.graph.initializers.items()):
        tensor = value.const_value
        if tensor is None or tensor.dtype != ir.DataType.FLOAT or tensor.size < _SMALLEST:
            continue
        wide = tensor.numpy()
        with np.errstate(over="ignore"):
            half = wide.astype(np.float16)
        if not np.array_equal(half.astype(np.float32), wide):
            continue
        stored = ir.Value(name=f"{name}_half", const_value=ir.tensor(half, name=f"{name}_half"))
        cast = ir.node("Cast", [stored], {"to": ir.DataType.FLOAT})
        ir.convenience.replace_all_uses_with(value, cast.outputs[0])
        cast.outputs[0].name = f"{name}_wide"
        cast.outputs[0].shape, cast.outputs[0].type = value.shape, ir.TensorType(ir.DataType.FLOAT)
        del model.graph.initializers[name]
        model.graph.register_initializer(stored)
        model.graph.insert_before(model.graph[0], cast)


def store_resizes(model: ir.Model, patch_nums: Sequence[int]) -> None:
    """Replace each matrix that resizes maps from or to the finest scale by its two small factors.

    Args:
        model: a graph of a tokenizer.
        patch_nums: sides of the scales. A matrix may also be that of all scales side by side.
    """
    grid = patch_nums[-1]
    sides = {f"up_{side}": bicubic_matrix(side, grid) for side in patch_nums}
    sides |= {f"down_{side}": area_matrix(grid, side) for side in patch_nums}
    makers: dict[tuple[str, ...], NDArray[np.float32]] = {(name,): map_matrix(side) for name, side in sides.items()}
    makers[tuple(f"up_{side}" for side in patch_nums)] = np.concatenate([makers[f"up_{side}",] for side in patch_nums], axis=1)
    for name, value in list(model.graph.initializers.items()):
        tensor = value.const_value
        if tensor is None or tensor.dtype != ir.DataType.FLOAT or len(tensor.shape) != 2:
            continue
        stored = tensor.numpy()
        for factors, matrix in makers.items():
            if stored.shape == matrix.shape and np.array_equal(stored, matrix):
                result = _product(model.graph, name, [sides[factor].astype(np.float32) for factor in factors])
                ir.convenience.replace_all_uses_with(value, result)
                result.shape, result.type = value.shape, value.type
                del model.graph.initializers[name]
                break


def _product(graph: ir.Graph, name: str, sides: Sequence[NDArray[np.float32]]) -> ir.Value:
    """Insert nodes that compute the resize matrices of maps from those of their sides, and concatenate them."""
    nodes: list[ir.Node] = []

    def constant(suffix: str, array: NDArray[np.float32] | NDArray[np.int64]) -> ir.Value:
        value = ir.Value(name=f"{name}_{suffix}", const_value=ir.tensor(array, name=f"{name}_{suffix}"))
        graph.register_initializer(value)
        return value

    def added(op: str, inputs: Sequence[ir.Value], suffix: str, **attributes: int) -> ir.Value:
        node = ir.node(op, inputs, attributes)
        node.outputs[0].name = f"{name}_{suffix}"
        nodes.append(node)
        return node.outputs[0]

    blocks = []
    for index, side in enumerate(sides):
        target, source = side.shape
        rows = constant(f"rows_{index}", side.reshape(target, 1, source, 1))
        columns = constant(f"columns_{index}", side.reshape(1, target, 1, source))
        shape = constant(f"shape_{index}", np.array([target**2, source**2], np.int64))
        blocks.append(added("Reshape", [added("Mul", [rows, columns], f"product_{index}"), shape], f"map_{index}"))
    result = added("Concat", blocks, "maps", axis=1) if len(blocks) > 1 else blocks[0]
    graph.insert_before(graph[0], nodes)
    return result
