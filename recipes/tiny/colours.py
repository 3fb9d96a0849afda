"""Names the colours of a picture, as the answers of the bundled understander give them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

__all__ = ["COLOURS", "colours"]

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white", "grey")

_SIDE = 64
"""Pictures are reduced to this side before their pixels are named."""
_WHITE = 244
"""A pixel whose channels are all at least this is background, if the picture has a white margin."""
_SHARE = 0.22
"""Least share of a colour that is named beside the first."""
_HUES = (
    (18, "red"),
    (38, "orange"),
    (62, "yellow"),
    (170, "green"),
    (255, "blue"),
    (290, "purple"),
    (345, "pink"),
    (361, "red"),
)
"""Where each hue ends, in degrees."""


def colours(picture: NDArray[np.uint8], most: int = 2) -> tuple[str, ...]:
    """Name the colours of a picture u8 [H, W, 3], the one with the largest share first; at most `most`.

    On a white background the thing in front of it is named. White of its own counts if nearly nothing else is there.
    """
    small = np.asarray(Image.fromarray(picture).resize((_SIDE, _SIDE), Image.Resampling.BOX)).astype(float)
    pixels = small.reshape(-1, 3)
    border = np.concatenate([small[0], small[-1], small[:, 0], small[:, -1]])
    if (border.min(axis=1) >= _WHITE).mean() > 0.6:
        inside = pixels[pixels.min(axis=1) < _WHITE]
        if len(inside) < 0.03 * len(pixels):
            return ("white",)
        pixels = inside
    counts = np.bincount(_named(pixels), minlength=len(COLOURS)) / len(pixels)
    order = np.argsort(-counts, kind="stable")[:most]
    return tuple(COLOURS[i] for rank, i in enumerate(order) if rank == 0 or counts[i] >= _SHARE)


def _named(pixels: NDArray[np.float64]) -> NDArray[np.intp]:
    """The index in `COLOURS` of each pixel [N, 3] of 0 .. 255, by hue, saturation and lightness."""
    high, low = pixels.max(axis=1), pixels.min(axis=1)
    chroma, lightness = high - low, (high + low) / 510
    r, g, b = pixels.T
    safe = np.maximum(chroma, 1e-9)
    sector = np.where(high == r, ((g - b) / safe) % 6, np.where(high == g, (b - r) / safe + 2, (r - g) / safe + 4))
    hue = 60 * sector
    names = np.select([hue < end for end, _ in _HUES], [COLOURS.index(name) for _, name in _HUES])
    warm = (hue < 48) | (hue > 345)
    pale_red = ((hue < 18) | (hue > 290)) & (lightness > 0.72)
    brown = warm & (g > 0.33 * r) & ((lightness < 0.43) | (lightness < 0.58) & (chroma < 125))
    names = np.where(pale_red, COLOURS.index("pink"), names)
    names = np.where(brown, COLOURS.index("brown"), names)
    grey = (chroma < 38) | (chroma < 0.16 * high) | (chroma < 50) & (high < 130) & ~warm
    names = np.where(grey, np.where(lightness > 0.85, COLOURS.index("white"), COLOURS.index("grey")), names)
    return np.where((high < 60) | grey & (high < 85), COLOURS.index("black"), names)
