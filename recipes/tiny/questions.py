"""Writes questions about pictures and their answers, in several wordings, for training and for evaluation.

An answer follows from the subject and the question alone, so that a model's answer is either right or wrong.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from recipes.tiny.captions import STYLES, with_article
from recipes.tiny.colours import COLOURS
from recipes.tiny.subjects import COUNTS, PHOTO, Subject, amount, plural

__all__ = ["KINDS", "UNKNOWN", "Turn", "checks", "conversation", "question"]

UNKNOWN = "The picture does not show that."
_NOT_STYLES = ("a photograph", "a drawing")
_WHAT = (
    "What is this?", "What is it?", "What do you see?", "What can you see?", "What is in the picture?",
    "What does the picture show?", "What is shown here?", "Name what you see.", "What is in this image?",
    "Can you tell me what this is?",
)  # fmt: skip
_DESCRIBE = (
    "Describe the picture.", "Describe it in a sentence.", "Describe this image.", "Write a caption.",
    "Tell me about the picture.", "Give me a short description.",
)  # fmt: skip
_COLOUR = (
    "What colour is it?", "What color is it?", "Which colours does it have?", "Which colors do you see?",
    "What colours are in the picture?", "What is its colour?", "Name the colours.",
)  # fmt: skip
_STYLE = (
    "What style is it?", "Which style is it drawn in?", "What style is the picture in?", "How is it drawn?",
    "Name the style.", "What kind of picture is it?",
)  # fmt: skip
_PRESENT = (
    "Is there {a}?", "Do you see {a}?", "Is this {a}?", "Is it {a}?", "Does the picture show {a}?", "Can you see {a}?",
    "Is there {a} in the picture?",
)  # fmt: skip
_COLOURED = ("Is it {c}?", "Is anything {c}?", "Do you see anything {c}?", "Is there something {c} in the picture?")
_COUNT = ("How many {s} are there?", "How many {s} do you see?", "Count the {s}.", "How many {s} are in the picture?")
_PHOTOGRAPH = ("Is this {p}?", "Is it {p}?", "Is the picture {p}?")
_UNKNOWN = (
    "Who drew it?", "Who made this?", "Where was this taken?", "When was it made?", "How much does it cost?",
    "What is its name?", "How old is it?", "How does it taste?", "What is behind it?", "What happens next?",
    "Why is it there?", "What does the text say?", "How heavy is it?", "Who owns it?", "What is the weather like there?",
    "Is it expensive?", "What time is it?", "What does it sound like?",
)  # fmt: skip


@dataclass(frozen=True)
class Turn:
    """A question and its answer. `kind` is a key of `KINDS`."""

    kind: str
    question: str
    answer: str


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _things(known: Subject) -> str:
    """`an apple`, `three apples`, `an apple and a dog`."""
    return " and ".join(amount(name, count) for name, count in known.things)


def _listed(names: Sequence[str]) -> str:
    return " and ".join(names)


def _what(known: Subject, names: Sequence[str], rng: np.random.Generator) -> tuple[str, str]:
    return str(rng.choice(_WHAT)), _sentence(_things(known))


def _describe(known: Subject, names: Sequence[str], rng: np.random.Generator) -> tuple[str, str]:
    if known.style == PHOTO:
        answer = f"A photograph of {_things(known)}, mostly {known.colours[0]}."
    else:
        answer = (
            f"{_sentence(_things(known))[:-1]} in {STYLES[known.style][0]}, mostly {known.colours[0]}, on a white background."
        )
    return str(rng.choice(_DESCRIBE)), answer


def _colour(known: Subject, names: Sequence[str], rng: np.random.Generator) -> tuple[str, str]:
    return str(rng.choice(_COLOUR)), _sentence(_listed(known.colours))


def _style(known: Subject, names: Sequence[str], rng: np.random.Generator) -> tuple[str, str]:
    return str(rng.choice(_STYLE)), "A photograph." if known.style == PHOTO else _sentence(STYLES[known.style][0])


def _present(known: Subject, names: Sequence[str], rng: np.random.Generator) -> tuple[str, str]:
    """As often no as yes."""
    shown = {name for name, _ in known.things}
    if rng.random() < 0.5:
        name, count = known.things[int(rng.integers(len(known.things)))]
        answer = f"Yes, {amount(name, count)}."
    else:
        absent = [name for name in names if name not in shown]
        name = absent[int(rng.integers(len(absent)))]
        answer = f"No, {_things(known)}."
    return str(rng.choice(_PRESENT)).format(a=with_article(name)), answer


def _coloured(known: Subject, names: Sequence[str], rng: np.random.Generator) -> tuple[str, str]:
    """As often no as yes. A colour that is not named may still be there a little, so it must not be next to a named one."""
    if rng.random() < 0.5:
        return str(rng.choice(_COLOURED)).format(c=rng.choice(known.colours)), f"Yes, {_listed(known.colours)}."
    others = [colour for colour in COLOURS if colour not in known.colours]
    return str(rng.choice(_COLOURED)).format(c=rng.choice(others)), f"No, {_listed(known.colours)}."


def _count(known: Subject, names: Sequence[str], rng: np.random.Generator) -> tuple[str, str]:
    asked = known.things[int(rng.integers(len(known.things)))][0] if rng.random() < 0.85 else str(rng.choice(names))
    count = known.count(asked)
    return str(rng.choice(_COUNT)).format(s=plural(asked)), _sentence(COUNTS[count] if count else "none")


def _photograph(known: Subject, names: Sequence[str], rng: np.random.Generator) -> tuple[str, str]:
    right = _NOT_STYLES[known.style != PHOTO]
    asked = str(rng.choice(_NOT_STYLES))
    return str(rng.choice(_PHOTOGRAPH)).format(p=asked), _sentence("yes" if asked == right else f"no, {right}")


def _unknown(known: Subject, names: Sequence[str], rng: np.random.Generator) -> tuple[str, str]:
    return str(rng.choice(_UNKNOWN)), UNKNOWN


_Maker = Callable[[Subject, Sequence[str], np.random.Generator], tuple[str, str]]
KINDS: dict[str, tuple[_Maker, float, bool]] = {
    "what": (_what, 3.0, True),
    "present": (_present, 5.0, True),
    "colour": (_colour, 1.5, False),
    "coloured": (_coloured, 3.0, False),
    "style": (_style, 1.0, False),
    "describe": (_describe, 1.0, True),
    "count": (_count, 1.0, True),
    "photograph": (_photograph, 1.5, False),
    "unknown": (_unknown, 0.6, False),
}
"""Kinds of questions: what writes them, how often they are asked, and whether they need a name of what is shown."""


def question(kind: str, known: Subject, names: Sequence[str], rng: np.random.Generator) -> Turn:
    """Write a question of one kind and its answer.

    Args:
        kind: a key of `KINDS`.
        known: the subject of the picture.
        names: of things that can be asked for though the picture does not show them.
        rng: chooses wordings and things.
    """
    return Turn(kind, *KINDS[kind][0](known, names, rng))


def conversation(known: Subject, names: Sequence[str], turns: int, rng: np.random.Generator) -> list[Turn]:
    """Write questions about one picture and their answers, with the carelessness of people who type."""
    kinds = [kind for kind, (_, _, needs_name) in KINDS.items() if known.things or not needs_name]
    weights = np.array([KINDS[kind][1] for kind in kinds])
    chosen = rng.choice(len(kinds), size=turns, p=weights / weights.sum())
    written = (question(kinds[i], known, names, rng) for i in chosen)
    return [Turn(turn.kind, _typed(turn.question, rng), turn.answer) for turn in written]


def checks(known: Subject, names: Sequence[str], rng: np.random.Generator) -> list[tuple[str, bool]]:
    """Short questions about what is in a picture and, most of them, about what is not, each with whether it is so."""
    shown = [name for name, _ in known.things]
    things = [*shown, *_some([name for name in names if name not in shown], 7, rng)] if shown else []
    colours = [*known.colours, *_some([colour for colour in COLOURS if colour not in known.colours], 4, rng)]
    true = {*map(with_article, shown), *known.colours, _NOT_STYLES[known.style != PHOTO]}
    return [(f"is it {what}?", what in true) for what in (*map(with_article, things), *colours, *_NOT_STYLES)]


def _some(texts: Sequence[str], count: int, rng: np.random.Generator) -> list[str]:
    return [texts[i] for i in rng.permutation(len(texts))[:count]]


def _typed(text: str, rng: np.random.Generator) -> str:
    """As it is, in lower case, without its mark, or politely."""
    kind = rng.random()
    if kind < 0.15:
        text = text.lower()
    elif kind < 0.25:
        text = text[:-1]
    elif kind < 0.35:
        text = text[:-1].lower()
    elif kind < 0.42:
        text = f"Please: {text[0].lower()}{text[1:]}"
    return re.sub(r"\s+", " ", text)
