"""What is known about a picture: which things it shows and how many, their colours, and its style.

Labels of drawings are reduced to everyday names: `oncoming taxi` is a taxi, all clocks are clocks, people of every kind are
people. A drawing whose label is a symbol or a flag has no name.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipes.tiny.captions import ADJECTIVES, with_article
from recipes.tiny.concepts import THINGS
from recipes.tiny.icons import plain_words

__all__ = ["COUNTS", "PHOTO", "Names", "Subject", "amount", "plural"]

PHOTO = "photo"
"""The style of photographs."""
COUNTS = ("no", "one", "two", "three", "four")

_FEWEST = 8
"""A name is learned if at least this many training pictures have it, or if the generator draws it."""
_FACES, _PEOPLE, _NATURE, _FOOD, _PLACES, _ACTIVITIES, _OBJECTS = 0, 1, 3, 4, 5, 6, 7
"""Groups of emojibase. Others are skin tones, symbols and flags."""
_EVERYDAY = (
    (r"(.+ thirty|.* clock|.* watch)", "clock"),
    (r"(.*\b)?moon( face)?", "moon"),
    (r"(globe .+)", "globe"),
    (r"(cloud .+|sun behind .+)", "cloud"),
    (r"(sun with face|sunrise.*|sunset)", "sun"),
    (r"(glowing star|shooting star)", "star"),
    (r"(dog face|poodle|service dog|guide dog)", "dog"),
    (r"(black cat|cat face)", "cat"),
    (r"(front facing|hatching|baby)? ?(baby )?chick", "chick"),
    (r"(cow|horse|monkey|mouse|pig|rabbit|tiger|dragon) face", r"\1"),
    (r"(lady beetle)", "ladybug"),
    (r"(evergreen|deciduous) tree", "tree"),
    (r"(two hump camel)", "camel"),
    (r"(spouting whale)", "whale"),
    (r"(tropical fish)", "fish"),
    (r"(black bird)", "bird"),
    (r"(white flower|wilted flower|blossom|hibiscus|hyacinth)", "flower"),
    (r"(red|green) apple", "apple"),
    (r"(.*) mugs?", "beer mug"),
    (r"(soft ice cream|shaved ice)", "ice cream"),
    (r"(brown mushroom)", "mushroom"),
    (r"(fried shrimp)", "shrimp"),
    (r"(baguette) bread", r"\1"),
    (r"ear of (corn)", r"\1"),
    (r"(kitchen) knife", "knife"),
    (r"(kiwi) fruit", r"\1"),
    (r"(.+ )?(automobile)|(sport utility) vehicle", "car"),
    (r"oncoming (taxi|bus|police car)", r"\1"),
    (r"(minibus|trolleybus)", "bus"),
    (r"(articulated lorry|.+ truck)", "truck"),
    (r"(airplane .+|small airplane)", "airplane"),
    (r"(.+ train|locomotive|railway car|metro|light rail)", "train"),
    (r"(tram car)", "tram"),
    (r"(motor boat|speedboat|passenger ship|ferry)", "ship"),
    (r"(house .+|houses|derelict house|hut)", "house"),
    (r"(.*building|department store|convenience store|.*hotel|hospital|bank|.*post office|school|factory)", "building"),
    (r"(.+ castle)", "castle"),
    (r"(mount fuji|snow capped mountain)", "mountain"),
    (r"(cityscape.*)", "city"),
    (r"(.*umbrella.*)", "umbrella"),
    (r"(.+ traffic light)", "traffic light"),
    (r"(.+ medal)", "medal"),
    (r"(\w+ book|books|notebook.*|ledger)", "book"),
    (r"(.+ banknote)", "banknote"),
    (r"(chart .+|bar chart)", "chart"),
    (r"(.+ envelope|envelope .+)", "envelope"),
    (r"(locked.*|unlocked)", "lock"),
    (r"(old key)", "key"),
    (r"(.+ camera|camera .+)", "camera"),
    (r"(magnifying glass) .+", r"\1"),
    (r"(mobile phone) .+", r"\1"),
    (r"(bell) .+", r"\1"),
    (r"(.+ microphone)", "microphone"),
    (r"(muted speaker|speaker .+)", "speaker"),
    (r"(four leaf clover)", "clover"),
    (r"(cup with straw)", "cup"),
    (r"(high heeled|running|flat) (shoe)", r"\2"),
    (r"(fork and knife.*)", "fork"),
    (r"(musical note)s?", r"\1"),
    (r"(\w+ hammer|hammer and \w+)", "hammer"),
    (r"(spiral|tear off) calendar", "calendar"),
    (r"(open )?file (folder)", r"\2"),
    (r"(page .+)", "page"),
    (r"(.+ pushpin)", "pushpin"),
)
"""Patterns of whole labels, and the names that they are reduced to."""
_HAND = re.compile(r".*(hand|finger|fist|thumb|palm|gesture|clap).*")
_BODY = re.compile(r"(ear|eye|eyes|nose|mouth|tongue|tooth|bone|brain|leg|foot|footprints|biting lip|lungs|anatomical heart)")
_PHOTOGRAPHS = {
    "badlands": "badlands", "beach": "beach", "canyon": "canyon", "city": "city", "desert": "desert", "dune": "dunes",
    "fields": "fields", "fog": "fog", "forest": "forest", "hills": "hills", "lava": "lava", "mountain": "mountains",
    "sea": "sea", "sky": "sky", "snow": "snow", "space": "stars", "valley": "valley", "water": "water",
    "scissors": "scissors", "screwDriver": "screwdriver", "sideCutter": "pliers", "solar": "solar panels",
    "windmill": "wind turbine", "dam": "dam", "leaningTowerOfPisa": "tower", "fish": "fish", "volleyball": "volleyball",
    "igloo": "igloo", "pan": "pan", "bucket": "bucket", "crocodile": "crocodile", "moose": "moose", "panda": "panda",
    "cincinnati-bridge": "bridge", "citrus-fruits": "fruits", "european-honey-bee": "bee", "plant": "plant",
    "apple": "apple", "building": "building", "fruits": "fruits", "home": "house", "orange": "orange",
    "squirrel_cls": "squirrel",
}  # fmt: skip
"""The names of photographs by the beginnings of their files' names; others have none."""
_IRREGULAR = {
    "mouse": "mice", "goose": "geese", "wolf": "wolves", "leaf": "leaves", "person": "people", "knife": "knives",
    "foot": "feet", "tooth": "teeth", "die": "dice", "snowman": "snowmen", "ox": "oxen", "scarf": "scarves",
    "fish": "fish", "deer": "deer", "moose": "moose", "bison": "bison", "blowfish": "blowfish", "jellyfish": "jellyfish",
}  # fmt: skip


