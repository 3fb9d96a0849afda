from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from tokenflow_sdk.errors import ArgumentError
from tokenflow_sdk.pictures.preparation import COLORS, PREPROCESS_MODES, Preparation

EVERY = [Preparation(*parts) for parts in product(PREPROCESS_MODES, COLORS, (False, True), (None, "0123456789abcdef"))]


def test_every_preparation_has_a_name_of_its_own_which_is_read_again() -> None:
    assert len({*map(str, EVERY)}) == len(EVERY) == 32
    assert [Preparation.parse(str(known)) for known in EVERY] == EVERY


@pytest.mark.parametrize(
    "text", ["", "crop", "srgb,crop", "crop,srgb,", "crop,srgb,slow", "crop,srgb,fast,0123", "crop,srgb\n"]
)
def test_other_texts_are_no_preparation(text: str) -> None:
    assert Preparation.parse(text) is None


@pytest.mark.parametrize(
    ("preprocess", "color", "words"),
    [
        ("stretch", "srgb", "no preprocessing 'stretch'.*crop, squash, pad, pad-grey"),
        (["crop"], "srgb", "no preprocessing"),
        (np.zeros(2), "srgb", "no preprocessing"),
        ("crop", "sRGB", "color='sRGB' is no way"),
        ("crop", np.zeros(2), "is no way to read colours"),
    ],
)
def test_what_there_is_not_is_named(preprocess: object, color: object, words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        Preparation(preprocess, color)  # type: ignore[arg-type]


@pytest.mark.parametrize("source", ["", "0123", "0123456789ABCDEF", 5, b"0123456789abcdef"])
def test_a_source_is_the_start_of_a_hash(source: object) -> None:
    with pytest.raises(ArgumentError, match="is no start of a hash"):
        Preparation("crop", "srgb", source=source)  # type: ignore[arg-type]
