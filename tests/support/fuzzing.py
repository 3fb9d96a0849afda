"""How often tests of random inputs run, and values that nobody expects as arguments."""

from __future__ import annotations

import io
import itertools
import os
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

LONGER = settings().max_examples // 100
"""1 in the everyday suite; more in the profile `fuzz`."""


def examples(everyday: int) -> settings:
    """So many examples in the everyday suite, always the same ones; more, and new ones each time, in the profile `fuzz`."""
    return settings(
        max_examples=everyday * LONGER,
        derandomize=LONGER == 1,
        deadline=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )


class HostileError(Exception):
    """What objects of the caller raise. It passes through unchanged, unless an error of the SDK says the same."""


_ERRORS = [
    HostileError,
    *(type(f"Hostile{kind.__name__}", (HostileError, kind), {}) for kind in (TypeError, ValueError, OSError, LookupError)),
]
_SPECIAL_METHODS = (
    *("__repr__", "__str__", "__index__", "__int__", "__float__", "__len__", "__iter__", "__getitem__", "__array__", "__eq__"),
    *("__hash__", "__bool__", "__fspath__", "__getattr__", "__contains__", "__format__", "__getattribute__", "__lt__", "read"),
)
_LIES: dict[str, Any] = {
    "__index__": "one",
    "__len__": -1,
    "__iter__": 3,
    "__array__": "array",
    "__fspath__": 7,
    "__float__": None,
    "__bool__": 2,
    "read": "text",
    "seek": None,
    "__array_interface__": {},
}


def hostile(base: type, method: str, error: type[Exception]) -> object:
    """An object, or a str, int, list or dict, one of whose special methods raises."""

    def fail(*_: object, **__: object) -> None:
        raise error(method)

    return type("Hostile", (base,), {"__hash__": base.__hash__, method: fail})()


def liar(method: str) -> object:
    """An object one of whose special methods gives what it must not."""
    return type("Liar", (), {method: lambda *_: _LIES[method]})()


def _closed(thing: Any) -> Any:
    thing.close()
    return thing


_THINGS: tuple[Callable[[], object], ...] = (
    *(lambda value=value: value for value in (object(), object, len, ..., NotImplemented, range(3), range(10**9))),
    *(
        lambda value=value: value
        for value in (Decimal("NaN"), Decimal(3), Fraction(1, 3), 1j, 10**30, -(10**30), 2**63, 10**400)
    ),
    *(
        lambda: iter([1, 2]),
        lambda: (i for i in "ab"),
        dict,
        set,
        lambda: {"a": 1},
        lambda: {1, 2},
        bytearray,
        lambda: memoryview(b""),
    ),
    *(lambda: memoryview(np.zeros((2, 3, 4), np.float32)), lambda: io.BytesIO(b"GIF89a"), lambda: io.StringIO("text")),
    *(
        lambda: _closed(io.BytesIO(b"x")),
        lambda: _closed(io.FileIO(os.devnull)),
        MagicMock,
        lambda: itertools.repeat(1, 3),
    ),
    *(lambda: _closed(Image.new("RGB", (4, 4))), lambda: np.array([object(), None]), lambda: np.array(["a", "bc"])),
    *(
        lambda: np.zeros(3, [("a", "i4"), ("b", "u1")]),
        lambda: np.ma.masked_array([1, 2], [True, False]),
        lambda: np.datetime64("now"),
    ),
    *(
        lambda: np.broadcast_to(np.uint8(0), (2**20, 2**20, 3)),
        lambda: np.matrix([[1, 2]]),
        lambda: np.str_("a"),
        lambda: np.bool_(1),
    ),
)
MODES = (
    "1",
    "L",
    "LA",
    "La",
    "P",
    "PA",
    "RGB",
    "RGBA",
    "RGBa",
    "RGBX",
    "CMYK",
    "YCbCr",
    "LAB",
    "HSV",
    "I",
    "F",
    "I;16",
    "I;16B",
)
# Texts are names of files too: no part of a random one may lead out of the test's directory.
texts = st.text(max_size=12).map(lambda text: text.replace("/", "").replace("~", "").lstrip("."))
paths = st.sampled_from(
    [
        "",
        ".",
        "..",
        "/",
        "/dev/null",
        "/proc/self",
        "x\0y",
        "\udcff",
        "n" * 300,
        "日" * 120,
        "no/such/place",
        "/proc/1/mem",
        "a/b",
    ]
)
numbers = st.one_of(st.integers(-3, 70), st.integers(), st.floats(), st.booleans(), st.floats(0, 1))
numpy_numbers = hnp.scalar_dtypes().flatmap(lambda dtype: hnp.from_dtype(dtype))
shapes = hnp.array_shapes(min_dims=0, max_dims=5, min_side=0, max_side=4)
arrays = st.one_of(
    hnp.arrays(hnp.scalar_dtypes(), shapes),
    hnp.arrays(st.sampled_from([np.uint8, np.int32, np.float32]), shapes),
    hnp.arrays(np.uint8, hnp.array_shapes(min_dims=2, max_dims=4, min_side=1, max_side=6)).map(lambda a: a.T[::-1]),
)
pictures = st.builds(Image.new, st.sampled_from(MODES), st.tuples(st.integers(0, 9), st.integers(0, 9)))
objects = st.one_of(
    st.builds(
        hostile,
        st.sampled_from([object, object, str, int, list, dict]),
        st.sampled_from(_SPECIAL_METHODS),
        st.sampled_from(_ERRORS),
    ),
    st.builds(liar, st.sampled_from(sorted(_LIES))),
    st.sampled_from(_THINGS).map(lambda make: make()),
)
scalars = st.one_of(
    st.none(), numbers, texts, paths, paths.map(Path), st.binary(max_size=40), numpy_numbers, arrays, pictures, objects
)
anything = st.one_of(
    scalars,
    st.lists(scalars, max_size=3),
    st.lists(scalars, max_size=3).map(tuple),
    st.dictionaries(st.one_of(texts, numbers), scalars, max_size=2),
)
