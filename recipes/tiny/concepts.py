"""Chooses the labels that the generator learns: animals, plants, food and some things.

The prompt tokenizer is trained on all `concepts`, the generator on pictures of those that are `taught`.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from recipes.tiny.icons import plain_words

__all__ = ["concepts", "taught"]

_GROUPS = {3, 4}
"""The groups of emojibase for animals and nature, and for food and drink."""
# fmt: off
_THINGS = (
    "rocket", "airplane", "automobile", "bicycle", "bus", "sailboat", "ship", "house", "castle", "sun", "star",
    "rainbow", "cloud", "fire", "snowman", "balloon", "gift", "umbrella", "crown", "key", "bell", "book", "guitar",
    "drum", "violin", "trumpet", "camera", "television", "telephone", "hammer", "wrench",
)
_PAIRS = ("red apple", "green apple", "cat face", "dog face", "hot dog", "ice cream", "birthday cake")
# fmt: on


def concepts(entries: Iterable[dict[str, Any]], names: Path, styles: int = 5) -> list[str]:
    """Choose the labels that have pictures in at least `styles` styles.

    Args:
        entries: those of the manifest that are in the training split.
        names: the directory of the unpacked package emojibase-data.
        styles: least number of styles.
    """
    data = json.loads((names / "package" / "en" / "data.json").read_text(encoding="utf-8"))
    chosen = {plain_words(entry["label"]) for entry in data if entry.get("group") in _GROUPS} | set(_THINGS)
    found: dict[str, set[str]] = defaultdict(set)
    for entry in entries:
        if entry["label"] in chosen:
            found[entry["label"]].add(entry["style"])
    return sorted(label for label, seen in found.items() if len(seen) >= styles)


def taught(labels: Iterable[str]) -> list[str]:
    """Choose the labels that so small a model can learn: those of one word, and a few of two."""
    return [label for label in labels if " " not in label or label in _PAIRS]
