"""Exports a transformer in float16, or with its weights quantized to 8 or 4 bits, with standard ONNX operators.

Every weight is a lazy tensor: it is read, converted and written while the graph is saved, one after another, so that a model
larger than memory can be exported.

int8: weights are quantized by output column and activations by row, both symmetrically; the product is a `MatMulInteger`. The
scale of a row depends on that row alone, so a sequence gives the same numbers in any batch.
int4: weights are quantized in blocks of 32 inputs and dequantized in the graph (`DequantizeLinear`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tokenflow_sdk.errors import ArgumentError, CheckpointError

__all__ = [
    "FULL_PRECISION",
    "INT4_BLOCK",
    "ExportPrecision",
    "ReadWeight",
    "attach_weights",
    "quantize_blocks",
    "quantize_columns",
    "quantize_weights",
    "round_columns",
    "use_matmul",
]

INT4_BLOCK = 32
Float32 = NDArray[np.float32]
ReadWeight = Callable[[str], Float32]


@dataclass(frozen=True)
class ExportPrecision:
    """The precision of an exported transformer: `dtype` of its arithmetic, and `weights` if its weights have fewer bits.

    Raises:
        ArgumentError: int8 weights with fp16, because activations are quantized from float32.
    """

    dtype: Literal["fp32", "fp16"] = "fp32"
    weights: Literal["int8", "int4"] | None = None

    def __post_init__(self) -> None:
        if (self.dtype, self.weights) == ("fp16", "int8"):
            raise ArgumentError("--weights int8 computes in float32 and 8-bit integers.", "Leave --dtype fp16 out.")

    @property
    def torch_dtype(self) -> torch.dtype:
        return torch.float16 if self.dtype == "fp16" else torch.float32

    @property
    def name(self) -> str:
        """The precision in words: `fp32`, `int4 in fp16`."""
        return f"{self.weights} in {self.dtype}" if self.weights else self.dtype

    def cast(self, weight: Tensor, name: str) -> Tensor:
        """A float32 weight in the dtype of the arithmetic.

        Raises:
            CheckpointError: it has a value that this dtype cannot hold.
        """
        cast = weight.to(self.torch_dtype)
        _require_finite(bool(cast.isfinite().all()), name, self.dtype)
        return cast

    def bytes_of(self, count: int) -> int:
        """About how many bytes `count` weights take with their scales."""
        bits = {"int8": 8, "int4": 5}.get(self.weights or "", 16 if self.dtype == "fp16" else 32)
        return count * bits // 8

    def require_blocks(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Check that weight matrices [out, in] of these shapes can be quantized in blocks, if the precision asks for it.

        Raises:
            ArgumentError: int4, and a matrix has a number of inputs that is no multiple of 32.
        """
        odd = next((key for key, shape in shapes.items() if len(shape) == 2 and shape[1] % INT4_BLOCK), None)
        if self.weights == "int4" and odd is not None:
            raise ArgumentError(
                f"{odd} has {shapes[odd][1]} inputs, which is no multiple of {INT4_BLOCK}.", "Use --weights int8."
            )


FULL_PRECISION = ExportPrecision()
"""float32 throughout."""


