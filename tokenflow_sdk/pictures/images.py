"""Load images and preprocess them to the u8 RGB input of the encode graph, exactly as the released system does."""

from __future__ import annotations

import io
import os
import stat
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tokenflow_sdk.arguments import file_path, flag, integer
from tokenflow_sdk.errors import ArgumentError, ArrayError, ImageReadError, ImageShapeError
from tokenflow_sdk.files import is_directory, is_regular
from tokenflow_sdk.pictures.decode import MAX_PIXELS, check_size, decode_file, decode_image, raised_elsewhere
from tokenflow_sdk.pictures.preparation import Color, Preparation, Preprocess, check_color
from tokenflow_sdk.pictures.rgb import WHITE, to_rgb
from tokenflow_sdk.pictures.sources import ImageSource, describe, to_array

__all__ = [
    "SUFFIXES",
    "check_batch",
    "fit",
    "load_image",
    "pictures_in",
    "preprocess",
    "psnr",
    "ssim",
]

GREY = (127, 127, 127)
"""Fills the square of `pad-grey`, as in the released training."""
_STRIP_PIXELS = 2**20
_MAX_SQUARE = 2**28
"""Most pixels that `pad-grey` resizes; beyond it, seconds become minutes."""
SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"))


def pictures_in(directory: Path, below: bool = False) -> list[Path]:
    """The image files of a directory, chosen by their suffix and sorted; with `below` also those of directories in it.

    Raises:
        ImageReadError: the directory does not exist, cannot be read, or has no image files.
    """
    if not is_directory(directory):
        raise ImageReadError(f"{directory} is no directory.", "Give one that holds pictures.")
    try:
        files = directory.rglob("*") if below else directory.iterdir()
        found = sorted(path for path in files if path.suffix.lower() in SUFFIXES and is_regular(path))
    except OSError as error:
        raise ImageReadError(f"{directory} cannot be read: {error.strerror}.", "Check its permissions.") from error
    if not found:
        raise ImageReadError(f"{directory} holds no pictures.", f"Known endings: {' '.join(sorted(SUFFIXES))}.")
    return found


def preprocess(
    source: ImageSource,
    size: int,
    mode: Preprocess,
    *,
    color: Color = "srgb",
    fast: bool = False,
    max_pixels: int = MAX_PIXELS,
) -> NDArray[np.uint8]:
    """Load an image and make it square: u8 RGB [size, size, 3].

    Args:
        source: a path, bytes, binary file object, PIL image, or u8 array [H, W], [H, W, 1], [H, W, 3] or [H, W, 4], also of
            another library, such as a PyTorch tensor in host memory.
        size: side of the result in pixels.
        mode: `crop`, `squash`, `pad` or `pad-grey`; see `fit`.
        color: `srgb` or `as-stored`; see `load_image`.
        fast: let the JPEG decoder downscale large photos by 2, 4 or 8 while decoding. Much faster, but the pixels, and hence
            some codes, differ slightly from those of the released system.
        max_pixels: largest number of pixels accepted.

    Raises:
        ImageReadError, CorruptImageError, ImageTooLargeError, ImageShapeError, ArrayError, ArgumentError: see
            `tokenflow_sdk.errors`.
    """
    Preparation(mode, color)  # refuses what there is not
    draft_size = size if flag("fast", fast) else None
    return fit(load_image(source, color=color, max_pixels=max_pixels, draft_size=draft_size), size, mode)


