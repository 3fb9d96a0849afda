"""Reads labelled drawings from unpacked packages: emoji of five sources and clip art, 256 px on white."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from recipes.tiny.captions import ADJECTIVES
from recipes.tiny.sources import Source

__all__ = ["SIZE", "Icon", "icons_in", "plain_words", "read_labels", "read_tags", "title"]

SIZE = 256
_NAMESPACES = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
_MARGIN = 12
_LARGEST = 400_000
"""Larger files, in bytes, are posters instead of clip art."""
_LEFT_OUT = re.compile(r"\bflag\b|skin-tone|\bregional-indicator|^[0-9#*]$|^keycap|hair$|-letter|input-|square-button")
_CLIPART = {
    "animals",
    "buildings",
    "education",
    "electronics",
    "food",
    "household",
    "office",
    "people",
    "plants",
    "tools",
    "transportation",
}


@dataclass(frozen=True)
class Icon:
    """A drawing, RGB [256, 256] on white. `label` is in lower case, or None if it cannot be told from the file's name."""

    image: Image.Image
    path: str
    label: str | None


def read_labels(directory: Path) -> dict[str, str]:
    """Read the labels of emojibase-data by code points as in file names: `1f34e` -> `red apple`; without skin tones."""
    entries: list[dict[str, Any]] = json.loads((directory / "package" / "en" / "data.json").read_text(encoding="utf-8"))
    return {_plain(entry["hexcode"]): plain_words(entry["label"]) for entry in entries}


def read_tags(directory: Path) -> dict[str, list[str]]:
    """Read the tags of emojibase-data: other words for each label."""
    entries: list[dict[str, Any]] = json.loads((directory / "package" / "en" / "data.json").read_text(encoding="utf-8"))
    return {plain_words(entry["label"]): entry.get("tags", []) for entry in entries}


def title(stem: str, labels: Collection[str]) -> str | None:
    """Find the label, with adjectives before it, at the beginning of a clip-art file's name.

    `light_bulb_karl_bartel_01` -> `light bulb`, `red_car_02` -> `red car`; None if there is none, and for black-and-white
    (`bw`).
    """
    words = re.sub(r"[\d_.+-]+", " ", stem.lower()).split()
    if "bw" in words:
        return None
    start = 0
    while start < len(words) and ADJECTIVES.fullmatch(words[start]) and " ".join(words[: start + 2]) not in labels:
        start += 1
    for end in range(min(len(words), start + 3), start, -1):
        noun = " ".join(words[start:end])
        if noun in labels or noun.removesuffix("s") in labels:
            return " ".join(words[:end])
    return None


def icons_in(source: Source, directory: Path, labels: dict[str, str]) -> Iterator[Icon]:
    """Yield the drawings of an unpacked package, without flags, letters and skin tones."""
    if source.style == "clipart":
        yield from _clipart(directory, set(labels.values()))
    elif source.style == "3d":
        for path in sorted((directory / "package" / "assets").glob("*.webp")):
            label = labels.get(_plain(path.stem))
            if label and not _LEFT_OUT.search(label.replace(" ", "-")):
                yield Icon(_on_white(Image.open(path)), path.name, label)
    else:
        yield from _iconify(directory, set(labels.values()))


def _iconify(directory: Path, known: set[str]) -> Iterator[Icon]:
    import resvg_py

    data = json.loads((directory / "package" / "icons.json").read_text(encoding="utf-8"))
    for name, icon in sorted(data["icons"].items()):
        label = plain_words(name)
        if icon.get("hidden") or _LEFT_OUT.search(name) or label not in known:
            continue
        width, height = icon.get("width", data.get("width", 16)), icon.get("height", data.get("height", 16))
        svg = f'<svg {_NAMESPACES} viewBox="0 0 {width} {height}">{icon["body"]}</svg>'
        png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=SIZE, height=SIZE))
        yield Icon(_on_white(Image.open(io.BytesIO(png))), name, label)


def _clipart(directory: Path, labels: set[str]) -> Iterator[Icon]:
    root = directory / "usr" / "share" / "openclipart" / "png"
    for path in sorted(root.rglob("*.png")):
        name = path.relative_to(root)
        if path.is_symlink() or name.parts[0] not in _CLIPART or "flag" in path.stem or path.stat().st_size > _LARGEST:
            continue
        try:
            image = Image.open(path)
            if min(image.size) >= 64 and max(image.size) <= 4096:
                yield Icon(_on_white(image), name.as_posix(), title(path.stem, labels))
        except (OSError, ValueError, Image.DecompressionBombError):
            continue


def _on_white(image: Image.Image) -> Image.Image:
    """Fit a picture into a white square with a margin."""
    image = image.convert("RGBA")
    inner = SIZE - 2 * _MARGIN
    scale = inner / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.LANCZOS)
    canvas = Image.new("RGBA", (SIZE, SIZE), "white")
    canvas.alpha_composite(image, ((SIZE - width) // 2, (SIZE - height) // 2))
    return canvas.convert("RGB")


def _plain(codes: str) -> str:
    return "-".join(part for part in codes.lower().split("-") if part != "fe0f")


def plain_words(text: str) -> str:
    """Reduce a text to lower-case letters and digits, so that labels can be compared."""
    return re.sub(r"[^a-z0-9]+", " ", text.lower()).strip()
