from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenflow_sdk.pictures.resize import area_matrix, bicubic_matrix

sides = st.integers(1, 40)


@given(sides, sides, st.sampled_from(["area", "bicubic"]))
@settings(deadline=None)
def test_matrices_are_what_torch_interpolates(source: int, target: int, mode: str) -> None:
    x = torch.randn(1, 2, source, source, dtype=torch.float64, generator=torch.Generator().manual_seed(source))
    options = {} if mode == "area" else {"align_corners": False}
    expected = torch.nn.functional.interpolate(x, size=(target, target), mode=mode, **options).numpy()
    matrix = (area_matrix if mode == "area" else bicubic_matrix)(source, target)
    assert np.abs(matrix @ x.numpy() @ matrix.T - expected).max() < 1e-9


@pytest.mark.parametrize("matrix", [area_matrix, bicubic_matrix])
def test_same_size_is_the_identity_and_rows_sum_to_one(matrix) -> None:
    assert np.array_equal(matrix(7, 7), np.eye(7))
    assert np.allclose(matrix(27, 10).sum(axis=1), 1)
