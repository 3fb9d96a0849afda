"""Reads photographs and their licences from unpacked packages."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from recipes.tiny.licences import Licence, licence_of, read_dep5, spdx
from recipes.tiny.rcc import read_rcc
from recipes.tiny.sources import Source

__all__ = ["Photo", "fingerprint", "photos_in"]

_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}
_SHORTEST, _LONGEST = 200, 1280


@dataclass(frozen=True)
class Photo:
    """A photograph, RGB with at most 1280 px on its long side; `path` is its place in the package."""

    image: Image.Image
    path: str
    licence: str
    author: str


def photos_in(source: Source, directory: Path) -> Iterator[Photo]:
    """Yield the photographs of an unpacked package whose licence is permissive."""
    entries = _licences(source, directory)
    for path, content in _files(directory):
        name = Path(path)
        if not path.startswith(source.root) or name.suffix.lower() not in _SUFFIXES:
            continue
        if name.stem in source.without or (source.only and name.stem not in source.only):
            continue
        shared = Licence((), source.licence, source.author) if source.licence else _beside(directory / path)
        found = shared or licence_of(source.upstream + path.removeprefix(source.root), entries)
        licence = found and spdx(found.name)
        image = _as_photo(content) if licence else None
        if found and licence and image:
            yield Photo(image, path, licence, found.author)


def _licences(source: Source, directory: Path) -> list[Licence]:
    path = directory / "usr" / "share" / "doc" / source.name / "copyright"
    return list(read_dep5(path.read_text(encoding="utf-8"))) if path.exists() else []


def _beside(path: Path) -> Licence | None:
    """Read the licence of a jigsaw puzzle's picture from the desktop entry beside it."""
    entry = path.with_suffix(".desktop")
    if not entry.exists():
        return None
    fields = dict(line.split("=", 1) for line in entry.read_text(encoding="utf-8").splitlines() if "=" in line)
    return Licence((), fields.get("X-KDE-PluginInfo-License", ""), fields.get("X-KDE-PluginInfo-Author", ""))


def _files(directory: Path) -> Iterator[tuple[str, bytes]]:
    for path in sorted(directory.rglob("*")):
        if path.is_file() and not path.is_symlink():
            if path.suffix == ".rcc":
                yield from read_rcc(path.read_bytes())
            else:
                yield path.relative_to(directory).as_posix(), path.read_bytes()


def _as_photo(content: bytes) -> Image.Image | None:
    """Open a picture, unless it is small or a drawing, in which a few colours fill large areas."""
    try:
        opened = Image.open(io.BytesIO(content))
        if min(opened.size) < _SHORTEST or opened.mode in ("P", "1"):
            return None
        image = opened.convert("RGBA")
    except (OSError, ValueError):
        return None
    if np.asarray(image.getchannel("A")).min() < 250:
        return None
    image = image.convert("RGB")
    image.thumbnail((_LONGEST, _LONGEST), Image.Resampling.LANCZOS)
    small = np.asarray(image.resize((128, 128), Image.Resampling.BOX)).astype(int)
    colours = np.unique((small // 8).reshape(-1, 3), axis=0, return_counts=True)[1]
    drawn = np.sort(colours)[-4:].sum() > 0.5 * 128 * 128 or len(colours) < 20
    return None if drawn else image


def fingerprint(image: Image.Image) -> int:
    """64 bits, the signs of differences of neighbouring areas, which change little if a picture is resized or recoloured."""
    grey = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX)).astype(int)
    bits = (grey[:, 1:] > grey[:, :-1]).ravel()
    return int("".join("1" if bit else "0" for bit in bits), 2)
