from __future__ import annotations

import numpy as np
import pytest

from tokenflow_export.tracing.resizes import map_matrix
from tokenflow_sdk.pictures.resize import area_matrix, bicubic_matrix


@pytest.mark.parametrize(("source", "target"), [(1, 3), (5, 2), (4, 4), (3, 7)])
@pytest.mark.parametrize("make", [area_matrix, bicubic_matrix])
def test_one_product_resizes_a_map_that_lies_row_by_row(make, source: int, target: int) -> None:
    side, x = make(source, target), np.random.default_rng(0).standard_normal((source, source))
    matrix = map_matrix(side)
    assert (matrix.dtype, matrix.shape) == (np.float32, (target**2, source**2))
    np.testing.assert_allclose((matrix @ x.ravel()).reshape(target, target), side @ x @ side.T, atol=1e-5)


def test_the_sides_are_rounded_first() -> None:
    """So that the graph's constants are products of numbers that are exact in float32."""
    side = np.asarray([[1 / 3, 0.1]])
    a, b = np.float32(1 / 3), np.float32(0.1)
    assert map_matrix(side).tolist() == [[a * a, a * b, b * a, b * b]]
