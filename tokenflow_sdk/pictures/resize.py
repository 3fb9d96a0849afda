"""Resizes of fixed size as constant matrices, in NumPy; what `torch.nn.functional.interpolate` computes along one side.

Both resizes of the released system (docs/model.md, section 2) are linear and separable, so a matrix for one side says it all:
a map [s, s] becomes `m @ map @ m.T`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["area_matrix", "bicubic_matrix"]


def area_matrix(source: int, target: int) -> NDArray[np.float64]:
    """[target, source]: adaptive average pooling (`mode="area"`); cell i averages floor(i s/t) .. ceil((i + 1) s/t)."""
    matrix = np.zeros((target, source))
    for i in range(target):
        start, stop = i * source // target, -((i + 1) * source // -target)
        matrix[i, start:stop] = 1.0 / (stop - start)
    return matrix


def bicubic_matrix(source: int, target: int) -> NDArray[np.float64]:
    """[target, source]: bicubic (a = -0.75), align_corners off, no antialias, edges clamped (`mode="bicubic"`)."""
    centre = (np.arange(target) + 0.5) * (source / target) - 0.5
    first = np.floor(centre).astype(np.int64) - 1
    matrix = np.zeros((target, source))
    for tap in range(4):
        weight = _cubic(np.abs(centre - (first + tap)))
        np.add.at(matrix, (np.arange(target), np.clip(first + tap, 0, source - 1)), weight)
    return matrix


def _cubic(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Keys' convolution kernel at distance x, with a = -0.75 as in PyTorch."""
    a = -0.75
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))
