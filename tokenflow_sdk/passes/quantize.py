"""Quantize convolutions to int8 or fp8 with explicit Q/DQ pairs, which strongly typed TensorRT engines run as 8-bit products.

Quantization is symmetric, with one scale per tensor for activations and one per output channel for weights. Scales have the
float type of the graph. onnxruntime runs the same Q/DQ pairs, so the loss of quality can be measured without a GPU.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from tokenflow_sdk.passes.graph import drop_unused, import_onnx_ir

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["LARGEST", "ActivationRanges", "DecoderType", "EightBit", "inner_convolutions", "quantize", "unscaled_convolutions"]

EightBit = Literal["int8", "fp8"]
DecoderType = Literal[EightBit, "bf16"]
"""The types that a tokenizer's decoder may have for itself."""
LARGEST: dict[EightBit, float] = {"int8": 127.0, "fp8": 448.0}
"""Largest magnitude of each type. fp8 is float8e4m3fn: 4 exponent bits, 3 mantissa bits, no infinity."""

_NORMS = ("InstanceNormalization", "GroupNormalization", "LayerNormalization", "RMSNormalization")
_LEAST_SCALE = 2.0**-18
"""Smallest scale. It is subnormal in float16, with six bits left; smaller scales would be rounded too coarsely."""


@dataclass(frozen=True)
class ActivationRanges:
    """The convolutions to quantize and the range of each one's input.

    Args:
        dtype: `int8` or `fp8`.
        magnitudes: for each convolution, by node name, the input magnitude that maps to the largest number of the type; larger
            inputs saturate.
    """

    dtype: EightBit
    magnitudes: Mapping[str, float]

    def without(self, names: Collection[str]) -> ActivationRanges:
        """The same ranges without the convolutions in `names`."""
        return ActivationRanges(self.dtype, {name: value for name, value in self.magnitudes.items() if name not in names})

    @property
    def digest(self) -> str:
        """First 8 hex digits of the SHA-256 of the ranges, for cache keys."""
        text = json.dumps([self.dtype, sorted(self.magnitudes.items())])
        return hashlib.sha256(text.encode()).hexdigest()[:8]


def inner_convolutions(model: ir.Model) -> list[str]:
    """Names of the convolutions that have a norm upstream and another convolution downstream, in graph order.

    The others, at both ends of the graph, take little time and lose much quality in 8 bits: the inputs of the first ones have
    outliers in unusual images, and no later layer averages out the rounding of the last one.
    """
    normal: set[ir.Value] = set()
    followed: set[ir.Value] = set()
    for node in model.graph:
        if node.op_type in _NORMS or any(value in normal for value in node.inputs):
            normal.update(node.outputs)
    for node in reversed(model.graph):
        if node.op_type == "Conv" or any(value in followed for value in node.outputs):
            followed.update(value for value in node.inputs if value is not None)
    return [
        str(node.name)
        for node in model.graph
        if node.op_type == "Conv" and node.inputs[0] in normal and node.outputs[0] in followed
    ]


def unscaled_convolutions(model: ir.Model) -> list[str]:
    """Names of the inner convolutions whose input no norm has scaled since the last product, in graph order.

    They are few and cost much quality in 8 bits. Most resize the map that all blocks add to, or change its channels, and what
    is rounded there stays in the map, while a block rounds only what it adds.
    """
    scaled: set[ir.Value] = set()
    for node in model.graph:
        read = [value for value in node.inputs if value is not None and value.const_value is None]
        multiplies = node.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul")
        # Constants that a node makes, weights stored in half for example, need no scale, nor do the sizes that a reshape reads.
        if node.op_type in (*_NORMS, "Shape") or (not multiplies and all(value in scaled for value in read)):
            scaled.update(node.outputs)
    inner = set(inner_convolutions(model))
    return [str(node.name) for node in model.graph if node.name in inner and node.inputs[0] not in scaled]


def quantize(model: ir.Model, ranges: ActivationRanges) -> None:
    """Quantize the inputs and weights of convolutions to 8 bits, in place.

    Args:
        model: a graph whose float types are final: if it is to run in half precision, `to_half` was applied before.
        ranges: the convolutions to quantize; names that are not in the graph are ignored.
    """
    inserter = _QdqInserter(model.graph, ranges.dtype)
    for node in list(model.graph):
        if node.name not in ranges.magnitudes:
            continue
        rows, weight = node.inputs[0], node.inputs[1]
        assert rows is not None and weight is not None and rows.dtype is not None
        array = _constant(weight)
        assert array is not None, f"{node.name} has no constant weights"
        node.replace_input_with(0, inserter.activations(rows, ranges.magnitudes[str(node.name)]))
        node.replace_input_with(1, inserter.weights(node, array.astype(np.float32), rows.dtype))
    drop_unused(model)


