"""Load images and preprocess them to the u8 RGB input of the encode graph, exactly as the released system does."""

from __future__ import annotations

import io
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from tokenflow_sdk.arguments import integer
from tokenflow_sdk.errors import (
    ArgumentError,
    ArrayError,
    CorruptImageError,
    ImageError,
    ImageReadError,
    ImageShapeError,
    ImageTooLargeError,
)

__all__ = [
    "MAX_ASPECT",
    "MAX_PIXELS",
    "PREPROCESS_MODES",
    "ImageSource",
    "Preprocess",
    "check_batch",
    "describe",
    "fit",
    "load_image",
    "pictures_in",
    "preprocess",
    "psnr",
    "ssim",
]

MAX_PIXELS = 89_478_485
"""Default limit on an image's number of pixels, which is Pillow's limit against decompression bombs."""
MAX_ASPECT = 100
"""Largest ratio of the long side to the short side. Beyond it a crop shows almost nothing of the image, and resizing its short
side up would take too much memory."""

ImageSource: TypeAlias = "str | os.PathLike[str] | bytes | bytearray | memoryview | BinaryIO | Image.Image | NDArray[np.uint8]"
Preprocess = Literal["crop", "squash", "pad"]
PREPROCESS_MODES: tuple[Preprocess, ...] = get_args(Preprocess)

_SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"))
_WHITE = (255, 255, 255)
_JPEG_FORMATS = ("JPEG", "MPO")


def pictures_in(directory: Path) -> list[Path]:
    """The image files of a directory, chosen by their suffix and sorted by name.

    Raises:
        ImageReadError: the directory does not exist or has no image files.
    """
    found = (
        sorted(p for p in directory.iterdir() if p.suffix.lower() in _SUFFIXES and p.is_file()) if directory.is_dir() else []
    )
    if not found:
        raise ImageReadError(f"{directory} holds no pictures.", f"Known endings: {' '.join(sorted(_SUFFIXES))}.")
    return found


def preprocess(
    source: ImageSource, size: int, mode: Preprocess, *, fast: bool = False, max_pixels: int = MAX_PIXELS
) -> NDArray[np.uint8]:
    """Load an image and make it square: u8 RGB [size, size, 3].

    Args:
        source: a path, bytes, binary file object, PIL image, or u8 array [H, W], [H, W, 1], [H, W, 3] or [H, W, 4].
        size: side of the result in pixels.
        mode: `crop`, `squash` or `pad`; see `fit`.
        fast: let the JPEG decoder downscale large photos by 2, 4 or 8 while decoding. Much faster, but the pixels, and hence
            some codes, differ slightly from those of the released system.
        max_pixels: largest number of pixels accepted.

    Raises:
        ImageReadError, CorruptImageError, ImageTooLargeError, ImageShapeError, ArrayError, ArgumentError: see
            `tokenflow_sdk.errors`.
    """
    if mode not in PREPROCESS_MODES:
        raise ArgumentError(f"There is no preprocessing {mode!r}.", f"Choose one of: {', '.join(PREPROCESS_MODES)}.")
    return fit(load_image(source, max_pixels=max_pixels, draft_size=size if fast else None), size, mode)


def load_image(source: ImageSource, *, max_pixels: int = MAX_PIXELS, draft_size: int | None = None) -> Image.Image:
    """Load an image as 8-bit RGB.

    The EXIF orientation is applied, animations give their first frame, 16-bit values are scaled to 8 bits, and transparent
    images are composited over white.

    Args:
        source: as for `preprocess`. The caller's image or file object is neither changed nor closed.
        max_pixels: largest number of pixels accepted.
        draft_size: downscale JPEGs while decoding to a short side of at least this many pixels; None decodes at full size.

    Raises:
        ImageReadError, CorruptImageError, ImageTooLargeError, ImageShapeError, ArrayError, ArgumentError: see
            `tokenflow_sdk.errors`.
    """
    name = describe(source)
    max_pixels = integer("max_pixels", max_pixels, 1, None, "accepts no picture.", "Give an integer from 1 on.")
    if isinstance(source, np.ndarray):
        return _from_array(source, name, max_pixels)
    if isinstance(source, Image.Image):
        _check_size(source.size, name, max_pixels)
        return _decode_rgb(source, name, None)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _from_file(io.BytesIO(source), name, max_pixels, draft_size)
    if isinstance(source, (str, os.PathLike)):
        return _from_path(source, name, max_pixels, draft_size)
    if hasattr(source, "read") and hasattr(source, "seek"):
        return _from_file(source, name, max_pixels, draft_size)
    raise ArgumentError(
        f"A picture cannot be made from {type(source).__name__}.",
        "Give a path, bytes, a binary file, a PIL image or a u8 array.",
    )


def describe(source: object) -> str:
    """A short name of an image or file source for error messages.

    Example:
        >>> describe("photo.jpg"), describe(b"1234"), describe(np.zeros((480, 640, 3), np.uint8))
        ('photo.jpg', '<4 bytes>', '<array uint8[480, 640, 3]>')
    """
    if isinstance(source, (str, os.PathLike)):
        return os.fspath(source)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return f"<{len(source)} bytes>"
    if isinstance(source, np.ndarray):
        return f"<array {source.dtype}{list(source.shape)}>"
    if isinstance(source, Image.Image):
        return str(getattr(source, "filename", "") or f"<{source.mode} image {source.width}x{source.height}>")
    return str(getattr(source, "name", f"<{type(source).__name__}>"))


