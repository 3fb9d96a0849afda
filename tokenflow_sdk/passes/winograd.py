"""3x3 convolutions by Winograd's minimal filtering F(4x4, 3x3) (https://arxiv.org/abs/1509.09308), as operators of a graph.

A map is cut into tiles of 4x4 pixels. A tile's result needs the 6x6 pixels around it. They are transformed to 36 numbers for
each channel; each of the 36 is multiplied by weights of its own and summed over the channels; and the 36 sums are transformed
back to 16 pixels. That is 36 products for a pair of channels instead of 144.

The pixels are transformed a strip of the map at a time. With the 16 pixels of tiles apart (SpaceToDepth), rows and columns of
six pixels are those of a tile and the first two of the next one, so that each transform is a convolution along tiles, one after
another in memory. The last row and column of tiles, which are one too many, get numbers that mean nothing, and are cut off.
A pixel that is not finite spoils some 8x8 pixels around it, where a convolution spoils 3x3.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokenflow_sdk.passes.cpu_graph import PREFIX, Node, node_field

__all__ = ["constants", "convolution"]

_TILE = 4
_MOST = 2**23
"""About how many numbers a strip of one picture is transformed to, so that they take no more memory in a larger map."""
_INPUT, _KERNEL, _OUTPUT = (f"{PREFIX}winograd_{name}" for name in ("input", "kernel", "output"))
_FROM_PIXELS = np.array(
    [
        [4, 0, -5, 0, 1, 0],
        [0, -4, -4, 1, 1, 0],
        [0, 4, -4, -1, 1, 0],
        [0, -2, -1, 2, 1, 0],
        [0, 2, -1, -2, 1, 0],
        [0, 4, 0, -5, 0, 1],
    ]
)
"""Transforms six pixels in a row to six numbers."""
_FROM_WEIGHTS = np.array([[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]]) / 24
"""Transforms three weights in a row to six numbers."""
_TO_PIXELS = np.array([[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]])
"""Transforms six sums in a row to four pixels."""


def convolution(conv: Node, channels: Sequence[int], size: Sequence[int]) -> Iterator[bytes]:
    """The nodes that stand in place of a float32 3x3 convolution that keeps the size.

    Args:
        conv: the convolution.
        channels: of its result, and of its input.
        size: height and width of its map in pixels, which every call must have.
    """
    (source, kernels, *bias), (result,) = (name for name in conv.inputs if name), conv.outputs
    name = PREFIX + result
    shapes = {"as_kernels": [-1, 9], "as_weights": [36, *channels], "as_bias": [-1, 1, 1], "start": [0, 0], "sides": [2, 3]}
    yield from _constants(name, shapes)
    yield node_field("Reshape", [kernels, f"{name}/as_kernels"], f"{name}/kernels")
    yield node_field("Gemm", [_KERNEL, f"{name}/kernels"], f"{name}/kernel_numbers", transB=1)
    yield node_field("Reshape", [f"{name}/kernel_numbers", f"{name}/as_weights"], f"{name}/weights")

    height, width = (-(-side // _TILE) for side in size)  # in tiles
    count = min(height, -(-36 * max(channels) * height * width // _MOST))
    strips = []
    for start, stop in pairwise(height * i // count for i in range(count + 1)):
        strips.append(f"{name}/strip_{start}")
        yield from _strip(source, name, channels, size, start, stop)
    yield node_field("Concat", strips, f"{name}/map" if bias else result, axis=2)
    if bias:
        yield node_field("Reshape", [*bias, f"{name}/as_bias"], f"{name}/bias")
        yield node_field("Add", [f"{name}/map", f"{name}/bias"], result)


def _strip(source: str, name: str, channels: Sequence[int], size: Sequence[int], start: int, stop: int) -> Iterator[bytes]:
    """The nodes that compute the rows of tiles from `start` to `stop`, without the bias."""
    results, sources = channels
    top, rows, width = start * _TILE, stop - start + 1, -(-size[1] // _TILE) + 1
    tiles = rows * width

    def own(what: str) -> str:
        return f"{name}/strip_{start}/{what}"

    shapes = {
        # A strip reads the row of pixels before its own, and the row of tiles after them; negative padding cuts the others off.
        "pads": [0, 0, 1 - top, 1, 0, 0, top - 1 + rows * _TILE - size[0], width * _TILE - 1 - size[1]],
        "size": [min(stop * _TILE, size[0]) - top, size[1]],
        "as_rows": [-1, _TILE, sources * tiles],
        "as_columns": [-1, _TILE, 6 * sources * tiles],
        "as_numbers": [-1, 36, sources, tiles],
        "as_sum_rows": [-1, 6, 6 * results * tiles],
        "as_sum_columns": [-1, 6, results * tiles],
        "as_tiles": [-1, _TILE * _TILE * results, rows, width],
    }
    yield from _constants(f"{name}/strip_{start}", shapes)
    yield node_field("Pad", [source, own("pads")], own("padded"))
    yield node_field("SpaceToDepth", [own("padded")], own("tiles"), blocksize=_TILE)
    yield node_field("Reshape", [own("tiles"), own("as_rows")], own("rows"))
    yield node_field("Conv", [own("rows"), _INPUT], own("row_numbers"), kernel_shape=[2], pads=[0, 1])
    yield node_field("Reshape", [own("row_numbers"), own("as_columns")], own("columns"))
    columns = [own("columns"), _INPUT]
    yield node_field("Conv", columns, own("both"), kernel_shape=[2], dilations=[width], pads=[0, width])
    yield node_field("Reshape", [own("both"), own("as_numbers")], own("numbers"))
    yield node_field("MatMul", [f"{name}/weights", own("numbers")], own("sums"))
    yield node_field("Reshape", [own("sums"), own("as_sum_rows")], own("sum_rows"))
    yield node_field("MatMul", [_OUTPUT, own("sum_rows")], own("pixel_rows"))
    yield node_field("Reshape", [own("pixel_rows"), own("as_sum_columns")], own("sum_columns"))
    yield node_field("MatMul", [_OUTPUT, own("sum_columns")], own("pixel_columns"))
    yield node_field("Reshape", [own("pixel_columns"), own("as_tiles")], own("new_tiles"))
    yield node_field("DepthToSpace", [own("new_tiles")], own("pixels"), blocksize=_TILE, mode="DCR")
    yield node_field("Slice", [own("pixels"), f"{name}/start", own("size"), f"{name}/sides"], f"{name}/strip_{start}")


def _constants(name: str, shapes: dict[str, list[int]]) -> Iterator[bytes]:
    for what, value in shapes.items():
        yield node_field("Constant", [], f"{name}/{what}", value_ints=value)


def constants() -> dict[str, NDArray[Any]]:
    """The constants of the new nodes."""
    along = np.zeros((6, _TILE, 2))  # pixels of a tile, and of the next one
    along[:, :, 0], along[:, :2, 1] = _FROM_PIXELS[:, :_TILE], _FROM_PIXELS[:, _TILE:]
    matrices = {_INPUT: along, _KERNEL: np.kron(_FROM_WEIGHTS, _FROM_WEIGHTS), _OUTPUT: _TO_PIXELS}
    return {name: matrix.astype(np.float32) for name, matrix in matrices.items()}