def _constant(value: ir.Value | None) -> NDArray[Any] | None:
    """The values of an initializer, looking through `Cast` nodes; None if the tensor is not constant."""
    while value is not None and (producer := value.producer()) is not None and producer.op_type == "Cast":
        value = producer.inputs[0]
    if value is None or value.const_value is None:
        return None
    return value.const_value.numpy()


class _QdqInserter:
    """Inserts Q/DQ pairs into a graph. Convolutions that read the same tensor share one pair."""

    def __init__(self, graph: ir.Graph, dtype: EightBit) -> None:
        self.ir = import_onnx_ir()
        self.graph, self.largest = graph, LARGEST[dtype]
        self.type = self.ir.DataType.INT8 if dtype == "int8" else self.ir.DataType.FLOAT8E4M3FN
        self.pairs: dict[str, ir.Value] = {}

    def activations(self, value: ir.Value, magnitude: float) -> ir.Value:
        """The tensor after quantization and dequantization; `magnitude` maps to the largest number of the type."""
        name = str(value.name)
        if name not in self.pairs:
            scale = self._scale(f"{name}_scale", np.float32(magnitude), value.dtype)
            zero = self._initializer(f"{name}_zero", np.zeros((), self.type.numpy()), self.type)
            quantized = self.ir.node("QuantizeLinear", [value, scale, zero], name=f"{name}_quantize")
            rounded = self._set_output(quantized, f"{name}_rounded", value.shape, self.type)
            dequantized = self.ir.node("DequantizeLinear", [rounded, scale, zero], name=f"{name}_dequantize")
            restored = self._set_output(dequantized, f"{name}_restored", value.shape, value.dtype)
            producer = value.producer()
            if producer is None:
                self.graph.insert_before(self.graph[0], [quantized, dequantized])
            else:
                self.graph.insert_after(producer, [quantized, dequantized])
            self.pairs[name] = restored
        return self.pairs[name]

    def weights(self, node: ir.Node, array: NDArray[np.float32], dtype: Any) -> ir.Value:
        """Weights [out, in, ...], stored in 8 bits and dequantized in the graph."""
        name = f"{node.name}_weight"
        scale = self._scale(f"{name}_scale", np.abs(array).reshape(len(array), -1).max(axis=1), dtype)
        assert scale.const_value is not None
        factors = scale.const_value.numpy().astype(np.float32).reshape(-1, *[1] * (array.ndim - 1))
        numbers = (array / factors).clip(-self.largest, self.largest)
        if self.type == self.ir.DataType.INT8:
            numbers = numbers.round()
        rounded = self._initializer(f"{name}_rounded", numbers.astype(self.type.numpy()), self.type)
        zero = self._initializer(f"{name}_zero", np.zeros(len(array), self.type.numpy()), self.type)
        dequantized = self.ir.node("DequantizeLinear", [rounded, scale, zero], {"axis": 0}, name=f"{name}_dequantize")
        self.graph.insert_before(node, dequantized)
        return self._set_output(dequantized, f"{name}_restored", self.ir.Shape(array.shape), dtype)

    def _scale(self, name: str, magnitude: NDArray[np.float32] | np.float32, dtype: Any) -> ir.Value:
        scale = np.maximum(np.asarray(magnitude) / self.largest, _LEAST_SCALE)
        return self._initializer(name, scale.astype(dtype.numpy()), dtype)

    def _initializer(self, name: str, array: NDArray[Any], dtype: Any) -> ir.Value:
        tensor = self.ir.Tensor(array, dtype=dtype, name=name)
        value: ir.Value = self.ir.Value(name=name, const_value=tensor, shape=tensor.shape, type=self.ir.TensorType(dtype))
        self.graph.register_initializer(value)
        return value

    def _set_output(self, node: ir.Node, name: str, shape: Any, dtype: Any) -> ir.Value:
        result = node.outputs[0]
        result.name, result.shape, result.type = name, shape, self.ir.TensorType(dtype)
        return result
