import numpy as np
import pytest

from recipes.tiny.captions import ADJECTIVES, HELD_OUT, STYLES, TEMPLATES, caption, held_out_caption, with_article
from recipes.tiny.icons import title


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        ("red apple", "a red apple"),
        ("apple", "an apple"),
        ("hourglass", "an hourglass"),
        ("unicorn", "a unicorn"),
        ("x ray", "an x ray"),
        ("grapes", "grapes"),
        ("bus", "a bus"),
        ("chair", "a chair"),
        ("face with rolling eyes", "a face with rolling eyes"),
        ("women holding hands", "women holding hands"),
    ],
)
def test_articles(label: str, expected: str) -> None:
    assert with_article(label) == expected


def test_captions_reword_adjectives_and_name_styles() -> None:
    rng = np.random.default_rng(0)
    captions = {caption("red apple", "3d", rng) for _ in range(500)}
    assert {"red apple", "a red apple", "a picture of a red apple", "an apple that is red", "3d red apple"} <= captions
    assert "red apple in 3d style" in captions
    assert "glasses that are red" in {caption("red glasses", "flat", rng) for _ in range(500)}
    assert ADJECTIVES.fullmatch("red")


def test_evaluation_uses_wordings_that_training_never_saw() -> None:
    assert not set(TEMPLATES) & set(HELD_OUT)
    rng = np.random.default_rng(0)
    for style in STYLES:
        seen = {caption("red apple", style, rng) for _ in range(500)}
        assert not seen & {held_out_caption("red apple", style, rng) for _ in range(100)}
    assert held_out_caption("red apple", None, rng).endswith("a red apple")


@pytest.mark.parametrize(
    ("stem", "expected"),
    [
        ("light_bulb_karl_bartel_01", "light bulb"),
        ("red_car_02", "red car"),
        ("grapes_simple", "grapes"),
        ("grapes_simple_bw", None),
        ("fiore_01", None),
    ],
)
def test_clip_art_is_titled_by_its_file_name(stem: str, expected: str | None) -> None:
    assert title(stem, {"light bulb", "car", "grapes"}) == expected
