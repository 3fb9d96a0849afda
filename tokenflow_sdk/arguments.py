"""Reads numbers that users give: of Python's types, NumPy's and others alike, never of a bool or a string."""

from __future__ import annotations

import math
import operator
from numbers import Real

from tokenflow_sdk.errors import ArgumentError

__all__ = ["integer", "real"]


def integer(name: str, value: object, least: int, most: int | None, problem: str, hint: str) -> int:
    """An argument that must be an integer.

    Args:
        name: of the argument.
        value: what was given.
        least, most: smallest and largest value; None: there is no largest.
        problem: what is wrong with other values; follows `name=value` in the error's message.
        hint: of the error.

    Raises:
        ArgumentError: it is no integer, or out of range.
    """
    try:
        found = None if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        found = None
    if found is None or found < least or (most is not None and found > most):
        raise ArgumentError(f"{name}={value!r} {problem}", hint)
    return found


def real(name: str, value: object, least: float, most: float, problem: str, hint: str) -> float:
    """An argument that must be a real number. Arguments and errors as in `integer`; NaN is out of any range."""
    try:
        found = math.nan if isinstance(value, bool) or not isinstance(value, Real) else float(value)
    except OverflowError:
        found = math.inf
    if not least <= found <= most:
        raise ArgumentError(f"{name}={value!r} {problem}", hint)
    return found
