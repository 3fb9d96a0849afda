"""The things that the bundled generator learns to draw, and their names in prompts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

__all__ = ["DRAWN_STYLES", "THINGS", "drawn"]

# fmt: off
THINGS = {
    "red apple": "red apple", "green apple": "green apple", "banana": "banana", "cherries": "cherries", "grapes": "grapes",
    "watermelon": "watermelon", "pineapple": "pineapple", "lemon": "lemon", "strawberry": "strawberry", "carrot": "carrot",
    "tomato": "tomato", "pizza": "pizza", "hamburger": "hamburger", "hot dog": "hot dog", "ice cream": "ice cream",
    "doughnut": "doughnut", "birthday cake": "birthday cake", "cookie": "cookie", "cat face": "cat", "dog face": "dog",
    "fox": "fox", "tiger face": "tiger", "panda": "panda", "monkey face": "monkey", "rabbit face": "rabbit",
    "pig face": "pig", "frog": "frog", "penguin": "penguin", "owl": "owl", "duck": "duck", "octopus": "octopus",
    "whale": "whale", "butterfly": "butterfly", "lady beetle": "ladybug", "crab": "crab", "elephant": "elephant",
    "sunflower": "sunflower", "rose": "rose", "cactus": "cactus", "evergreen tree": "tree", "maple leaf": "maple leaf",
    "sun": "sun", "crescent moon": "moon", "star": "star", "rainbow": "rainbow", "cloud": "cloud", "fire": "fire",
    "snowman": "snowman", "umbrella": "umbrella", "balloon": "balloon", "house": "house", "castle": "castle",
    "rocket": "rocket", "airplane": "airplane", "bicycle": "bicycle", "sailboat": "sailboat", "automobile": "car",
    "guitar": "guitar", "key": "key", "light bulb": "light bulb", "crown": "crown", "soccer ball": "soccer ball",
    "red heart": "heart", "alarm clock": "clock",
}
# fmt: on
"""Labels of drawings, and what they are called in prompts. Each is drawn in at least four styles and clear at a small size."""
DRAWN_STYLES = ("noto", "3d", "flat", "twemoji", "emojione")
"""Clip art is left out: its drawings of one thing have little in common."""


def drawn(entries: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The entries of the manifest that the generator learns, with the names of prompts as labels."""
    return [
        entry | {"label": THINGS[entry["label"]]}
        for entry in entries
        if entry["kind"] == "icon" and entry["split"] == "train" and entry["label"] in THINGS and entry["style"] in DRAWN_STYLES
    ]
