"""The scales of a picture's codes, coarse to fine: how many codes each has, and where in the row they stand."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

__all__ = ["Scales"]

D = TypeVar("D", bound=np.generic)


@dataclass(frozen=True)
class Scales:
    """Scale i is a map of `sides[i]` x `sides[i]` codes; the codes of all scales stand in one row, coarse to fine.

    Args:
        sides: the released name of these numbers is `patch_nums`.
    """

    sides: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.sides)

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """Codes of each scale."""
        return tuple(side * side for side in self.sides)

    @cached_property
    def ends(self) -> tuple[int, ...]:
        """Codes up to the end of each scale: the lengths that a row of whole scales can have."""
        return tuple(accumulate(self.counts))

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """Codes before each scale."""
        return (0, *self.ends[:-1])

    @property
    def total(self) -> int:
        """Codes of all scales."""
        return self.ends[-1]

    def split(self, row: NDArray[D], axis: int = -1) -> list[NDArray[D]]:
        """The scales of an array that has all codes along `axis`, as views."""
        parts: list[NDArray[Any]] = np.split(row, self.ends[:-1], axis=axis)
        return parts
