"""The model that comes with the SDK: its size, where it comes from, and that it gives what it gave when it was made."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator

import numpy as np
import pytest

from tests.conftest import DATA, ROOT
from tokenflow_sdk import Codes, Generator, Tokenizer, Understander
from tokenflow_sdk.backends.onnxruntime import open_onnxruntime
from tokenflow_sdk.bundle.bundle import Bundle, find_bundle
from tokenflow_sdk.bundle.model_config import GeneratorConfig, UnderstanderConfig
from tokenflow_sdk.model.sampling import TIES
from tokenflow_sdk.parity.certificate import certify
from tokenflow_sdk.parity.tokenizer import check_tokenizer
from tokenflow_sdk.pictures.images import psnr

TINY = ROOT / "models" / "tiny"
PHOTO = ROOT / "examples" / "chelsea.jpg"
EXPECTED = np.load(DATA / "tiny_expected.npz")


@pytest.fixture(scope="module")
def tokenizer() -> Iterator[Tokenizer]:
    with Tokenizer.from_pretrained("tiny", device="cpu") as tokenizer:
        yield tokenizer


@pytest.fixture(scope="module")
def generator(tokenizer: Tokenizer) -> Iterator[Generator]:
    with Generator.from_pretrained("tiny", tokenizer=tokenizer, device="cpu") as generator:
        yield generator


@pytest.fixture(scope="module")
def understander(tokenizer: Tokenizer) -> Iterator[Understander]:
    with Understander.from_pretrained("tiny", tokenizer=tokenizer, device="cpu") as understander:
        yield understander


@pytest.fixture(scope="module")
def stored(tokenizer: Tokenizer) -> dict[str, Codes]:
    """Codes as they were when it was made, so that another processor's rounding changes no question."""
    return {name: tokenizer.codes(EXPECTED[name].astype(np.int32)) for name in ("chelsea", "red_apple_fast_7")}


def test_it_is_small_and_says_where_it_comes_from() -> None:
    assert sum(path.stat().st_size for path in TINY.rglob("*") if path.is_file()) <= 30e6
    assert "public-domain" in (TINY / "ATTRIBUTION.md").read_text() or "CC0-1.0" in (TINY / "ATTRIBUTION.md").read_text()
    figures = json.loads((TINY / "figures.json").read_text())
    assert figures["reconstruction"]["photos"] > figures["reconstruction"]["photos_thumbnail"]


def test_a_photo_has_the_codes_it_had(tokenizer: Tokenizer) -> None:
    codes = np.asarray(tokenizer.encode(PHOTO))
    np.testing.assert_array_equal(codes, EXPECTED["chelsea"])


def test_every_scale_makes_the_picture_better(tokenizer: Tokenizer) -> None:
    original = tokenizer.preprocess(PHOTO)
    codes = tokenizer.encode(PHOTO)
    found = [psnr(np.asarray(tokenizer.decode(codes.truncate(n))), original) for n in range(1, codes.n_scales + 1)]
    assert found == sorted(found)
    assert found[-1] > 22


def test_the_graphs_are_the_trained_model(tokenizer: Tokenizer) -> None:
    assert check_tokenizer(tokenizer.graphs).failures() == []


def test_the_same_prompt_and_seed_draw_the_same_picture(generator: Generator, tokenizer: Tokenizer) -> None:
    """To the code on one machine. Other processors round differently, and what differs once is drawn on: there the coarse
    scales are the same, and the picture is nearer than that of any other seed."""
    codes, again, other = (generator.generate("a red apple", seed=seed, preset="fast").codes[0] for seed in (7, 7, 8))
    assert codes == again
    expected = EXPECTED["red_apple_fast_7"]
    np.testing.assert_array_equal(codes.indices[:57], expected[:57])
    drawn, stored, different = tokenizer.decode_array(np.stack([codes.indices, expected, other.indices]).astype(np.int32))
    assert psnr(drawn, stored) > psnr(different, stored) + 3


@pytest.mark.parametrize("config", [GeneratorConfig, UnderstanderConfig])
def test_language_models_agree_with_their_reference(config: type[GeneratorConfig | UnderstanderConfig]) -> None:
    """The reference was computed with the exported operators, maybe on another processor: a number that the last bit of a sum
    tips to the next of 8 bits changes what comes after it."""
    bundle = Bundle.open(find_bundle("tiny", config.kind), config)
    found = certify(bundle, open_onnxruntime, "fp32", 64, 16)
    assert found.passed
    assert found.figures["hidden_cosine"] > 0.999


def test_seeds_draw_different_pictures(generator: Generator) -> None:
    drawn = generator.generate("a cat face", n=4, seed=0, preset="fast").codes
    assert len({tuple(np.asarray(codes).tolist()) for codes in drawn}) == 4


@pytest.mark.parametrize(
    ("picture", "question", "answer"),
    [
        ("red_apple_fast_7", "What is this?", "An apple."),
        ("red_apple_fast_7", "Which colours does it have?", "Red."),
        ("red_apple_fast_7", "How many apples are there?", "One."),
        ("red_apple_fast_7", "How old is it?", "The picture does not show that."),
        ("chelsea", "What style is it?", "A photograph."),
    ],
)
def test_questions_have_the_answers_they_had(
    understander: Understander, stored: dict[str, Codes], picture: str, question: str, answer: str
) -> None:
    assert understander.answer(stored[picture], question, max_tokens=24).text == answer


def test_what_is_drawn_is_recognised(generator: Generator, understander: Understander) -> None:
    """From the codes alone. Not all: some drawings are of nothing, and the seeds are none that were looked at."""
    things = ["banana", "cat", "rocket", "dog", "house", "star", "penguin", "pizza", "cactus", "elephant"]
    drawn = [
        generator.generate(f"a picture of a {thing}", seed=40 + i, preset="fast").codes[0] for i, thing in enumerate(things)
    ]
    answers = understander.answer_batch([(codes, "What is this?") for codes in drawn], max_tokens=24)
    right = [f"a {thing}." in answer.text.lower() for thing, answer in zip(things, answers, strict=True)]
    assert sum(right) >= 7, [answer.text for answer in answers]


def test_unknown_words_still_draw(generator: Generator) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = generator.generate("zyxw quaternion 中 🍎", seed=0, preset="fast")
    assert result.images[0].size == (256, 256)


@pytest.mark.parametrize(("value", "code"), [(0.0, 0), (np.nan, None)])
def test_its_sampling_graph_says_where_it_is_not_certain(generator: Generator, value: float, code: int | None) -> None:
    """Hidden states of zeros make all logits equal; greedy codes are then the first of all. The row beside it stays certain."""
    sample = generator._runner.model.sessions["sample"]
    hidden = np.stack([np.full((3, 256), value), np.random.default_rng(0).standard_normal((3, 256))]).astype(np.float32)
    feeds = {
        "conditional": hidden,
        "unconditional": hidden,
        "guidance": np.zeros(2, np.float32),
        "top_k": np.ones(2, np.int32),
        "top_p": np.zeros(2, np.float32),
        "noise": np.full((2, 3), 0.9, np.float32),
        "ranks": np.arange(1 + TIES, dtype=np.int32),
    }
    found = sample.run(feeds)
    assert found["certain"].tolist() == [0, 1]
    np.testing.assert_array_equal(found["code_indices"][1], found["logits"][1].argmax(axis=-1))
    if code is not None:
        assert set(found["code_indices"][0].tolist()) == {code}
