"""Reads arguments that users give: numbers of Python's types, NumPy's and others alike, flags, paths, and objects of a type."""

from __future__ import annotations

import io
import math
import operator
import os
import threading
from collections.abc import Iterable, Iterator
from numbers import Real
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tokenflow_sdk.errors import ArgumentError, ArrayError

__all__ = ["file_path", "flag", "instance", "integer", "integer_row", "items", "real", "seconds", "shown"]

T = TypeVar("T")


def shown(value: object) -> str:
    """A value in an error's message."""
    try:
        return repr(value)
    except ValueError:  # Python writes no integer of more than 4300 digits
        return f"<{type(value).__name__}>"


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
        raise ArgumentError(f"{name}={shown(value)} {problem}", hint)
    return found


def integer_row(what: str, values: ArrayLike, hint: str) -> NDArray[np.integer[Any]]:
    """An argument that must be a row of integers, as a 1-D array of any integer type.

    Args:
        what: the values are; begins the error's message.
        values: what was given.
        hint: of the error.

    Raises:
        ArrayError: they are none.
    """
    try:
        array = np.asarray(values)
    except (TypeError, ValueError) as error:
        raise ArrayError(f"{what} cannot become an array: {error}.", hint) from error
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ArrayError(f"{what} must be a 1-D integer array, not {array.dtype}{list(array.shape)}.", hint)
    return array


def real(name: str, value: object, least: float, most: float, problem: str, hint: str) -> float:
    """An argument that must be a real number. Arguments and errors as in `integer`; NaN is out of any range."""
    try:
        found = math.nan if isinstance(value, (bool, np.timedelta64)) or not isinstance(value, Real) else float(value)
    except OverflowError:
        found = math.inf
    if not least <= found <= most:
        raise ArgumentError(f"{name}={shown(value)} {problem}", hint)
    return found


def seconds(name: str, value: object) -> float | None:
    """An argument that must be a number of seconds to wait for, or None: without end.

    Raises:
        ArgumentError: it is neither, or negative.
    """
    if value is None:
        return None
    found = real(name, value, 0, math.inf, "is no time to wait.", "Give seconds, or None to wait without end.")
    return min(found, threading.TIMEOUT_MAX)


def flag(name: str, value: object) -> bool:
    """An argument that must be True or False, of Python or NumPy.

    Raises:
        ArgumentError: it is something else.
    """
    if not isinstance(value, (bool, np.bool_)):
        raise ArgumentError(f"{name}={shown(value)} is neither True nor False.", "Give one of them.")
    return bool(value)


def instance(name: str, value: object, kind: type[T] | tuple[type[T], ...], hint: str) -> T:
    """An argument that must be an object of a type, or of one of several.

    Raises:
        ArgumentError: it is of another; `hint` is the error's.
    """
    if not isinstance(value, kind):
        raise ArgumentError(f"{name} cannot be of type {type(value).__name__}.", hint)
    return value


def items(name: str, value: Iterable[T], hint: str) -> Iterator[T]:
    """The items of an argument that must be iterable.

    Raises:
        ArgumentError: it is not, or is a file, which is one thing; `hint` is the error's.
    """
    given: object = value
    try:
        found = None if isinstance(given, io.IOBase) else iter(value)
    except (TypeError, NotImplementedError):  # the latter by memoryviews of several dimensions
        found = None
    if found is None:
        raise ArgumentError(f"{name} cannot be of type {type(value).__name__}.", hint)
    return found


def file_path(name: str, value: object) -> str:
    """An argument that must be a path in text.

    Raises:
        ArgumentError: it is not.
    """
    try:
        text = os.fspath(value)  # type: ignore[call-overload]
    except TypeError:
        text = None
    if not isinstance(text, str):
        raise ArgumentError(f"{name} cannot be of type {type(value).__name__}.", "Give a string or a pathlib.Path.")
    return text
