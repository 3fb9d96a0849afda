"""Writes captions for labelled pictures, in many wordings for training and in others for evaluation."""

from __future__ import annotations

import re

import numpy as np

__all__ = ["ADJECTIVES", "HELD_OUT", "STYLES", "TEMPLATES", "caption", "held_out_caption", "with_article"]

STYLES: dict[str, tuple[str, ...]] = {
    "noto": ("noto style", "soft flat style", "smooth style"),
    "3d": ("3d style", "3d render", "clay style"),
    "flat": ("flat style", "flat design", "minimal style"),
    "twemoji": ("twemoji style", "bold cartoon style", "simple cartoon style"),
    "emojione": ("emojione style", "outlined style", "round sticker style"),
    "clipart": ("clip art style", "old vector drawing style", "sketched style"),
}
"""The names of each source's style in captions."""

TEMPLATES = (
    "{label}",
    "{label}",
    "{a_label}",
    "{a_label} icon",
    "{label} icon",
    "{label} emoji",
    "a picture of {a_label}",
    "picture of {a_label}",
    "an icon of {a_label}",
    "a drawing of {a_label}",
    "an illustration of {a_label}",
    "an image of {a_label} on white",
    "{a_label} in front of a white background",
    "{label} on a white background",
    "a small picture showing {a_label}",
    "the {label}",
)
HELD_OUT = (
    "show me {a_label}",
    "I would like to see {a_label}",
    "please draw {a_label}",
    "could you paint {a_label}",
    "can you make {a_label}",
    "this is {a_label}",
)
ADJECTIVES = re.compile(
    "red|green|blue|yellow|orange|purple|brown|black|white|pink|gr[ea]y|golden|old|young|small|large|big|little|tiny|tall|hot|cold|new|"
    "full|empty|broken|open|closed|crying|smiling|grinning|sleeping|angry|happy|sad|tired|rolled|burning|shooting|flying|falling"
)

_CONSONANT = re.compile(r"uni|use|uk|eu|one\b|once\b")
"""Labels that begin with a vowel which is spoken as a consonant."""
_VOWEL = re.compile(r"[aeiou]|hour|honest|heir|[fhlmnrsx]\b")
_TAIL = re.compile(r" (with|without|in|of|on|and|for|holding|lifting|showing|over) .*")
_WITHOUT_ARTICLE = re.compile(
    r"(.* )?(\w*[^suio\W]s|men|women|people|children|feet|rice|bread|flatbread|corn|popcorn|fire"
    r"|money|snow|fog|smoke|grass|ice|milk|hair|salt|luggage|tennis|lava|water|bacon|butter|garlic|sushi|spaghetti|sake)"
)
"""Labels of several things or of a substance, recognised by the last word before a `_TAIL`."""


def with_article(label: str) -> str:
    """Put the article before a label: `an apple`, `a unicorn`, `grapes`."""
    if _WITHOUT_ARTICLE.fullmatch(_TAIL.sub("", label)):
        return label
    spoken_vowel = _VOWEL.match(label) and not _CONSONANT.match(label)
    return f"{'an' if spoken_vowel else 'a'} {label}"


def caption(label: str, style: str, rng: np.random.Generator) -> str:
    """Write a caption in a random wording of training. Half of the captions name the style."""
    adjective, _, noun = label.partition(" ")
    if noun and ADJECTIVES.fullmatch(adjective) and rng.random() < 0.2:
        plural = with_article(noun) == noun
        text = f"{with_article(noun)} that {'are' if plural and noun.endswith('s') else 'is'} {adjective}"
    else:
        text = _filled(str(rng.choice(TEMPLATES)), label)
    if rng.random() < 0.5:
        name = str(rng.choice(STYLES[style]))
        text = f"{text} in {name}" if rng.random() < 0.7 else f"{name.removesuffix(' style')} {label}"
    return text


def held_out_caption(label: str, style: str | None, rng: np.random.Generator) -> str:
    """Write a caption in a random wording that training never uses. It names the style if one is given."""
    text = _filled(str(rng.choice(HELD_OUT)), label)
    return text if style is None else f"{text} in {rng.choice(STYLES[style])}"


def _filled(template: str, label: str) -> str:
    return template.format(label=label, a_label=with_article(label))
