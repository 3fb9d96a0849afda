"""Matrices that resize along one axis as `torch.nn.functional.interpolate` does, in NumPy.

Both resizes of the quantizer (docs/model.md, section 2) are linear and separable, so one matrix per pair of sides suffices:
a map [source, source] becomes `m @ map @ m.T`, [target, target].
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["area_matrix", "bicubic_matrix"]


def area_matrix(source: int, target: int) -> NDArray[np.float64]:
    """Matrix of adaptive average pooling, `interpolate(mode="area")`.

    Args:
        source: cells before.
        target: cells after.

    Returns:
        float64 [target, source]. Cell i averages the source cells from floor(i source / target) up to, but not including,
        ceil((i + 1) source / target).

    Example:
        >>> area_matrix(4, 2)
        array([[0.5, 0.5, 0. , 0. ],
               [0. , 0. , 0.5, 0.5]])
    """
    matrix = np.zeros((target, source))
    for i in range(target):
        start, stop = i * source // target, -((i + 1) * source // -target)
        matrix[i, start:stop] = 1.0 / (stop - start)
    return matrix


def bicubic_matrix(source: int, target: int) -> NDArray[np.float64]:
    """Matrix of bicubic interpolation, `interpolate(mode="bicubic", align_corners=False)`.

    Cubic convolution with a = -0.75, no antialiasing, and samples beyond the edges clamped to them.

    Args:
        source: cells before.
        target: cells after.

    Returns:
        float64 [target, source]; every row sums to 1.
    """
    centre = (np.arange(target) + 0.5) * (source / target) - 0.5
    first = np.floor(centre).astype(np.int64) - 1
    matrix = np.zeros((target, source))
    for tap in range(4):
        weight = _cubic(np.abs(centre - (first + tap)))
        np.add.at(matrix, (np.arange(target), np.clip(first + tap, 0, source - 1)), weight)
    return matrix


def _cubic(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Keys' cubic convolution kernel at distance x >= 0, with a = -0.75 as in PyTorch."""
    a = -0.75
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))