class MatMul(nn.Module):
    """`nn.Linear` with a weight [in, out], so that it is traced to a MatMul without a transpose of the weight."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter(linear.weight.new_empty(linear.in_features, linear.out_features))
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight if self.bias is None else x @ self.weight + self.bias


def use_matmul(module: nn.Module) -> None:
    """Replace every `nn.Linear` in `module` by a `MatMul`."""
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, MatMul(child))
        else:
            use_matmul(child)


def attach_weights(model: ir.Model, read: ReadWeight) -> None:
    """Give the initializers of a graph that was traced without weights their values, which are read when they are written.

    Args:
        model: the graph; its initializers have no values.
        read: gives a float32 weight by its name in the graph.
    """
    for value in model.graph.initializers.values():
        assert value.name and value.dtype and isinstance(value.shape, ir.Shape)
        _set_lazy(value, _reader(read, value.name, value.dtype.numpy()), value.dtype, value.shape)


def _reader(read: ReadWeight, name: str, dtype: np.dtype[Any]) -> Callable[[], NDArray[Any]]:
    def cast() -> NDArray[Any]:
        with np.errstate(over="ignore"):
            weight = read(name).astype(dtype, copy=False)
        _require_finite(bool(np.isfinite(weight).all()), name, dtype.name)
        return weight

    return cast


def _require_finite(finite: bool, name: str, dtype: str) -> None:
    if not finite:
        raise CheckpointError(f"{name} has values that are too large for {dtype}.", "Export it without --dtype fp16.")


def _set_lazy(value: ir.Value, make: Callable[[], NDArray[Any]], dtype: ir.DataType, shape: ir.Shape) -> None:
    value.const_value = ir.LazyTensor(lambda: ir.tensor(make(), dtype=dtype), dtype=dtype, shape=shape, name=value.name)


def quantize_columns(weight: Float32) -> tuple[NDArray[np.int8], Float32]:
    """Quantize a weight [in, out] to int8 [in, out] with scales float32 [out]; the weight is about q * scale."""
    scale = np.maximum(np.abs(weight).max(axis=0), np.float32(1e-12)) / np.float32(127)
    return np.rint(weight / scale).astype(np.int8), scale


def round_columns(weight: Tensor) -> Tensor:
    """Round a float32 weight [out, in] to its int8 values and back. Engines without integer products multiply with this."""
    q, scale = quantize_columns(weight.T.numpy())
    return torch.from_numpy(q * scale).T


def quantize_blocks(weight: Float32) -> tuple[NDArray[Any], Float32]:
    """Quantize a weight [in, out] to int4 [in, out] with scales float32 [in / 32, out].

    The largest value of a block is exactly -8 times its scale.
    """
    blocks = weight.reshape(-1, INT4_BLOCK, weight.shape[1])
    high, low = blocks.max(axis=1, keepdims=True), blocks.min(axis=1, keepdims=True)
    largest = np.where(high > -low, high, low)
    scale = np.where(np.abs(largest) < 1e-12, np.float32(1e-12), largest / np.float32(-8))
    q = blocks / scale
    np.clip(np.rint(q, out=q), -8, 7, out=q)
    return q.reshape(weight.shape).astype(np.int8).astype(ml_dtypes.int4), scale[:, 0]


def quantize_weights(model: ir.Model, weights: Literal["int8", "int4"]) -> None:
    """Rewrite every product with a weight matrix of a graph, in place, to one with a quantized matrix.

    Of int4, every matrix has a multiple of 32 inputs; see `ExportPrecision.require_blocks`.
    """
    rows: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}
    for node in list(model.graph):
        matrix = node.inputs[1] if node.op_type == "MatMul" else None
        if matrix is None or matrix.const_value is None or not matrix.is_initializer():
            continue
        rewrite = _Rewrite(model, node, matrix)
        rewrite.to_int8(rows) if weights == "int8" else rewrite.to_int4()
    model.graph.remove(_unused(model), safe=True)
    if weights == "int4":
        model.opset_imports[""] = 21  # the first opset whose DequantizeLinear has blocks


def _unused(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph if not any(value.uses() or value.is_graph_output() for value in node.outputs)]


class _Rewrite:
    """Rewrites one MatMul of x [..., in] with a weight [in, out]."""

    def __init__(self, model: ir.Model, node: ir.Node, matrix: ir.Value) -> None:
        self.graph, self.node, self.matrix = model.graph, node, matrix
        assert matrix.name and matrix.const_value is not None
        self.name = matrix.name
        self.tensor = matrix.const_value
        self.inputs, self.outputs = self.tensor.shape.numpy()

    def _read(self) -> Float32:
        return self.tensor.numpy().astype(np.float32, copy=False)

    def _initializer(
        self, suffix: str, make: Callable[[], NDArray[Any]], dtype: ir.DataType, shape: tuple[int, ...]
    ) -> ir.Value:
        name = f"{self.name}_{suffix}"
        if name not in self.graph.initializers:
            value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))
            _set_lazy(value, make, dtype, ir.Shape(shape))
            self.graph.register_initializer(value)
        return self.graph.initializers[name]

    def _constant(self, name: str, array: NDArray[Any]) -> ir.Value:
        if name not in self.graph.initializers:
            self.graph.register_initializer(ir.Value(name=name, const_value=ir.tensor(array, name=name)))
        return self.graph.initializers[name]

    def _add(self, op: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        node = ir.node(op, inputs, attributes)
        self.graph.insert_before(self.node, node)
        return node.outputs[0]

    def _replace(self, result: ir.Value) -> None:
        old = self.node.outputs[0]
        result.name, result.shape, result.type = old.name, old.shape, old.type
        old.name = None
        ir.convenience.replace_all_uses_with(old, result, replace_graph_outputs=True)
        self.graph.remove(self.node, safe=True)
        if not self.matrix.uses():
            del self.graph.initializers[self.name]

    def to_int4(self) -> None:
        dtype = self.tensor.dtype
        shape = (self.inputs // INT4_BLOCK, self.outputs)
        q = self._initializer("int4", lambda: quantize_blocks(self._read())[0], ir.DataType.INT4, (self.inputs, self.outputs))
        scale = self._initializer(
            "scale", lambda: quantize_blocks(self._read())[1].astype(dtype.numpy(), copy=False), dtype, shape
        )
        weight = self._add("DequantizeLinear", q, scale, axis=0, block_size=INT4_BLOCK)
        x = self.node.inputs[0]
        assert x is not None
        self._replace(self._add("MatMul", x, weight))

    def to_int8(self, rows: dict[ir.Value, tuple[ir.Value, ir.Value]]) -> None:
        x = self.node.inputs[0]
        assert x is not None
        if x not in rows:
            rows[x] = self._quantize_rows(x)
        q, row_scale = rows[x]
        shape = (self.inputs, self.outputs)
        weight = self._initializer("int8", lambda: quantize_columns(self._read())[0], ir.DataType.INT8, shape)
        scale = self._initializer("scale", lambda: quantize_columns(self._read())[1], ir.DataType.FLOAT, (self.outputs,))
        # Without a zero point of the weight, onnxruntime before 1.30 aborts the process on x86; with one shared by several
        # weights, no version opens the graph.
        zero_points = self._constant("int8_middle", np.uint8(128)), self._constant(f"{self.name}_zero", np.int8(0))
        product = self._add("MatMulInteger", q, weight, *zero_points)
        product = self._add("Cast", product, to=ir.DataType.FLOAT)
        self._replace(self._add("Mul", self._add("Mul", product, row_scale), scale))

    def _quantize_rows(self, x: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Insert nodes that quantize x by row: uint8 [..., in] with zero point 128, and scales float32 [..., 1]."""
        largest = self._add("ReduceMax", self._add("Abs", x), self._constant("last_axis", np.array([-1], np.int64)), keepdims=1)
        floor = self._add("Max", largest, self._constant("int8_least", np.float32(1e-12)))
        scale = self._add("Mul", floor, self._constant("int8_step", np.float32(1 / 127)))
        steps = self._add("Round", self._add("Div", x, scale))
        shifted = self._add("Add", steps, self._constant("int8_shift", np.float32(128)))
        return self._add("Cast", shifted, to=ir.DataType.UINT8), scale