def load_image(
    source: ImageSource, *, color: Color = "srgb", max_pixels: int = MAX_PIXELS, draft_size: int | None = None
) -> Image.Image:
    """Load an image as 8-bit RGB.

    The EXIF orientation is applied, animations give their first frame, 16-bit values are scaled to 8 bits, and transparent
    images are composited over white.

    Args:
        source: as for `preprocess`. The caller's image or file object is neither changed nor closed.
        color: `srgb` converts the colours of an image with an ICC profile, unless it is sRGB already, to sRGB; `as-stored`
            reads past profiles, as the released system does.
        max_pixels: largest number of pixels accepted.
        draft_size: downscale JPEGs while decoding to a short side of at least this many pixels; None decodes at full size.

    Raises:
        ImageReadError, CorruptImageError, ImageTooLargeError, ImageShapeError, ArrayError, ArgumentError: see
            `tokenflow_sdk.errors`.
    """
    if isinstance(source, os.PathLike):
        source = file_path("image", source)
    source = to_array(source)
    name = describe(source)
    check_color(color)
    max_pixels = integer("max_pixels", max_pixels, 1, None, "accepts no picture.", "Give an integer from 1 on.")
    if isinstance(source, np.ndarray):
        return _from_array(source, name, max_pixels)
    if isinstance(source, Image.Image):
        return decode_image(source, name, max_pixels, color)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return decode_file(io.BytesIO(bytes(source)), name, max_pixels, draft_size, color)
    if isinstance(source, (str, os.PathLike)):
        return _from_path(source, name, max_pixels, draft_size, color)
    if hasattr(source, "read") and hasattr(source, "seek"):
        return decode_file(source, name, max_pixels, draft_size, color)
    raise ArgumentError(
        f"A picture cannot be made from {type(source).__name__}.",
        "Give a path, bytes, a binary file, a PIL image or a u8 array.",
    )


def _from_path(path: str | os.PathLike[str], name: str, max_pixels: int, draft_size: int | None, color: Color) -> Image.Image:
    if name.startswith(("http://", "https://")):
        raise ImageReadError(f"{name} is an address, not a file.", "Download it first and give its path or bytes.")
    path = Path(path)
    try:
        # Opening a pipe or a device could block for ever, so only regular files are opened.
        if not stat.S_ISREG(path.stat().st_mode):
            raise ImageReadError(f"{name} is not a file.", "Give the path of a picture.")
        file = path.open("rb")
    except ImageReadError:
        raise
    except (OSError, ValueError) as error:
        if raised_elsewhere(error):
            raise
        why = getattr(error, "strerror", None) or error
        raise ImageReadError(f"{name} cannot be read: {why}.", "Check the path and its permissions.") from error
    with file:
        return decode_file(file, name, max_pixels, draft_size, color)


def _from_array(array: NDArray[Any], name: str, max_pixels: int) -> Image.Image:
    if array.dtype != np.uint8:
        raise ArrayError(f"A picture must be a u8 array, not {array.dtype}.", _dtype_hint(array))
    channels = array.shape[2] if array.ndim == 3 else 1
    if array.ndim not in (2, 3) or channels not in (1, 3, 4):
        raise ArrayError(
            f"A picture must be [H, W], [H, W, 1], [H, W, 3] or [H, W, 4], not {list(array.shape)}.",
            "Move channels last with array.transpose(1, 2, 0); for several pictures use encode_batch or encode_array.",
        )
    check_size((array.shape[1], array.shape[0]), name, max_pixels)
    return to_rgb(Image.fromarray(array[..., 0] if array.ndim == 3 and channels == 1 else array), name)


def _dtype_hint(array: NDArray[Any]) -> str:
    if array.dtype.kind != "f":
        return "Convert values of 0 .. 255 with array.astype(np.uint8)."
    if not np.isfinite(array).all():
        return "It holds NaN or infinity: mend what produced it, then convert."
    return "Convert values of 0 .. 1 with (array * 255).round().astype(np.uint8)."


