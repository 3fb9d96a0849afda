"""Rewrites of a tokenizer's graph as OpenVINO has read it, for its CPU kernels: less work, the same results but for rounding.

- A search for the largest of a row, which OpenVINO runs as a slow TopK, becomes reductions. Results are equal. The searches
  took half of the encoder of `tiny`.
- Nearest-neighbour upsampling to twice the side and a 3x3 convolution become four 2x2 convolutions, as `cpu_tokenizer.py` says.
- A norm of groups of channels becomes two means and a product. OpenVINO's own wants maps channel by channel and convolutions
  write them pixel by pixel, so before and after it every map was moved: 8 % of a decoder in bfloat16.

A graph that searches for codes keeps its convolutions and norms: a difference could tip a code.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np

from tokenflow_sdk.passes.cpu_tokenizer import TAPS

__all__ = ["rewrite"]


def rewrite(model: Any, on_cpu: bool) -> None:
    """Rewrite an `openvino.Model` in place.

    Args:
        model: its shapes are static.
        on_cpu: whether a CPU is to run it. Elsewhere only searches are replaced.
    """
    searches = any(node.get_type_name() == "TopK" for node in model.get_ops())
    for replacement in [_search] if searches else [_upsampling, _norm] if on_cpu else []:
        _replace_all(model, replacement)
    model.validate_nodes_and_infer_types()


def _replace_all(model: Any, replacement: Callable[[Any, Any], tuple[Any, Any] | None]) -> None:
    """Replace nodes. A replacement is an old output, and the node whose output is read in its place."""
    ops = importlib.import_module("openvino.opset13")
    for node in model.get_ordered_ops():
        pair = replacement(ops, node)
        if pair is not None:
            old, new = pair
            for reader in old.get_target_inputs():
                reader.replace_source_output(new.output(0))


def _search(ops: Any, node: Any) -> tuple[Any, Any] | None:
    """The lowest of the indices whose value is the row's largest, as of ONNX's ArgMax, in place of a TopK."""
    if node.get_type_name() != "TopK" or node.output(0).get_target_inputs():
        return None
    values, shape = node.input_value(0), node.input_value(0).get_partial_shape()
    told = node.get_attributes()
    last = told["axis"] in (-1, len(shape) - 1) and shape[-1].is_static
    if told["mode"] != "max" or not last or node.get_output_partial_shape(1)[-1] != 1:
        return None
    row = shape[-1].get_length()
    largest = ops.reduce_max(values, np.int64(-1), keep_dims=True)
    indices, none, first = (ops.constant(array) for array in (np.arange(row, dtype=np.int32), np.int32(row), np.int32(0)))
    candidates = ops.select(ops.equal(values, largest), indices, none)
    lowest = ops.reduce_min(candidates, np.int64(-1), keep_dims=True)
    # In a row of -inf alone none is equal: its reductions begin with the smallest finite number.
    lowest = ops.select(ops.less(lowest, none), lowest, first)
    return node.output(1), ops.convert(lowest, told["index_element_type"])


def _upsampling(ops: Any, conv: Any) -> tuple[Any, Any] | None:
    """Four 2x2 convolutions of the small map, with the bias, in place of a 3x3 convolution of the upsampled one."""
    if conv.get_type_name() != "Convolution" or not _doubles(conv.input_value(0).get_node()):
        return None
    weight, told = _weight(conv), conv.get_attributes()
    plain = [told["strides"], told["dilations"], told["pads_begin"], told["pads_end"]] == [[1, 1]] * 4
    if weight is None or weight.shape[2:] != (3, 3) or not plain:
        return None
    source, end, bias = conv.input_value(0).get_node().input_value(0), conv, None
    for reader in conv.output(0).get_target_inputs():
        node = reader.get_node()
        if node.get_type_name() == "Add":
            other = node.input_value(1 - reader.get_index())
            if _sizes(other) == [1, len(weight), 1, 1]:
                end, bias = node, other
    parts = []
    for row in TAPS:
        for column in TAPS:
            kernel = np.einsum("rh,oihw,cw->oirc", TAPS[row], weight, TAPS[column])
            # The first pixel of two also reads the small pixel before its own, the second one the next.
            part = ops.convolution(source, ops.constant(kernel), [1, 1], [1 - row, 1 - column], [row, column], [1, 1])
            parts.append(part if bias is None else ops.add(part, bias))
    return end.output(0), ops.depth_to_space(ops.concat(parts, 1), "blocks_first", 2)


def _doubles(node: Any) -> bool:
    """Whether a node resizes maps to twice their sides by nearest neighbour."""
    if node.get_type_name() != "Interpolate":
        return False
    told, small, large = node.get_attributes(), _sizes(node.input_value(0)), _sizes(node.output(0))
    how = [told.get(name) for name in ("mode", "shape_calculation_mode", "coordinate_transformation_mode", "nearest_mode")]
    scales = node.input_value(1).get_node()
    # A side of 3 becomes 6 by a scale of 2.3 as well, of other pixels.
    by_two = scales.get_type_name() == "Constant" and set(scales.get_data().ravel()[-2:]) == {2}
    doubled = len(small) == 4 and large == [*small[:2], *(2 * side for side in small[2:])]
    return how == ["nearest", "scales", "asymmetric", "floor"] and by_two and doubled


def _weight(conv: Any) -> Any:
    """The weights float32 of a convolution, where they are constants and not in 8 bits; else None."""
    node = conv.input_value(1).get_node()
    if node.get_type_name() == "Convert":
        node = node.input_value(0).get_node()
    found = node.get_data() if node.get_type_name() == "Constant" else None
    return None if found is None or found.dtype.kind != "f" else found.astype(np.float32)


def _norm(ops: Any, node: Any) -> tuple[Any, Any] | None:
    """The same of a map [1, C, H, W] in place of the normalization of its groups [1, G, C / G * H * W]."""
    if node.get_type_name() != "MVN" or node.input_value(0).get_node().get_type_name() != "Reshape":
        return None
    given, grouped, told = node.input_value(0).get_node().input_value(0), _sizes(node.input_value(0)), node.get_attributes()
    sizes, axes = _sizes(given), node.input_value(1).get_node()
    of_groups = len(sizes) == 4 and len(grouped) == 3 and sizes[0] == grouped[0] == 1 and sizes[1] % grouped[1] == 0
    over_rows = axes.get_type_name() == "Constant" and [int(axis) % 3 for axis in axes.get_data().ravel()] == [2]
    if not of_groups or not over_rows or not told["normalize_variance"] or told["eps_mode"].upper() != "INSIDE_SQRT":
        return None

    def mean(values: Any) -> Any:
        """Of each group, for each of its channels, [1, C, 1, 1]."""
        each = np.array([1, grouped[1], sizes[1] // grouped[1], 1])
        of_channels = ops.reshape(ops.reduce_mean(values, np.array([2, 3]), keep_dims=True), each, False)
        of_groups = ops.broadcast(ops.reduce_mean(of_channels, np.int64(2), keep_dims=True), each)
        return ops.reshape(of_groups, np.array([1, sizes[1], 1, 1]), False)

    # As a second mean, because the mean of squares less the square of the mean would lose digits.
    centred = ops.subtract(given, mean(given))
    variance = ops.add(mean(ops.multiply(centred, centred)), ops.constant(np.float32(told["eps"])))
    scaled = ops.multiply(centred, ops.power(variance, ops.constant(np.float32(-0.5))))
    return node.output(0), ops.reshape(scaled, np.array(grouped), False)


def _sizes(value: Any) -> list[int]:
    """The shape of a value; none if it is dynamic."""
    shape = value.get_partial_shape()
    return [] if shape.is_dynamic else [size.get_length() for size in shape]
