from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from tests.pictures.test_color_profile import DISPLAY_P3, with_profile
from tests.support.fake_graphs import UNDERSTANDER
from tests.support.fakes import FakeSession, fake_bundle
from tokenflow_sdk import Tokenizer
from tokenflow_sdk.errors import ArgumentError, ArrayError, CodebookMismatchError, CorruptImageError, PreparationWarning
from tokenflow_sdk.pictures.preparation import Preparation, Preprocess
from tokenflow_sdk.understanding.image_features import ImageFeatures

CONFIG = replace(UNDERSTANDER, image_tokens=4, code_dim=40)


@pytest.fixture
def tokenizer() -> Tokenizer:
    return Tokenizer(fake_bundle(), open_session=FakeSession)


@pytest.fixture
def features(tokenizer: Tokenizer) -> ImageFeatures:
    return ImageFeatures(tokenizer, CONFIG)


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


def on_a_grey_square(picture: Image.Image, size: int) -> np.ndarray:
    """Oracle of the released preprocessing (docs/model.md, section 2)."""
    side = max(picture.size)
    square = Image.new("RGB", (side, side), (127, 127, 127))
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return np.asarray(square.resize((size, size), Image.Resampling.BICUBIC))


def test_pictures_are_prepared_as_the_model_was_trained_or_as_the_caller_says(tokenizer: Tokenizer) -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (31, 47, 3), np.uint8))
    ways = {
        "pad-grey": on_a_grey_square(picture, 8),
        "squash": np.asarray(picture.resize((8, 8), Image.Resampling.BICUBIC)),
        "crop": tokenizer.preprocess(picture),
    }
    digests = {way: ImageFeatures(tokenizer, CONFIG).of_all(pixels)[0].digest for way, pixels in ways.items()}
    assert len({*digests.values()}) == 3
    for trained in ("pad-grey", "squash", None):
        features = ImageFeatures(tokenizer, replace(CONFIG, preprocess=trained))
        assert features.of_all(picture)[0].digest == digests[trained or tokenizer.config.preprocess]
        for chosen, digest in digests.items():
            assert features.of_all([picture], chosen)[0].digest == digest  # type: ignore[arg-type]


def test_colours_are_those_that_the_caller_says(features: ImageFeatures, tokenizer: Tokenizer) -> None:
    wide = with_profile(Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)), DISPLAY_P3)
    by_default, srgb, stored = (features.of_all(wide, None, *color)[0].digest for color in ((), ("srgb",), ("as-stored",)))
    assert by_default == srgb != stored == features.of_all(np.asarray(wide))[0].digest


@pytest.mark.parametrize(("preprocess", "color"), [("stretch", "srgb"), (None, "rgb"), (5, "srgb")])
def test_ways_that_there_are_not_are_named(features: ImageFeatures, preprocess: object, color: object) -> None:
    with pytest.raises(ArgumentError, match="Choose one of"):
        features.of_all(np.zeros((4, 40)), preprocess, color)  # type: ignore[arg-type]


CROP, GREY = Preparation("crop", "srgb"), Preparation("pad-grey", "as-stored")


@pytest.mark.parametrize(
    ("trained", "chosen", "given", "warned"),
    [
        ("pad-grey", None, [[CROP]], True),
        ("pad-grey", None, [[GREY], [None], [GREY, CROP], [CROP]], True),
        ("pad-grey", None, [[GREY], [None]], False),
        ("pad-grey", "crop", [[CROP]], False),
        ("pad-grey", "crop", [[GREY]], True),
        (None, None, [[CROP], [GREY]], False),
        (None, "crop", [[GREY]], True),
    ],
)
def test_codes_that_were_prepared_otherwise_are_one_warning(
    trained: Preprocess | None,
    chosen: Preprocess | None,
    given: list[list[Preparation | None]],
    warned: bool,
    tokenizer: Tokenizer,
) -> None:
    features = ImageFeatures(tokenizer, replace(CONFIG, preprocess=trained))
    questions = [[tokenizer.codes(np.arange(5), known) for known in picture] for picture in given]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        features.warn_of_preparation([questions[0][0], *questions, "p.jpg", [None, b""]], chosen, 1)
    assert [warning.category for warning in caught] == [PreparationWarning] * warned


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
