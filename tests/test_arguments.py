from __future__ import annotations

import io
import threading
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from tokenflow_sdk.arguments import file_path, flag, instance, integer, items, real, seconds, shown
from tokenflow_sdk.errors import ArgumentError


@pytest.mark.parametrize("value", [2, np.int64(2), np.uint8(2), np.array(2)])
def test_integers_of_any_type_are_read(value: object) -> None:
    found = integer("n", value, 1, 2, "asks for nothing.", "Give 1 or 2.")
    assert (found, type(found)) == (2, int)


@pytest.mark.parametrize("value", [True, np.True_, 2.0, "2", None, [2], np.array([2, 3]), 0, 3, -(10**30)])
def test_what_is_no_integer_in_the_range_is_named(value: object) -> None:
    with pytest.raises(ArgumentError, match=r"n=.* asks for nothing\. Give 1 or 2\."):
        integer("n", value, 1, 2, "asks for nothing.", "Give 1 or 2.")


def test_integers_may_have_no_largest_value() -> None:
    assert integer("n", 10**30, 1, None, "", "") == 10**30


@pytest.mark.parametrize("value", [1, 1.0, np.float32(1), np.float16(1), np.int32(1), Fraction(1)])
def test_real_numbers_of_any_type_are_read(value: object) -> None:
    found = real("p", value, 0, 1, "is no share.", "Give 0 to 1.")
    assert (found, type(found)) == (1.0, float)


@pytest.mark.parametrize(
    "value",
    [True, np.True_, "1", b"1", None, 1j, [1.0], np.ones(1), np.timedelta64("NaT"), float("nan"), np.inf, -0.1, 10**400],
)
def test_what_is_no_real_number_in_the_range_is_named(value: object) -> None:
    with pytest.raises(ArgumentError, match=r"p=.* is no share\. Give 0 to 1\."):
        real("p", value, 0, 1, "is no share.", "Give 0 to 1.")


def test_any_value_can_be_shown() -> None:
    assert shown("a") == "'a'"
    assert shown(10**5000) == "<int>"
    with pytest.raises(ArgumentError, match="n=<int> is too much"):
        integer("n", 10**5000, 0, 9, "is too much.", "Give less.")


def test_other_arguments() -> None:
    closed = io.BytesIO()
    closed.close()
    assert [flag("f", value) for value in (True, np.False_)] == [True, False]
    assert [seconds("timeout", value) for value in (None, 1, np.inf)] == [None, 1.0, threading.TIMEOUT_MAX]
    assert [file_path("path", value) for value in ("a", Path("b"))] == ["a", "b"]
    assert list(items("names", (n for n in "ab"), "Give a list.")) == ["a", "b"]
    assert instance("n", 3, (int, str), "Give one.") == 3
    for read, values in (
        (lambda value: flag("it", value), (1, "no", None, np.ones(2))),
        (lambda value: seconds("it", value), (-1, "1", float("nan"), True)),
        (lambda value: file_path("it", value), (b"a", None, 3, [Path("a")])),
        (lambda value: items("it", value, "Give a list."), (3, None, closed, memoryview(np.ones((2, 3))))),
        (lambda value: instance("it", value, int, "Give one."), ("3", None)),
    ):
        for value in values:
            with pytest.raises(ArgumentError, match="it"):
                read(value)  # type: ignore[no-untyped-call]
