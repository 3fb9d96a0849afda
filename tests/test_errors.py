from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable

import pytest

from tokenflow_sdk import errors


def test_all_names_every_error() -> None:
    defined = {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Exception)}
    assert set(errors.__all__) == defined


ERRORS = [name for name in errors.__all__ if not name.endswith("Warning")]


def test_the_tree_in_the_docstring_is_the_tree() -> None:
    """Depth in the drawing is distance from TokenFlowError, and each line hangs under its base."""
    stack: list[type] = []
    drawn = set()
    for line in (errors.__doc__ or "").splitlines():
        found = re.match(r"    ([│ ├└─]*)(\w+Error|PagesExhausted)\b", line)
        if not found:
            continue
        depth, error = len(found[1]) // 4, getattr(errors, found[2])
        stack[depth:] = [error]
        drawn.add(found[2])
        assert len(stack) == depth + 1
        if depth:
            assert stack[depth - 1] in error.__bases__
    assert drawn == set(ERRORS)
    warned = re.findall(r"[├└]── (\w+Warning)\b", errors.__doc__ or "")
    assert warned == [name for name in errors.__all__ if name not in ERRORS]
    assert all(getattr(errors, name).__bases__ == (UserWarning,) for name in warned)


@pytest.mark.parametrize("name", sorted({*ERRORS} - {"PagesExhausted"}))
def test_every_error_says_what_and_what_to_do(name: str) -> None:
    error = getattr(errors, name)("It broke.", "Mend it.")
    assert str(error) == "It broke. Mend it."
    assert (error.message, error.hint) == ("It broke.", "Mend it.")
    with pytest.raises(TypeError):
        getattr(errors, name)("It broke.")


def test_exhausted_pages_say_how_many_would_do() -> None:
    error = errors.PagesExhausted(12, 5, 40)
    assert "12 key/value pages are needed, 5 of 40 are free" in str(error)
    assert "pages=47" in str(error)
    assert (error.needed, error.free, error.total) == (12, 5, 40)


class Refusal(errors.ImageError):
    """An application's own, with other arguments."""

    def __init__(self, path: str, *, code: int) -> None:
        super().__init__(f"{path} is refused.", "Take another.")
        self.code = code


COPIES = [lambda error: pickle.loads(pickle.dumps(error)), copy.copy, copy.deepcopy]  # noqa: S301 - across process pools
MADE = [errors.PagesExhausted(12, 5, 40), Refusal("a.png", code=7)] + [
    kind("It broke.", "Mend it.")
    for name in sorted(set(errors.__all__) - {"PagesExhausted"})
    if issubclass(kind := getattr(errors, name), errors.TokenFlowError)
]


@pytest.mark.parametrize("duplicate", COPIES)
@pytest.mark.parametrize("error", MADE, ids=lambda error: type(error).__name__)
def test_copies_are_equal(error: errors.TokenFlowError, duplicate: Callable[[Exception], Exception]) -> None:
    error.__dict__["note"] = ["added by the application"]
    found = duplicate(error)
    assert type(found) is type(error)
    assert (str(found), repr(found), found.args, vars(found)) == (str(error), repr(error), error.args, vars(error))
    assert found.args == (error.message, error.hint)


def test_a_message_is_no_error_number() -> None:
    """OSError takes two arguments for a number and its text."""
    for error in (error for error in MADE if isinstance(error, OSError)):
        assert (error.errno, error.strerror, error.filename) == (None, None, None)