_WHOLE = {"person", "face", "hand", "building", "city", "fog", "desert", "sun", "moon"}
"""Not put together in one picture: drawings of these may show several, or fill it."""


@dataclass(frozen=True)
class Subject:
    """What is known about a picture.

    Args:
        things: names and how many there are of each; empty if it is not known what the picture shows.
        colours: the one with the largest share first.
        style: a key of `recipes.tiny.captions.STYLES`, or `PHOTO`.
    """

    things: tuple[tuple[str, int], ...]
    colours: tuple[str, ...]
    style: str

    def count(self, name: str) -> int:
        return dict(self.things).get(name, 0)


class Names:
    """The names of pictures, from the manifest of the gathered data.

    Args:
        entries: of all pictures.
        emojibase: the directory of the unpacked package emojibase-data.
    """

    def __init__(self, entries: Iterable[Mapping[str, Any]], emojibase: Path) -> None:
        data = json.loads((emojibase / "package" / "en" / "data.json").read_text(encoding="utf-8"))
        self._groups: dict[str, int | None] = {plain_words(entry["label"]): entry.get("group") for entry in data}
        self.counts = Counter(self._name(entry) for entry in entries if entry["split"] == "train")
        """How many training pictures have each name."""
        drawn = {self._name({"kind": "icon", "label": label}) for label in THINGS}
        self.known = sorted(name for name, count in self.counts.items() if name and (count >= _FEWEST or name in drawn))
        """The names of things in drawings that are learned."""

    def of(self, entry: Mapping[str, Any]) -> str | None:
        """The name of what a picture shows; None if it has none, or one that is not learned."""
        name = self._name(entry)
        return name if name in self.known or entry["kind"] == PHOTO else None

    def countable(self, entry: Mapping[str, Any]) -> bool:
        """Whether an entry's name can be counted in a picture of several."""
        name = self.of(entry)
        return name is not None and " " not in name and name not in _WHOLE and with_article(name) != name

    def _name(self, entry: Mapping[str, Any]) -> str | None:
        if entry["kind"] == PHOTO:
            stem = Path(entry["path_in_source"]).stem
            return _PHOTOGRAPHS.get(re.sub(r"\d+\w?$", "", stem))
        label = entry["label"]
        if label is None:
            return None
        first, _, rest = label.partition(" ")
        if label not in self._groups and ADJECTIVES.fullmatch(first):
            label = rest
        group = self._groups.get(label)
        if group == _FACES:
            found = re.search(r"heart|cat\b|monkey|face", label)
            return found[0] if found else label if " " not in label else None
        if group == _PEOPLE:
            return label if _BODY.fullmatch(label) else "hand" if _HAND.fullmatch(label) else "person"
        if group in (_NATURE, _FOOD, _PLACES, _ACTIVITIES, _OBJECTS):
            name = _everyday(label)
            return name if name.count(" ") <= 1 else None
        return None


def amount(name: str, count: int) -> str:
    """Some things in words: `an apple`, `three apples`."""
    return with_article(name) if count == 1 else f"{COUNTS[count]} {plural(name)}"


def plural(name: str) -> str:
    """The plural of a name: `apples`, `mice`, `scissors`."""
    if with_article(name) == name:
        return name
    head, space, last = name.rpartition(" ")
    if last in _IRREGULAR:
        return head + space + _IRREGULAR[last]
    if re.search(r"[^aeiou]y$", last):
        return f"{name[:-1]}ies"
    return f"{name}es" if re.search(r"(s|x|z|ch|sh|potato|tomato|mosquito|volcano|buffalo|mango)$", last) else f"{name}s"


def _everyday(label: str) -> str:
    for pattern, name in _EVERYDAY:
        match = re.fullmatch(pattern, label)
        if match:
            return match.expand(name)
    return label
