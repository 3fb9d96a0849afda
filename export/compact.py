"""Smaller files for the same numbers: weights that float16 holds exactly are stored in it and widened at load."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

__all__ = ["store_in_half"]

_SMALLEST = 256
"""Values in a weight worth the extra node."""


def store_in_half(model: ir.Model) -> None:
    """Put a float16 weight and a `Cast` in place of each float32 weight whose values all are float16 values.

    Engines fold the cast at load, so they compute exactly what they would with the float32 weight. Train or round weights to
    float16 beforehand, or little is found to be stored.
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
