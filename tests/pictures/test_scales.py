from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenflow_sdk.pictures.scales import Scales

SIDES = st.lists(st.integers(1, 9), min_size=1, max_size=6).map(tuple)


def places(sides: tuple[int, ...]) -> list[list[int]]:
    """Each code of a row counted off, scale by scale."""
    found: list[list[int]] = []
    place = 0
    for side in sides:
        found.append([])
        for _ in range(side):
            for _ in range(side):
                found[-1].append(place)
                place += 1
    return found


def test_a_worked_example() -> None:
    scales = Scales((1, 2, 4))
    assert len(scales) == 3
    assert (scales.counts, scales.starts, scales.ends, scales.total) == ((1, 4, 16), (0, 1, 5), (1, 5, 21), 21)


@given(SIDES)
def test_figures_are_those_of_codes_counted_one_by_one(sides: tuple[int, ...]) -> None:
    scales, counted = Scales(sides), places(sides)
    assert len(scales) == len(counted)
    assert scales.counts == tuple(map(len, counted))
    assert scales.starts == tuple(scale[0] for scale in counted)
    assert scales.ends == tuple(scale[-1] + 1 for scale in counted)
    assert scales.total == sum(map(len, counted))


@given(SIDES)
def test_a_row_is_split_into_its_scales(sides: tuple[int, ...]) -> None:
    scales, counted = Scales(sides), places(sides)
    row = np.arange(scales.total, dtype=np.int32)
    parts = scales.split(row)
    assert [part.tolist() for part in parts] == counted
    assert all(part.dtype == np.int32 and np.shares_memory(part, row) for part in parts)


@pytest.mark.parametrize("axis", [0, 1, -1, 2])
def test_any_axis_can_hold_the_codes(axis: int) -> None:
    scales = Scales((1, 3))
    shape = [2, 2, 2]
    shape[axis] = 10
    array = np.arange(40).reshape(shape)
    parts = scales.split(array, axis=axis)
    assert [part.shape[axis] for part in parts] == [1, 9]
    np.testing.assert_array_equal(np.concatenate(parts, axis=axis), array)


def test_scales_of_the_same_sides_are_equal() -> None:
    assert Scales((1, 2)) == Scales((1, 2)) != Scales((1, 3))
    assert len({Scales((1, 2)), Scales((1, 2)), Scales((2, 1))}) == 2
