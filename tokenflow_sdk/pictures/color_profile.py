"""Convert the colours of images that carry an ICC profile to sRGB, with LittleCMS, which comes with Pillow."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import TypeAlias

import numpy as np
from PIL import Image

from tokenflow_sdk.errors import MissingPackageError

__all__ = ["MAX_PROFILE_BYTES", "Conversion", "srgb_conversion"]

Conversion: TypeAlias = "Callable[[Image.Image], Image.Image]"
"""An image, or a strip of it, to RGB of the same size."""

MAX_PROFILE_BYTES = 4 * 2**20
"""Longest profile that is read. Those of printers take up to 3 MiB."""
_SAME = 2
"""Largest difference, of 255, between colours before and after a conversion that only rounds. Profiles called sRGB differ by 1
in how they write its curve; a gamma of 2.2 instead differs by 9."""
_PIXELS = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK"}
"""Pillow's mode for the colours that a profile describes."""
_COLOURED = ("RGB", "RGBA", "RGBa", "RGBX", "P", "PA", "YCbCr", "HSV")
_GREY = ("1", "L", "LA", "La", "I", "I;16", "I;16L", "I;16B", "I;16N")


def srgb_conversion(profile: object, mode: str, name: str) -> Conversion | None:
    """How the colours of an image become sRGB; None if they are sRGB already.

    Args:
        profile: the ICC profile in the image; None and b"" say that it has none.
        mode: Pillow's mode of the image.
        name: what error messages call it.

    Raises:
        MissingPackageError: Pillow was built without LittleCMS.
        ValueError, OSError, TypeError: the profile cannot be used for this image; the message says why.
    """
    if profile is None or (isinstance(profile, bytes) and not profile):
        return None
    if not isinstance(profile, bytes):
        raise TypeError(f"it is {type(profile).__name__}, not bytes")
    if len(profile) > MAX_PROFILE_BYTES:
        raise ValueError(f"it has {len(profile):,} bytes, and at most {MAX_PROFILE_BYTES:,} are read")
    from PIL import ImageCms  # costs time that images without a profile need not spend

    try:
        opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space = opened.profile.xcolor_space
        if space not in _PIXELS:
            raise ValueError(f"it is for {space.strip()} colours")
        transform = ImageCms.buildTransform(opened, ImageCms.createProfile("sRGB"), _PIXELS[space], "RGB")
    except ImportError as error:
        raise MissingPackageError(
            f"{name} has a colour profile, and this Pillow was built without LittleCMS: {error}.",
            "Run `pip install --force-reinstall pillow`, or choose color='as-stored'.",
        ) from error
    except ImageCms.PyCMSError as error:
        raise ValueError(str(error)) from error

    def convert(image: Image.Image) -> Image.Image:
        converted = transform.apply(image.convert(_PIXELS[space]))
        assert converted is not None
        return converted

    probe = _probe(_PIXELS[space])
    if np.abs(np.asarray(convert(probe), np.int16) - np.asarray(probe.convert("RGB"), np.int16)).max() <= _SAME:
        return None
    described = "RGB" if mode in _COLOURED else "L" if mode in _GREY else mode
    if described != _PIXELS[space]:
        raise ValueError(f"it is for {space.strip()} colours, and the picture's mode is {mode}")
    return convert


def _probe(mode: str) -> Image.Image:
    """Colours of the whole range: all levels of grey, or 18 levels of each channel."""
    if mode == "L":
        return Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    levels = np.arange(0, 256, 15 if mode == "RGB" else 51, dtype=np.uint8)
    channels = np.meshgrid(*[levels] * len(mode), indexing="ij")
    return Image.merge(mode, [Image.fromarray(channel.reshape(1, -1)) for channel in channels])