def _from_path(path: str | os.PathLike[str], name: str, max_pixels: int, draft_size: int | None) -> Image.Image:
    if name.startswith(("http://", "https://")):
        raise ImageReadError(f"{name} is an address, not a file.", "Download it first and give its path or bytes.")
    path = Path(path)
    try:
        # Opening a pipe or a device could block for ever, so only regular files are opened.
        if stat.S_ISREG(path.stat().st_mode):
            with path.open("rb") as file:
                return _from_file(file, name, max_pixels, draft_size)
    except ImageError:
        raise
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise ImageReadError(f"{name} cannot be read: {why}.", "Check the path and its permissions.") from error
    raise ImageReadError(f"{name} is not a file.", "Give the path of a picture.")


def _from_file(file: BinaryIO, name: str, max_pixels: int, draft_size: int | None) -> Image.Image:
    try:
        image = Image.open(file)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageTooLargeError(f"{name} is too large: {error}", "Shrink the picture first.") from error
    except UnidentifiedImageError as error:
        raise _unidentified_error(file, name) from error
    except MemoryError:
        raise
    except Exception as error:  # decoders raise any exception on damaged bytes
        raise _damaged_error(name, error) from error
    with image:
        _check_size(image.size, name, max_pixels)
        return _decode_rgb(image, name, draft_size)


def _unidentified_error(file: BinaryIO, name: str) -> CorruptImageError:
    file.seek(0)
    if not file.read(1):
        return CorruptImageError(f"{name} is empty.", "Give a picture, e.g. PNG or JPEG.")
    return CorruptImageError(
        f"{name} is not a picture in a known format, or its beginning is damaged.",
        "Check the file, or convert it to PNG or JPEG.",
    )


def _check_size(size: tuple[int, int], name: str, max_pixels: int) -> None:
    width, height = size
    if min(size) < 1:
        raise ImageShapeError(f"{name} has no pixels ({width}x{height}).", "Give a picture.")
    if width * height > max_pixels:
        raise ImageTooLargeError(
            f"{name} has {width}x{height} = {width * height:,} pixels; the limit is {max_pixels:,}.",
            "Shrink it first, or raise max_pixels if you trust its source.",
        )
    if max(size) > MAX_ASPECT * min(size):
        raise ImageShapeError(
            f"{name} is {width}x{height}, longer than {MAX_ASPECT} times its short side.", "Cut it into squarer pieces."
        )


def _decode_rgb(image: Image.Image, name: str, draft_size: int | None) -> Image.Image:
    try:
        if draft_size is not None and image.format in _JPEG_FORMATS:
            image.draft(None, (draft_size, draft_size))
        image.load()
        return _to_rgb(_apply_orientation(image), name)
    except (ImageError, MemoryError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageTooLargeError(f"{name} is too large: {error}", "Shrink the picture first.") from error
    except Exception as error:  # decoders raise any exception on damaged bytes
        raise _damaged_error(name, error) from error


def _damaged_error(name: str, error: Exception) -> CorruptImageError:
    why = str(error) or type(error).__name__
    return CorruptImageError(f"{name} is damaged or cut short: {why}.", "Copy or save the picture again.")


def _apply_orientation(image: Image.Image) -> Image.Image:
    """The image rotated as its EXIF orientation says; unchanged if the EXIF data are damaged."""
    try:
        return ImageOps.exif_transpose(image)
    except MemoryError:
        raise
    except Exception:
        return image


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode == "F":
        raise CorruptImageError(f"{name} holds floating-point pixels.", "Convert it to 8 bits first; its range is not known.")
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise CorruptImageError(f"{name} holds 32-bit pixels.", "Convert it to 8 or 16 bits first; its range is not known.")
        return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, (*_WHITE, 255)), layer).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _from_array(array: NDArray[Any], name: str, max_pixels: int) -> Image.Image:
    if array.dtype != np.uint8:
        raise ArrayError(f"A picture must be a u8 array, not {array.dtype}.", _dtype_hint(array))
    channels = array.shape[2] if array.ndim == 3 else 1
    if array.ndim not in (2, 3) or channels not in (1, 3, 4):
        raise ArrayError(
            f"A picture must be [H, W], [H, W, 1], [H, W, 3] or [H, W, 4], not {list(array.shape)}.",
            "Move channels last with array.transpose(1, 2, 0); for several pictures use encode_batch or encode_array.",
        )
    _check_size((array.shape[1], array.shape[0]), name, max_pixels)
    return _to_rgb(Image.fromarray(array[..., 0] if array.ndim == 3 and channels == 1 else array), name)


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
            is at least twice `size`, resize the short side to `size` (bicubic), crop the centre. `squash` is its understanding
            preprocessing: resize the whole image (bicubic) without keeping its aspect ratio. `pad` resizes the long side
            instead of the short one and centres the image on white.
    """
    if mode == "squash":
        return np.array(image.resize((size, size), Image.Resampling.BICUBIC))
    side = min if mode == "crop" else max
    while side(image.size) >= 2 * size and min(image.size) > 1:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / side(image.size)
    resized = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))), Image.Resampling.BICUBIC)
    if mode == "pad":
        canvas = Image.new("RGB", (size, size), _WHITE)
        canvas.paste(resized, ((size - resized.width) // 2, (size - resized.height) // 2))
        return np.array(canvas)
    left, top = (resized.width - size) // 2, (resized.height - size) // 2
    cropped: NDArray[np.uint8] = np.array(resized.crop((left, top, left + size, top + size)))
    return cropped


def check_batch(images: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """Check a batch of images for the encode graph, and return it C-contiguous.

    Args:
        images: u8 [B, size, size, 3], B >= 1.
        size: side in pixels that the tokenizer takes.

    Raises:
        ArrayError: not a u8 array of shape [B, H, W, 3] with B >= 1.
        ImageShapeError: the images have another size.
    """
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
