"""The resize of a row-major map as one matrix: the product of its sides' matrices."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["map_matrix"]


def map_matrix(side: NDArray[np.float64]) -> NDArray[np.float32]:
    """side [target, source] -> float32 [target^2, source^2], the Kronecker product of the rounded side with itself."""
    rounded = side.astype(np.float32)
    return np.kron(rounded, rounded)
