"""Convert images of every Pillow mode to 8-bit RGB over white; docs/reference/images.md says what becomes of each."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from tokenflow_sdk.errors import CorruptImageError
from tokenflow_sdk.pictures.color_profile import Conversion

__all__ = ["WHITE", "to_rgb"]

WHITE = (255, 255, 255)
_STRIP_PIXELS = 2**20
"""Pixels converted at a time, so that intermediate results take little memory beside the image."""
_SIXTEEN_BIT_FORMATS = ("PNG", "PPM", "JPEG2000")
_BITS_PER_SAMPLE, _PHOTOMETRIC = 258, 262


def to_rgb(image: Image.Image, name: str, transparency: Any = None, convert: Conversion | None = None) -> Image.Image:
    """Convert a loaded image to RGB: more bits are scaled to 8, and transparency is composited over white.

    Args:
        image: of any mode. It is not changed.
        name: what error messages call it.
        transparency: the transparent level or colour, where Pillow's `info["transparency"]` is not in the scale of the pixels.
        convert: converts 8-bit pixels to RGB and ignores their alpha, e.g. by a colour profile; None: as Pillow converts them.

    Raises:
        CorruptImageError: the range of the pixels is not known: floating point, negative, or beyond 16 bits.
    """
    if image.mode == "F":
        raise CorruptImageError(f"{name} holds floating-point pixels.", "Convert it to 8 bits first; its range is not known.")
    if image.mode == "I" or image.mode.startswith("I;16"):
        return _in_strips(image, _GreyToRgb(image, name, convert))
    if image.mode == "La" or image.has_transparency_data:
        return _in_strips(image, lambda strip: _over_white(strip, transparency, convert))
    if convert is not None:
        return _in_strips(image, convert)
    return image if image.mode == "RGB" else image.convert("RGB")


def _in_strips(image: Image.Image, convert: Conversion) -> Image.Image:
    result = Image.new("RGB", image.size)
    rows = max(1, _STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        result.paste(convert(image.crop((0, top, image.width, min(top + rows, image.height)))), (0, top))
    return result


def _over_white(image: Image.Image, transparency: Any, convert: Conversion | None) -> Image.Image:
    if transparency is not None:
        image.info["transparency"] = transparency
    layer = image.convert("LA").convert("RGBA") if image.mode == "La" else image.convert("RGBA")
    if convert is not None:
        alpha, layer = layer.getchannel("A"), convert(layer)
        layer.putalpha(alpha)
    return Image.alpha_composite(Image.new("RGBA", layer.size, (*WHITE, 255)), layer).convert("RGB")


class _GreyToRgb:
    """Scales grey of more than 8 bits to 8."""

    def __init__(self, image: Image.Image, name: str, convert: Conversion | None) -> None:
        self._convert = convert
        tags: Any = getattr(image, "tag_v2", {})
        bits = tags.get(_BITS_PER_SAMPLE, (0,))[0]
        self._white = 2**bits - 1 if bits in (12, 16) else 65535
        self._inverted = image.format == "TIFF" and image.mode != "I" and tags.get(_PHOTOMETRIC, 0) == 0
        level = image.info.get("transparency")
        self._transparent = level if isinstance(level, int) else None
        if image.mode == "I":
            darkest, lightest = image.getextrema()
            if darkest < 0:  # type: ignore[operator]
                raise CorruptImageError(
                    f"{name} holds negative pixels.", "Convert it to 8 or 16 bits first; its range is not known."
                )
            if lightest > 65535:  # type: ignore[operator]
                raise CorruptImageError(
                    f"{name} holds 32-bit pixels.", "Convert it to 8 or 16 bits first; its range is not known."
                )
            if lightest <= 255 and bits != 16 and image.format not in _SIXTEEN_BIT_FORMATS:  # type: ignore[operator]
                self._white = 255

    def __call__(self, strip: Image.Image) -> Image.Image:
        values = np.asarray(strip).astype(np.uint32)
        levels = ((values * 255 + self._white // 2) // self._white).clip(0, 255).astype(np.uint8)
        if self._inverted:
            levels = 255 - levels
        if self._transparent is not None:
            levels[values == self._transparent] = 255
        grey = Image.fromarray(levels)
        return grey.convert("RGB") if self._convert is None else self._convert(grey)
