"""The pictures that the bundled understander learns from: the gathered ones, changed a little, and several drawings in one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from recipes.tiny.colours import colours
from recipes.tiny.data import SIDE, Pictures, Pixels, centred, cropped
from recipes.tiny.sources import NAMES, fetch
from recipes.tiny.subjects import PHOTO, Names, Subject

__all__ = ["Scene", "changed", "composed", "names_of", "scenes"]

_PLACES = ((0.03, 0.03), (0.51, 0.51), (0.51, 0.03), (0.03, 0.51))
"""Left upper corners of up to four drawings in one picture; two stand diagonally."""
_FEW = 20
"""Most pictures of a name of which there are all variants."""


@dataclass(frozen=True)
class Scene:
    """A picture u8 [256, 256, 3] and what is known about it."""

    picture: Pixels
    subject: Subject


def changed(picture: Pixels, rng: np.random.Generator) -> Pixels:
    """Mirror a drawing, make it smaller and move it on its white background, at random."""
    if rng.random() < 0.5:
        picture = picture[:, ::-1]
    side = int(rng.uniform(0.6, 1.0) * SIDE)
    small = Image.fromarray(np.ascontiguousarray(picture)).resize((side, side), Image.Resampling.LANCZOS)
    canvas = Image.new("RGB", (SIDE, SIDE), "white")
    canvas.paste(small, (int(rng.integers(SIDE - side + 1)), int(rng.integers(SIDE - side + 1))))
    return np.asarray(canvas)


def composed(drawings: Sequence[Pixels], rng: np.random.Generator) -> Pixels:
    """Put two to four drawings into one picture, each at its place with a little play."""
    canvas = Image.new("RGB", (SIDE, SIDE), "white")
    places = np.array(_PLACES)[rng.permutation(2) if len(drawings) == 2 else rng.permutation(len(drawings))]
    for drawing, (x, y) in zip(drawings, places, strict=True):
        side = int(rng.uniform(0.4, 0.46) * SIDE)
        left, top = (int(SIDE * max(0.0, value + rng.uniform(-0.02, 0.02))) for value in (x, y))
        small = Image.fromarray(np.ascontiguousarray(drawing)).resize((side, side), Image.Resampling.LANCZOS)
        canvas.paste(small, (left, top))
    return np.asarray(canvas)


def names_of(pictures: Pictures, cache: Path) -> Names:
    """The names of all gathered pictures. `cache` has the packages as they were fetched."""
    return Names([*pictures.icon_entries, *pictures.photo_entries], fetch(NAMES, cache).directory)


def scenes(pictures: Pictures, names: Names, split: str, variants: int, several: float, seed: int) -> Iterator[Scene]:
    """Make the pictures of one split.

    Args:
        pictures: the gathered ones.
        names: of what they show.
        split: `train` or `heldout`.
        variants: how many of each picture whose name few have; of others a quarter, but the picture itself always.
        several: how many pictures of several drawings there are for each drawing with a name.
        seed: of all choices.
    """
    rng = np.random.default_rng(seed)
    entries = [entry for entry in pictures.icon_entries if entry["split"] == split]
    for entry in entries:
        picture = np.asarray(pictures.icons[entry["row"]])
        name = names.of(entry)
        made = variants if names.counts[name] <= _FEW else max(1, variants // 4)
        for variant in range(made if name else 1):
            yield _scene(entry, names, changed(picture, rng) if variant else picture)
    for entry in pictures.photo_entries:
        if entry["split"] == split:
            photo = pictures.photograph(entry)
            for variant in range(variants):
                yield _scene(entry, names, cropped(photo, rng, 0.6) if variant else centred(photo))
    single = [(entry, str(names.of(entry))) for entry in entries if names.countable(entry)]
    for _ in range(int(several * len(single))):
        yield _several(single, pictures, rng)


def _scene(entry: Mapping[str, Any], names: Names, picture: Pixels) -> Scene:
    name = names.of(entry)
    return Scene(picture, Subject(((name, 1),) if name else (), colours(picture), entry["style"] or PHOTO))


def _several(named: Sequence[tuple[Mapping[str, Any], str]], pictures: Pictures, rng: np.random.Generator) -> Scene:
    """Two to four of one thing, or two things of one style, of entries and their names."""
    first, name = named[int(rng.integers(len(named)))]
    group = [first] * int(rng.integers(2, 5))
    things: tuple[tuple[str, int], ...] = ((name, len(group)),)
    if rng.random() < 0.4:
        others = [each for each in named if each[0]["style"] == first["style"] and each[1] != name]
        if others:
            second, other = others[int(rng.integers(len(others)))]
            group, things = [first, second], ((name, 1), (other, 1))
    picture = composed([np.asarray(pictures.icons[entry["row"]]) for entry in group], rng)
    return Scene(picture, Subject(things, colours(picture), first["style"]))
