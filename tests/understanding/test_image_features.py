from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from tests.support.fake_graphs import UNDERSTANDER
from tests.support.fakes import FakeSession, fake_bundle
from tokenflow_sdk import Tokenizer
from tokenflow_sdk.errors import ArgumentError, ArrayError, CodebookMismatchError, CorruptImageError
from tokenflow_sdk.understanding.image_features import ImageFeatures


@pytest.fixture
def tokenizer() -> Tokenizer:
    return Tokenizer(fake_bundle(), open_session=FakeSession)


@pytest.fixture
def features(tokenizer: Tokenizer) -> ImageFeatures:
    return ImageFeatures(tokenizer, replace(UNDERSTANDER, image_tokens=4, code_dim=40))


def encoded(tokenizer: Tokenizer) -> int:
    """Calls of the encoder so far."""
    session = tokenizer.graphs._sessions.get("encode")
    return len(session.calls) if isinstance(session, FakeSession) else 0


def test_the_same_picture_is_encoded_once(tokenizer: Tokenizer, features: ImageFeatures) -> None:
    grey, white = (Image.new("RGB", (8, 8), (level,) * 3) for level in (90, 255))
    blocks = features.of_all([grey, white, np.asarray(grey)])
    assert encoded(tokenizer) == 2
    assert blocks[0] is blocks[2]
    assert blocks[0].digest != blocks[1].digest
    assert len(blocks[0]) == 4


def test_codes_and_features_never_meet_the_encoder(tokenizer: Tokenizer, features: ImageFeatures) -> None:
    codes = tokenizer.codes(np.arange(5))
    (by_codes,) = features.of_all(codes)
    (by_features,) = features.of_all(tokenizer.features(codes).astype(np.float64))
    assert encoded(tokenizer) == 0
    assert by_codes.digest == by_features.digest
    assert by_features.features.dtype == np.float32


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_arrays_filled_again_change_nothing_that_was_asked(features: ImageFeatures, dtype: type) -> None:
    buffer = np.ones((4, 40), dtype)
    # Of the second, a view that cannot be written to itself.
    view = buffer.view()
    view.flags.writeable = False
    blocks = features.of_all([buffer, view])
    buffer[:] = 2
    assert all((block.features == 1).all() for block in blocks)
    assert blocks[0].digest == blocks[1].digest == features.of_all(np.ones((4, 40), dtype))[0].digest
    with pytest.raises(ValueError, match="read-only"):
        blocks[0].features[0] = 3


def test_no_features_of_a_block_can_be_written_to(tokenizer: Tokenizer, features: ImageFeatures) -> None:
    """Neither those of codes nor those that are kept for the next question about the same picture."""
    for block in features.of_all([tokenizer.codes(np.arange(5)), Image.new("RGB", (8, 8))]):
        assert not block.features.flags.writeable


def test_old_pictures_are_forgotten(tokenizer: Tokenizer, features: ImageFeatures, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokenflow_sdk.understanding.image_features._REMEMBERED", 2)
    pictures = [Image.new("RGB", (8, 8), (level,) * 3) for level in (0, 100, 200)]
    for picture in (*pictures[:2], pictures[0], pictures[2], pictures[0], pictures[1]):
        features.of_all(picture)
    assert encoded(tokenizer) == 4


@pytest.mark.parametrize(
    ("picture", "error", "words"),
    [
        (None, ArgumentError, "No image was given"),
        ((), ArgumentError, "No image was given"),
        ([None], ArgumentError, "No image was given"),
        (b"no picture", CorruptImageError, "picture"),
        (np.zeros((4, 39), np.float32), ArrayError, r"\[4, 40\], not \[4, 39\]"),
        (np.full((4, 40), np.inf, np.float16), ArrayError, "NaN or infinity"),
        (np.full((4, 40), 1e300), ArrayError, "NaN or infinity"),
    ],
)
def test_what_is_no_picture_is_named(features: ImageFeatures, picture: object, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        features.of_all(picture)  # type: ignore[arg-type]


def test_codes_of_another_tokenizer_are_refused(tokenizer: Tokenizer, features: ImageFeatures) -> None:
    foreign = replace(tokenizer.codes(np.arange(5)), codebook_id="cd" * 8)
    with pytest.raises(CodebookMismatchError, match="These codes were made by"):
        features.of_all(foreign)
