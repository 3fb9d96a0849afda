"""Which labelled pictures the generator learns: animals, plants, food, and some things, in every artist's style."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from recipes.tiny.icons import plain_words

__all__ = ["concepts"]

_GROUPS = {3, 4}
"""emojibase's animals and nature, food and drink."""
# fmt: off
_THINGS = (
    "rocket", "airplane", "automobile", "bicycle", "bus", "sailboat", "ship", "house", "castle", "sun", "star",
    "rainbow", "cloud", "fire", "snowman", "balloon", "gift", "umbrella", "crown", "key", "bell", "book", "guitar",
    "drum", "violin", "trumpet", "camera", "television", "telephone", "hammer", "wrench",
)
# fmt: on


def concepts(entries: Iterable[dict[str, Any]], names: Path, styles: int = 5) -> list[str]:
    """Labels of the training split that exist in at least `styles` styles.

    Args:
        entries: lines of the manifest.
        names: emojibase-data, unpacked.
    """
    data = json.loads((names / "package" / "en" / "data.json").read_text(encoding="utf-8"))
    chosen = {plain_words(entry["label"]) for entry in data if entry.get("group") in _GROUPS} | set(_THINGS)
    found: dict[str, set[str]] = defaultdict(set)
    for entry in entries:
        if entry["label"] in chosen:
            found[entry["label"]].add(entry["style"])
    return sorted(label for label, seen in found.items() if len(seen) >= styles)
