"""3x3 convolutions by Winograd's minimal filtering F(4x4, 3x3) (https://arxiv.org/abs/1509.09308), as operators of a graph.

A map is cut into tiles of 4x4 pixels. A tile's result needs the 6x6 pixels around it: they are transformed to 36 numbers for
each channel, each of these is multiplied by weights of its own, and the 36 products are transformed back to 16 pixels. That is
36 products for a channel instead of 144.

The transforms take whole strips of a map. With the 16 pixels of tiles apart (SpaceToDepth), rows and columns of 6 pixels are
those of a tile and the first two of the next one, so that each transform is a convolution along tiles, one after another in
memory. The last row and column of tiles, which are one too many, get numbers that mean nothing, and are cut off at the end.
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
"""Most numbers that a strip of a map is transformed to, so that memory does not grow with the map."""
_INPUT = np.array(
    [
        [4, 0, -5, 0, 1, 0],
        [0, -4, -4, 1, 1, 0],
        [0, 4, -4, -1, 1, 0],
        [0, -2, -1, 2, 1, 0],
        [0, 2, -1, -2, 1, 0],
        [0, 4, 0, -5, 0, 1],
    ],
    np.float32,
)
"""B^T: six pixels in a row to six numbers."""
_KERNEL = np.array([[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]], np.float64) / 24
"""G: three weights in a row to six numbers."""
_OUTPUT = np.array([[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]], np.float32)
"""A^T: six products in a row to four pixels."""
_PIXELS, _KERNELS, _PRODUCTS = (f"{PREFIX}winograd_{name}" for name in ("pixels", "kernels", "products"))
_NINE, _ORIGIN, _SIDES, _CHANNELS = (f"{PREFIX}winograd_{name}" for name in ("nine", "origin", "sides", "channels"))


def convolution(conv: Node, channels: Sequence[int], size: Sequence[int]) -> Iterator[bytes]:
    """The nodes that stand in place of a float32 3x3 convolution that keeps the size.

    Args:
        conv: the convolution.
        channels: of its result, and of its input.
        size: height and width of its map, in pixels.
    """
    name = PREFIX + conv.outputs[0]
    yield node_field("Reshape", [conv.inputs[1], _NINE], f"{name}_kernels")
    yield node_field("MatMul", [f"{name}_kernels", _KERNELS], f"{name}_kernel_numbers")
    yield node_field("Transpose", [f"{name}_kernel_numbers"], f"{name}_number_kernels", perm=[1, 0])
    yield node_field("Constant", [], f"{name}_as_weights", value_ints=[36, *channels])
    yield node_field("Reshape", [f"{name}_number_kernels", f"{name}_as_weights"], f"{name}_weights")

    height, width = (-(-side // _TILE) for side in size)  # in tiles
    count = -(-36 * max(channels) * height * width // _MOST)
    cuts = [height * i // count for i in range(count + 1)]
    for start, stop in pairwise(cuts):
        yield from _strip(conv, channels, size, start, stop)
    bias, strips = conv.inputs[2:], [f"{name}_{start}_strip" for start in cuts[:-1]]
    yield node_field("Concat", strips, f"{name}_whole" if bias else conv.outputs[0], axis=2)
    if bias:
        yield node_field("Reshape", [*bias, _CHANNELS], f"{name}_bias")
        yield node_field("Add", [f"{name}_whole", f"{name}_bias"], conv.outputs[0])


def _strip(conv: Node, channels: Sequence[int], size: Sequence[int], start: int, stop: int) -> Iterator[bytes]:
    """The nodes that compute the rows of tiles from `start` to `stop`, without the bias."""
    results, sources = channels
    top, rows, width = start * _TILE, stop - start + 1, -(-size[1] // _TILE) + 1
    tiles = rows * width

    def own(what: str) -> str:
        return f"{PREFIX}{conv.outputs[0]}_{start}_{what}"

    numbers: dict[str, list[int]] = {
        # Of other strips' rows only the one before and those of the next tiles stay; negative padding cuts.
        "pads": [0, 0, 1 - top, 1, 0, 0, top - 1 + rows * _TILE - size[0], width * _TILE - 1 - size[1]],
        "size": [min(stop * _TILE, size[0]) - top, size[1]],
        "as_rows": [-1, _TILE, sources * tiles],
        "as_columns": [-1, _TILE, 6 * sources * tiles],
        "as_numbers": [-1, 36, sources, tiles],
        "as_product_rows": [-1, 6, 6 * results * tiles],
        "as_product_columns": [-1, 6, results * tiles],
        "as_tiles": [-1, _TILE * _TILE * results, rows, width],
    }
    for what, value in numbers.items():
        yield node_field("Constant", [], own(what), value_ints=value)
    yield node_field("Pad", [conv.inputs[0], own("pads")], own("padded"))
    yield node_field("SpaceToDepth", [own("padded")], own("tiles"), blocksize=_TILE)
    yield node_field("Reshape", [own("tiles"), own("as_rows")], own("rows"))
    yield node_field("Conv", [own("rows"), _PIXELS], own("row_numbers"), kernel_shape=[2], pads=[0, 1])
    yield node_field("Reshape", [own("row_numbers"), own("as_columns")], own("columns"))
    columns = [own("columns"), _PIXELS]
    yield node_field("Conv", columns, own("column_numbers"), kernel_shape=[2], dilations=[width], pads=[0, width])
    yield node_field("Reshape", [own("column_numbers"), own("as_numbers")], own("numbers"))
    yield node_field("MatMul", [f"{PREFIX}{conv.outputs[0]}_weights", own("numbers")], own("products"))
    yield node_field("Reshape", [own("products"), own("as_product_rows")], own("product_rows"))
    yield node_field("MatMul", [_PRODUCTS, own("product_rows")], own("pixel_rows"))
    yield node_field("Reshape", [own("pixel_rows"), own("as_product_columns")], own("product_columns"))
    yield node_field("MatMul", [_PRODUCTS, own("product_columns")], own("pixel_columns"))
    yield node_field("Reshape", [own("pixel_columns"), own("as_tiles")], own("new_tiles"))
    yield node_field("DepthToSpace", [own("new_tiles")], own("pixels"), blocksize=_TILE, mode="DCR")
    yield node_field("Slice", [own("pixels"), _ORIGIN, own("size"), _SIDES], own("strip"))


def constants() -> dict[str, NDArray[Any]]:
    """The constants of the new nodes."""
    pixels = np.zeros((6, _TILE, 2), np.float32)  # of a tile, and of the next one
    pixels[:, :, 0], pixels[:, :2, 1] = _INPUT[:, :_TILE], _INPUT[:, _TILE:]
    numbers = {_NINE: [-1, 9], _ORIGIN: [0, 0], _SIDES: [2, 3], _CHANNELS: [-1, 1, 1]}
    arrays = {_PIXELS: pixels, _KERNELS: np.kron(_KERNEL, _KERNEL).T.astype(np.float32), _PRODUCTS: _OUTPUT}
    return arrays | {name: np.array(value, np.int64) for name, value in numbers.items()}
