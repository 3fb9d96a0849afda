"""Captions for labelled pictures: many wordings for training, and others, never trained on, for evaluation."""

from __future__ import annotations

import re

import numpy as np

__all__ = ["HELD_OUT", "STYLES", "TEMPLATES", "caption", "held_out_caption", "with_article"]

STYLES: dict[str, tuple[str, ...]] = {
    "noto": ("noto style", "soft flat style", "smooth style"),
    "3d": ("3d style", "3d render", "clay style"),
    "flat": ("flat style", "flat design", "minimal style"),
    "twemoji": ("twemoji style", "bold cartoon style", "simple cartoon style"),
    "emojione": ("emojione style", "outlined style", "round sticker style"),
}
"""What each artist's pictures are called."""

TEMPLATES = (
    "{label}",
    "{label}",
    "{a_label}",
    "{a_label} icon",
    "{label} emoji",
    "a picture of {a_label}",
    "an icon of {a_label}",
    "a drawing of {a_label}",
    "an image of {a_label} on white",
    "{label} on a white background",
    "the {label}",
    "one {label}",
)
HELD_OUT = (
    "show me {a_label}",
    "I would like to see {a_label}",
    "please draw {a_label}",
    "could you paint {a_label}",
    "this is {a_label}",
)
_ADJECTIVES = re.compile(
    "red|green|blue|yellow|orange|purple|brown|black|white|pink|grey|old|young|small|large|big|hot|cold|new|full|broken|open|"
    "closed|crying|smiling|grinning|sleeping|angry|happy|sad|rolled|burning|shooting"
)


def with_article(label: str) -> str:
    """`apple` -> `an apple`."""
    return f"{'an' if re.match('[aeiou]', label) else 'a'} {label}"


def caption(label: str, style: str, rng: np.random.Generator) -> str:
    """One of the training wordings; half of them name the style."""
    words = label.split()
    if len(words) == 2 and _ADJECTIVES.fullmatch(words[0]) and rng.random() < 0.2:
        text = f"{with_article(words[1])} that is {words[0]}"
    else:
        text = _filled(str(rng.choice(TEMPLATES)), label)
    if rng.random() < 0.5:
        name = str(rng.choice(STYLES[style]))
        text = f"{text} in {name}" if rng.random() < 0.7 else f"{name.removesuffix(' style')} {label}"
    return text


def held_out_caption(label: str, style: str | None, rng: np.random.Generator) -> str:
    """A wording that training never used, of known words or not; with a style when one is given."""
    text = _filled(str(rng.choice(HELD_OUT)), label)
    return text if style is None else f"{text} in {rng.choice(STYLES[style])}"


def _filled(template: str, label: str) -> str:
    return template.format(label=label, a_label=with_article(label))