def fit(image: Image.Image, size: int, mode: Preprocess) -> NDArray[np.uint8]:
    """Make an RGB image square: u8 [size, size, 3] (docs/model.md, section 2).

    Args:
        image: an RGB image.
        size: side of the result in pixels.
        mode: `crop` is the evaluation preprocessing of the released system: halve with a 2 x 2 box filter while the short side
            is at least twice `size`, resize the short side to `size` (bicubic), crop the centre. `pad` resizes the long side
            instead and centres the image on white. `squash` and `pad-grey` are the preprocessing of its understanding models:
            resize the whole image (bicubic) without keeping its aspect ratio, or centred on a square of its longer side, grey
            127. An image taller than 16,384 pixels, which would take minutes, is halved with the box filter until it is not.
    """
    if mode == "pad-grey":
        return _fit_on_grey(image, size)
    if mode == "squash":
        return np.array(image.resize((size, size), Image.Resampling.BICUBIC))
    side = min if mode == "crop" else max
    while side(image.size) >= 2 * size and min(image.size) > 1:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / side(image.size)
    resized = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))), Image.Resampling.BICUBIC)
    if mode == "pad":
        canvas = Image.new("RGB", (size, size), WHITE)
        canvas.paste(resized, ((size - resized.width) // 2, (size - resized.height) // 2))
        return np.array(canvas)
    left, top = (resized.width - size) // 2, (resized.height - size) // 2
    cropped: NDArray[np.uint8] = np.array(resized.crop((left, top, left + size, top + size)))
    return cropped


def _fit_on_grey(image: Image.Image, size: int) -> NDArray[np.uint8]:
    """What Pillow makes of the image on a grey square when it resizes that, without the square in memory.

    Pillow resizes rows first, each by itself, then columns. So the rows of the square that meet the image are made and resized
    in strips, and the others stay grey.
    """
    while max(image.size) * image.height > _MAX_SQUARE:
        image = image.resize((max(1, image.width // 2), max(1, image.height // 2)), Image.Resampling.BOX)
    side = max(image.size)
    left, top = (side - image.width) // 2, (side - image.height) // 2
    narrow, rows = Image.new("RGB", (size, side), GREY), max(1, _STRIP_PIXELS // side)
    for y in range(0, image.height, rows):
        height = min(rows, image.height - y)
        strip = Image.new("RGB", (side, height), GREY)
        strip.paste(image.crop((0, y, image.width, y + height)), (left, 0))
        narrow.paste(strip.resize((size, height), Image.Resampling.BICUBIC), (0, top + y))
    return np.array(narrow.resize((size, size), Image.Resampling.BICUBIC))


def check_batch(images: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """Check a batch of images for the encode graph, and return it C-contiguous.

    Args:
        images: u8 [B, size, size, 3], B >= 1, of NumPy or another library.
        size: side in pixels that the tokenizer takes.

    Raises:
        ArrayError: not a u8 array of shape [B, H, W, 3] with B >= 1.
        ImageShapeError: the images have another size.
    """
    images = to_array(images)
    if not isinstance(images, np.ndarray):
        raise ArrayError(
            f"Expected a NumPy array, got {type(images).__name__}.", "Use encode or encode_batch for files and images."
        )
    if images.dtype != np.uint8:
        raise ArrayError(f"Pictures must be a u8 array, not {images.dtype}.", _dtype_hint(images))
    if images.ndim != 4 or images.shape[3] != 3 or len(images) == 0:
        raise ArrayError(
            f"Pictures must be [B, {size}, {size}, 3], B >= 1, not {list(images.shape)}.",
            "For one picture use images[None]; move channels last with images.transpose(0, 2, 3, 1).",
        )
    if images.shape[1:3] != (size, size):
        raise ImageShapeError(
            f"Pictures are {images.shape[2]}x{images.shape[1]}; this tokenizer takes {size}x{size}.",
            "Use encode_batch, which resizes, or fit them with tokenflow_sdk.pictures.images.fit.",
        )
    return np.ascontiguousarray(images)


def psnr(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> float:
    """Peak signal-to-noise ratio in dB of two u8 arrays of the same shape; infinite if they are equal.

    Example:
        >>> round(psnr(np.zeros((4, 4, 3), np.uint8), np.ones((4, 4, 3), np.uint8)), 2)
        48.13
    """
    error = float(np.mean(np.square(a.astype(np.float64) - b)))
    return float("inf") if error == 0 else 10 * float(np.log10(255**2 / error))


def ssim(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> float:
    """Mean structural similarity of two u8 images [H, W, 3], from -1 to 1.

    Computed on luma with uniform 7 x 7 windows. Source: Wang et al., "Image quality assessment: from error visibility to
    structural similarity", 2004.
    """
    luma = np.array([0.299, 0.587, 0.114])
    windows = [np.lib.stride_tricks.sliding_window_view(picture @ luma, (7, 7)) for picture in (a, b)]
    (x, y), (xx, yy) = ([w.mean(axis=(2, 3)) for w in windows], [w.var(axis=(2, 3), ddof=1) for w in windows])
    xy = ((windows[0] * windows[1]).mean(axis=(2, 3)) - x * y) * 49 / 48
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    return float(np.mean((2 * x * y + c1) * (2 * xy + c2) / ((x * x + y * y + c1) * (xx + yy + c2))))
