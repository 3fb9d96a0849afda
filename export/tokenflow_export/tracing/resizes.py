"""The matrix that resizes a row-major map."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["map_matrix"]


def map_matrix(side: NDArray[np.float64]) -> NDArray[np.float32]:
    """The resize matrix of one side [t, s] -> that of a map, float32 [t * t, s * s]: its Kronecker product with itself."""
    rounded = side.astype(np.float32)
    return np.kron(rounded, rounded)
