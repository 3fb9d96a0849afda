"""What the understander is taught: names, colours, pictures of several things, questions and their only right answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recipes.tiny.colours import COLOURS, colours
from recipes.tiny.data import SIDE
from recipes.tiny.questions import KINDS, UNKNOWN, checks, conversation, question
from recipes.tiny.scenes import changed, composed
from recipes.tiny.subjects import PHOTO, Names, Subject, amount, plural

APPLES = Subject((("apple", 3),), ("red", "green"), "3d")
BEACH = Subject((("beach", 1),), ("blue",), PHOTO)


def disc(colour: tuple[int, int, int], side: int = SIDE) -> np.ndarray:
    """A disc on white."""
    y, x = np.mgrid[:side, :side] / side - 0.5
    return np.where((x * x + y * y < 0.12)[..., None], np.uint8(colour), np.uint8(255)).astype(np.uint8)


@pytest.mark.parametrize(
    ("colour", "name"),
    [
        ((200, 30, 40), "red"), ((250, 130, 20), "orange"), ((250, 210, 40), "yellow"), ((40, 160, 60), "green"),
        ((40, 90, 200), "blue"), ((130, 60, 190), "purple"), ((245, 120, 180), "pink"), ((120, 70, 40), "brown"),
        ((20, 20, 24), "black"), ((140, 140, 145), "grey"), ((238, 238, 240), "white"),
    ],
)  # fmt: skip
def test_the_thing_is_named_and_not_its_white_background(colour: tuple[int, int, int], name: str) -> None:
    assert colours(disc(colour)) == (name,)
    assert name in COLOURS


def test_the_larger_share_comes_first() -> None:
    picture = disc((200, 30, 40))
    picture[: SIDE * 2 // 5][picture[: SIDE * 2 // 5].min(axis=2) < 255] = (40, 160, 60)
    assert colours(picture) == ("red", "green")
    assert colours(np.full((SIDE, SIDE, 3), 255, np.uint8)) == ("white",)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("apple", "apples"), ("fox", "foxes"), ("cherry", "cherries"), ("key", "keys"), ("mouse", "mice"),
        ("computer mouse", "computer mice"), ("scissors", "scissors"), ("tomato", "tomatoes"), ("avocado", "avocados"),
    ],
)  # fmt: skip
def test_plurals(name: str, expected: str) -> None:
    assert plural(name) == expected
    assert amount(name, 3) == f"three {expected}"


def _names(directory: Path, *entries: dict[str, Any]) -> Names:
    """The names of entries, each of which is there eight times."""
    (directory / "package" / "en").mkdir(parents=True)
    groups = {"cat face": 3, "eight thirty": 5, "man walking": 1, "waving hand": 1, "brain": 1, "grinning face": 0, "aries": 8}
    groups |= {"red apple": 4, "party popper": 6, "fish": 3}
    data = [{"label": label, "group": group} for label, group in groups.items()]
    (directory / "package" / "en" / "data.json").write_text(json.dumps(data))
    return Names(list(entries) * 8, directory)


@pytest.mark.parametrize(
    ("label", "name"),
    [
        ("cat face", "cat"), ("eight thirty", "clock"), ("man walking", "person"), ("waving hand", "hand"), ("brain", "brain"),
        ("grinning face", "face"), ("aries", None), ("red apple", "apple"), ("angry fish", "fish"), (None, None),
    ],
)  # fmt: skip
def test_labels_are_reduced_to_everyday_names(label: str | None, name: str | None, tmp_path: Path) -> None:
    entry = {"kind": "icon", "split": "train", "label": label, "style": "noto"}
    assert _names(tmp_path, entry).of(entry) == name


def test_a_name_that_hardly_any_picture_has_is_not_learned(tmp_path: Path) -> None:
    known = {"kind": "icon", "split": "train", "label": "fish", "style": "noto"}
    held_out = {"kind": "icon", "split": "heldout", "label": "brain", "style": "noto"}
    photo = {"kind": "photo", "split": "train", "label": None, "style": None, "path_in_source": "images/land/beach12.jpg"}
    names = _names(tmp_path, known, held_out, photo)
    assert names.of(held_out) is None
    assert names.of(photo) == "beach"
    assert names.countable(known)
    assert not names.countable(held_out)


@pytest.mark.parametrize("count", [2, 3, 4])
def test_drawings_in_one_picture_lie_apart(count: int) -> None:
    """Each quarter has one drawing or none."""
    half = SIDE // 2
    for seed in range(5):
        picture = composed([disc((200, 30, 40))] * count, np.random.default_rng(seed))
        shown = picture.min(axis=2) < 200
        areas = [shown[y : y + half, x : x + half].mean() for y in (0, half) for x in (0, half)]
        assert sum(area > 0.1 for area in areas) == count == sum(area > 0 for area in areas)


def test_a_changed_drawing_shows_the_same_whole() -> None:
    drawing = disc((200, 30, 40))
    areas = [(changed(drawing, np.random.default_rng(seed)).min(axis=2) < 128).mean() for seed in range(8)]
    assert len({round(area, 4) for area in areas}) > 4
    assert all(0.3 * areas_of < area <= 1.02 * areas_of for area in areas for areas_of in [(drawing.min(axis=2) < 128).mean()])


def test_answers_follow_from_the_subject() -> None:
    rng = np.random.default_rng(0)
    names = ["apple", "dog", "fox"]
    for _ in range(30):
        assert question("what", APPLES, names, rng).answer == "Three apples."
        assert question("style", BEACH, names, rng).answer == "A photograph."
        assert question("colour", APPLES, names, rng).answer == "Red and green."
        assert question("describe", APPLES, names, rng).answer == (
            "Three apples in 3d style, mostly red, on a white background."
        )
        assert question("describe", BEACH, names, rng).answer == "A photograph of a beach, mostly blue."
        assert question("unknown", BEACH, names, rng).answer == UNKNOWN
        present = question("present", APPLES, names, rng)
        assert present.answer == ("Yes, three apples." if "apple" in present.question else "No, three apples.")
        coloured = question("coloured", APPLES, names, rng)
        is_so = any(colour in coloured.question for colour in APPLES.colours)
        assert coloured.answer == f"{'Yes' if is_so else 'No'}, red and green."
        count = question("count", APPLES, names, rng)
        assert count.answer == ("Three." if "apples" in count.question else "None.")
        photo = question("photograph", BEACH, names, rng)
        assert photo.answer == ("Yes." if "photograph" in photo.question else "No, a photograph.")


def test_no_is_as_frequent_as_yes() -> None:
    rng = np.random.default_rng(1)
    for kind in ("present", "coloured"):
        answers = [question(kind, APPLES, ["dog", "fox"], rng).answer[:2] for _ in range(400)]
        assert abs(answers.count("No") - 200) < 50


def test_checks_are_true_of_the_picture_alone() -> None:
    rng = np.random.default_rng(3)
    asked = [each for _ in range(50) for each in checks(APPLES, ["apple", "dog", "fox", "owl"], rng)]
    true = {question for question, is_so in asked if is_so}
    assert true == {"is it an apple?", "is it red?", "is it green?", "is it a drawing?"}
    assert true.isdisjoint(question for question, is_so in asked if not is_so)
    assert {"is it a fox?", "is it blue?", "is it a photograph?"} < {question for question, _ in asked}
    nameless = Subject((), ("blue",), PHOTO)
    assert all("fox" not in question for question, _ in checks(nameless, ["fox"], rng))


def test_conversations_ask_only_what_can_be_answered() -> None:
    rng = np.random.default_rng(2)
    nameless = Subject((), ("blue",), "clipart")
    asked = {turn.kind for _ in range(100) for turn in conversation(nameless, ["dog"], 6, rng)}
    assert asked == {kind for kind, (_, _, needs_name) in KINDS.items() if not needs_name}
    turns = [turn for _ in range(100) for turn in conversation(APPLES, ["dog"], 6, rng)]
    assert {turn.kind for turn in turns} == set(KINDS)
    assert any(turn.question.islower() for turn in turns)
    assert len({turn.question for turn in turns}) > 60
    assert all(turn.question.strip() == turn.question for turn in turns)
