"""Codes in the vocabulary of a language model: ids of codes, and of the tokens around and between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tokenflow_sdk.arguments import integer, integer_row
from tokenflow_sdk.errors import ArgumentError, CodesRangeError
from tokenflow_sdk.pictures.scales import Scales

__all__ = ["CodesConfig", "Vocabulary"]

_MOST = 2**62


@runtime_checkable
class CodesConfig(Protocol):
    """What codes say of their tokenizer, as `Tokenizer.config` has it."""

    @property
    def variant(self) -> str: ...
    @property
    def codebook_sha256(self) -> str: ...
    @property
    def codebook_size(self) -> int: ...
    @property
    def patch_nums(self) -> tuple[int, ...]: ...


@dataclass(frozen=True)
class Vocabulary:
    """Ids of codes and of the tokens that stand with them: `offset + k` is code k; None: there is no such token.

    Raises:
        ArgumentError: an id is negative, stands for a code, or stands for two tokens.
    """

    codebook_size: int
    offset: int
    image_start: int | None = None
    image_end: int | None = None
    scale_end: int | None = None

    def __post_init__(self) -> None:
        hint = "Give the ids of your vocabulary, from 0 on."
        object.__setattr__(self, "offset", integer("offset", self.offset, 0, _MOST, "is no id.", hint))
        end, taken = self.offset + self.codebook_size, dict[int, str]()
        for name in ("image_start", "image_end", "scale_end"):
            value = getattr(self, name)
            if value is None:
                continue
            value = integer(name, value, 0, _MOST, "is no id.", hint)
            if self.offset <= value < end:
                raise ArgumentError(f"{name}={value} is the id of a code.", f"Codes are {self.offset} .. {end - 1}.")
            if value in taken:
                raise ArgumentError(f"{name}={value} is {taken[value]} too.", "Give each token an id of its own.")
            taken[value] = name
            object.__setattr__(self, name, value)

    def write(self, indices: NDArray[np.int32], scales: Scales) -> NDArray[np.int64]:
        """The ids int64 [n] of code indices of some whole scales."""
        ids, is_code, _ = self._layout(scales, scales.ends.index(len(indices)) + 1)
        ids[is_code] = indices.astype(np.int64) + self.offset
        return ids

    def read(self, ids: ArrayLike, scales: Scales) -> NDArray[np.int32]:
        """The code indices int32 [l], l whole scales, of ids.

        Raises:
            ArrayError: the ids are no 1-D integer array.
            CodesRangeError: they are not as `write` gives them.
        """
        hint = "Give the ids of one picture, from its first token to its last."
        given = integer_row("Ids", ids, hint)
        layouts = [self._layout(scales, n) for n in range(1, len(scales) + 1)]
        fitting = [layout for layout in layouts if len(layout[0]) == len(given)]
        if not fitting:
            lengths = ", ".join(str(len(layout[0])) for layout in layouts)
            raise CodesRangeError(f"{len(given)} ids are no whole number of scales.", f"Valid lengths are {lengths}. {hint}")
        wanted, is_code, names = fitting[0]
        for at in np.flatnonzero(~is_code & (given != wanted)).tolist():
            raise CodesRangeError(f"Id {given[at]} at {at} stands in the place of {names[at]}={wanted[at]}.", hint)
        codes, at_codes = given[is_code], np.flatnonzero(is_code)
        for at in np.flatnonzero((codes < self.offset) | (codes >= self.offset + self.codebook_size)):
            end = self.offset + self.codebook_size - 1
            raise CodesRangeError(
                f"Id {codes[at]} at {at_codes[at]} is no code with offset={self.offset}.", f"Codes are {self.offset} .. {end}."
            )
        return (codes.astype(np.int64) - self.offset).astype(np.int32)

    def _layout(self, scales: Scales, n: int) -> tuple[NDArray[np.int64], NDArray[np.bool_], dict[int, str]]:
        """Ids of `n` scales, 0 for codes; where codes stand; and the names of the other tokens by their places."""
        parts: list[tuple[str, int | None, int]] = [("image_start", self.image_start, 1)]
        for count in scales.counts[:n]:
            parts += [("", 0, count), ("scale_end", self.scale_end, 1)]
        parts.append(("image_end", self.image_end, 1))
        ids, is_code, names = list[int](), list[bool](), dict[int, str]()
        for name, value, count in parts:
            if value is not None:
                names[len(ids)] = name
                ids += [value] * count
                is_code += [not name] * count
        return np.array(ids, np.int64), np.array(is_code), names
