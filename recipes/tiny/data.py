"""Reads the pictures that `recipes.tiny.gather` wrote, and makes batches of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

__all__ = ["SIDE", "Pictures", "Pixels", "centred", "cropped", "to_tensor"]

SIDE = 256
PHOTO_SHARE = 0.45
"""The share of photographs in a training batch; the rest are icons."""

Pixels = NDArray[np.uint8]


def to_tensor(pictures: list[Pixels], device: torch.device) -> Tensor:
    """Make a batch float32 [B, 3, 256, 256] in [-1, 1], channels last, of pictures u8 [256, 256, 3]."""
    batch = torch.from_numpy(np.stack(pictures)).to(device)
    return (batch.permute(0, 3, 1, 2).float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


class Pictures:
    """The gathered pictures. A batch depends on its seed and step only, so a resumed training gives the same result.

    Args:
        directory: what `recipes.tiny.gather` wrote.

    Raises:
        FileNotFoundError: nothing was gathered there.
    """

    def __init__(self, directory: Path) -> None:
        lines = (directory / "manifest.jsonl").read_text(encoding="utf-8").splitlines()
        entries: list[dict[str, Any]] = [json.loads(line) for line in lines]
        self.icons: Pixels = np.load(directory / "icons.npy", mmap_mode="r")
        self.licences = sorted({str(entry.get("licence")) for entry in entries})
        self.icon_entries = [entry for entry in entries if entry["kind"] == "icon"]
        self.train_icons = [entry["row"] for entry in self.icon_entries if entry["split"] == "train"]
        self.test_icons = [entry["row"] for entry in self.icon_entries if entry["split"] == "heldout"]
        self.photo_entries = [entry for entry in entries if entry["kind"] == "photo"]
        self._directory = directory
        self.photos, held_out, others = (
            [self.photograph(entry) for entry in self.photo_entries if entry["split"] == split]
            for split in ("train", "heldout", "others")
        )
        self.test_photos = [centred(photo) for photo in held_out]
        self.other_photos = [centred(photo) for photo in others]

    def photograph(self, entry: Mapping[str, Any]) -> Image.Image:
        """Read the photograph of an entry of the manifest."""
        return Image.open(self._directory / entry["file"]).convert("RGB")

    def held_out(self, icons: int = 48) -> dict[str, list[Pixels]]:
        """The held-out pictures: photographs, photographs of authors that training has none of, and drawings."""
        drawings = [np.asarray(self.icons[row]) for row in self.test_icons[:icons]]
        return {"photos": self.test_photos, "others": self.other_photos, "icons": drawings}

    def batch(self, size: int, seed: int, step: int) -> list[Pixels]:
        """Choose `size` pictures of the training split, and crop, mirror and tint them at random."""
        rng = np.random.default_rng([seed, step])
        return [self._photo(rng) if rng.random() < PHOTO_SHARE else self._icon(rng) for _ in range(size)]

    def _photo(self, rng: np.random.Generator) -> Pixels:
        photo = self.photos[rng.integers(len(self.photos))]
        return _tinted(cropped(photo, rng, min(1.0, 140 / min(photo.size))), rng, 0.15)

    def _icon(self, rng: np.random.Generator) -> Pixels:
        picture = np.asarray(self.icons[self.train_icons[rng.integers(len(self.train_icons))]])
        if rng.random() < 0.5:
            side = int(rng.uniform(150, SIDE))
            left, top = (int(rng.integers(SIDE - side + 1)) for _ in range(2))
            box = (left, top, left + side, top + side)
            picture = np.asarray(Image.fromarray(picture).resize((SIDE, SIDE), Image.Resampling.BICUBIC, box))
        return _mirrored(picture, rng)


def centred(photo: Image.Image) -> Pixels:
    """The largest square in the middle, u8 [256, 256, 3]."""
    side = min(photo.size)
    left, top = ((extent - side) // 2 for extent in photo.size)
    return np.asarray(photo.resize((SIDE, SIDE), Image.Resampling.LANCZOS, (left, top, left + side, top + side)))


def cropped(photo: Image.Image, rng: np.random.Generator, least: float) -> Pixels:
    """A random square, u8 [256, 256, 3], mirrored or not. Its side is at least the share `least` of the photo's shorter one."""
    shortest = min(photo.size)
    side = int(np.exp(rng.uniform(np.log(least * shortest), np.log(shortest))))
    left, top = (int(rng.integers(extent - side + 1)) for extent in photo.size)
    crop = photo.resize((SIDE, SIDE), Image.Resampling.BICUBIC, (left, top, left + side, top + side), reducing_gap=2.0)
    return _mirrored(np.asarray(crop), rng)


def _mirrored(picture: Pixels, rng: np.random.Generator) -> Pixels:
    return picture[:, ::-1] if rng.random() < 0.5 else picture


def _tinted(picture: Pixels, rng: np.random.Generator, strength: float) -> Pixels:
    gain, shift = rng.uniform(1 - strength, 1 + strength, 3), rng.uniform(-16, 16)
    return np.clip(picture * gain + shift, 0, 255).astype(np.uint8)
