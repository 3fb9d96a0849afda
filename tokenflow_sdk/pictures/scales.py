"""`Scales`: where the codes of each scale are in the row of all codes of an image."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from tokenflow_sdk.arguments import instance, integer
from tokenflow_sdk.errors import ArgumentError

__all__ = ["Scales"]

D = TypeVar("D", bound=np.generic)


@dataclass(frozen=True)
class Scales:
    """The scales of an image's codes, which are stored in one row, coarse to fine. Scale i has `sides[i]` x `sides[i]` codes.

    Args:
        sides: side of each scale, coarse to fine; called `patch_nums` in the released code.

    Example:
        >>> scales = Scales((1, 2, 4))
        >>> scales.counts, scales.starts, scales.ends, scales.total
        ((1, 4, 16), (0, 1, 5), (1, 5, 21), 21)
    """

    sides: tuple[int, ...]

    def __post_init__(self) -> None:
        hint = "Give at least one side, coarse to fine, as (1, 2, 4)."
        sides = instance("sides", self.sides, (list, tuple), hint)
        if not sides:
            raise ArgumentError("There are no scales without sides.", hint)
        object.__setattr__(self, "sides", tuple(integer("sides", side, 1, None, "is no side.", hint) for side in sides))

    def __len__(self) -> int:
        return len(self.sides)

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """Number of codes of each scale."""
        return tuple(side * side for side in self.sides)

    @cached_property
    def ends(self) -> tuple[int, ...]:
        """End index of each scale in the row, exclusive: the possible lengths of a row of whole scales."""
        return tuple(accumulate(self.counts))

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """Start index of each scale in the row."""
        return (0, *self.ends[:-1])

    @property
    def total(self) -> int:
        """Number of codes of all scales, L."""
        return self.ends[-1]

    def split(self, row: NDArray[D], axis: int = -1) -> list[NDArray[D]]:
        """Split an array with the L codes along `axis` into one view for each scale.

        Where the array is shorter, the last view is cut short and those of absent scales are empty.
        """
        hint = f"Give an array with {self.total} codes along one of its axes."
        ndim = instance("row", row, np.ndarray, hint).ndim
        axis = integer("axis", axis, -ndim, ndim - 1, f"is no axis of an array of rank {ndim}.", hint)
        parts: list[NDArray[Any]] = np.split(row, self.ends[:-1], axis=axis)
        return parts
