"""Decode image files with Pillow, within a limit on their size, and say why a file cannot be used."""

from __future__ import annotations

import inspect
import io
import re
import struct
import sys
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

from PIL import Image, ImageFile, PngImagePlugin, TiffImagePlugin, UnidentifiedImageError

from tokenflow_sdk.errors import (
    ColorProfileWarning,
    CorruptImageError,
    ImageReadError,
    ImageShapeError,
    ImageTooLargeError,
    TokenFlowError,
)
from tokenflow_sdk.pictures.color_profile import Conversion, srgb_conversion
from tokenflow_sdk.pictures.preparation import Color
from tokenflow_sdk.pictures.rgb import to_rgb

__all__ = ["FORMATS", "MAX_ASPECT", "MAX_PIXELS", "check_size", "decode_file", "decode_image", "raised_elsewhere"]

MAX_PIXELS = 89_478_485
"""Default limit on an image's number of pixels, which is Pillow's limit against decompression bombs."""
MAX_ASPECT = 100
"""Largest ratio of the long side to the short side. Beyond it a crop shows almost nothing of the image, and resizing its short
side up would take too much memory."""
FORMATS = (
    *("JPEG", "PNG", "GIF", "BMP", "PPM", "WEBP", "TIFF", "AVIF", "HEIF"),
    *("JPEG2000", "ICO", "DIB", "PCX", "PSD", "QOI", "SGI", "TGA"),
)
"""Pillow's names of the formats that are read. Its others are left out: EPS starts Ghostscript, and most of the rest hold
nothing that a tokenizer is for. HEIF is read where the application has registered a plugin for it."""

_JPEG_FORMATS = ("JPEG", "MPO")
_ORIENTATION = 0x0112
_TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_PILLOW_ERRORS = frozenset(
    (
        *(AssertionError, AttributeError, EOFError, IndexError, KeyError, NotImplementedError, OSError, OverflowError),
        *(RuntimeError, SyntaxError, TypeError, UnicodeDecodeError, UnidentifiedImageError, UserWarning, ValueError),
        *(ZeroDivisionError, struct.error, zlib.error),
    )
)
"""What Pillow's decoders raise for damaged bytes. A subclass, such as TimeoutError, is not Pillow's."""
_TEXT_CHUNKS = (b"tEXt", b"zTXt", b"iTXt")
_ORIENTED_TEXTS = (b"XML:com.adobe.xmp\0", b"Raw profile type exif\0")


class _TiffFile(TiffImagePlugin.TiffImageFile):
    """Pillow's TIFF reader, for grey of 12 and 16 bits in both byte orders and polarities, and without its own size limit.

    It leaves the orientation to `_upright`, because Pillow's fails where any other EXIF tag is broken.
    """

    def _setup(self) -> None:
        photometric, bits = self.tag_v2.get(262, 0), self.tag_v2.get(258, (1,))
        if photometric == 0 and bits in ((12,), (16,)):
            # Pillow knows fewer layouts where white is zero, and does not invert those; `to_rgb` does, by the tag.
            self.tag_v2[262] = 1
            super()._setup()
            self.tag_v2[262] = 0
        else:
            super()._setup()

    def load_prepare(self) -> None:
        # Older versions of Pillow have neither the limit nor these attributes.
        if hasattr(self, "_tile_size") and getattr(self, "_im", self) is None:
            self.im = Image.core.new(self.mode, self._tile_size)  # type: ignore[attr-defined]
        super().load_prepare()

    def load_end(self) -> None:
        self._size = self.im.size


def decode_file(file: BinaryIO, name: str, max_pixels: int, draft_size: int | None, color: Color) -> Image.Image:
    """Decode an image file to upright 8-bit RGB over white.

    Args:
        file: a binary file object. It is read from its beginning if it can seek, and not closed.
        name: what error messages call it.
        max_pixels: largest number of pixels accepted. Pillow's own limit does not apply, except to WebP.
        draft_size: downscale JPEGs while decoding to a short side of at least this many pixels; None decodes at full size.
        color: `srgb` applies a colour profile, and is a ColorProfileWarning where it cannot; `as-stored` reads past it.

    Raises:
        ImageReadError: the file object is closed, in text mode, asynchronous, or cannot be read.
        CorruptImageError: empty, truncated, or not an image in one of `FORMATS`.
        ImageTooLargeError, ImageShapeError: as `check_size`.
    """
    with _named_errors(name):
        file = _seekable(file, name)
        try:
            return _decode(file, name, max_pixels, draft_size, color)
        except ValueError as error:
            if type(error) is not ValueError or raised_elsewhere(error) or not _is_png(file):
                raise
            # Perhaps Pillow refuses a sound PNG for the size of texts, which nobody here reads, or of its profile.
            shorter, profile_left_out = _without_texts(file)
            if profile_left_out and color == "srgb":
                _warn_of_profile(name, f"it has more than {PngImagePlugin.MAX_TEXT_CHUNK:,} bytes, as Pillow reads")
            return _decode(shorter, name, max_pixels, draft_size, color)


def decode_image(image: Image.Image, name: str, max_pixels: int, color: Color) -> Image.Image:
    """A Pillow image as upright 8-bit RGB over white. Arguments and errors as in `decode_file`."""
    check_size(image.size, name, max_pixels)
    with _named_errors(name):
        if isinstance(image, ImageFile.ImageFile) and image.tile and getattr(image, "fp", None) is None:
            raise _closed_error(name)
        return _upright(*_load(image, name, None, color, False))


def check_size(size: tuple[int, int], name: str, max_pixels: int) -> None:
    """Refuse sizes that cannot be used.

    Raises:
        ImageTooLargeError: more than `max_pixels` pixels.
        ImageShapeError: no pixels, or one side longer than `MAX_ASPECT` times the other.
    """
    width, height = size
    if min(size) < 1:
        raise ImageShapeError(f"{name} has no pixels ({width}x{height}).", "Give a picture.")
    if width * height > max_pixels:
        raise ImageTooLargeError(
            f"{name} has {width}x{height} = {width * height:,} pixels; the limit is {max_pixels:,}.",
            "Shrink it first, or raise max_pixels= if you trust its source.",
        )
    if max(size) > MAX_ASPECT * min(size):
        raise ImageShapeError(
            f"{name} is {width}x{height}, longer than {MAX_ASPECT} times its short side.", "Cut it into squarer pieces."
        )


def raised_elsewhere(error: BaseException) -> bool:
    """Whether an exception was raised in the application's code, e.g. in a signal handler or a file object's `read`.

    Such an exception is not about the image. Raised in the SDK's, Pillow's or Python's own code it is.
    """
    step = error.__traceback__
    while step is not None and step.tb_next is not None:
        step = step.tb_next
    if step is None:
        return False
    package = str(step.tb_frame.f_globals.get("__name__", "")).partition(".")[0]
    return package not in ("PIL", "numpy", "tokenflow_sdk") and package not in sys.stdlib_module_names


@contextmanager
def _named_errors(name: str) -> Iterator[None]:
    """Raise what Pillow raises as an error that names the image; leave every other exception alone."""
    try:
        yield
    except TokenFlowError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageTooLargeError(
            f"{name} is too large: {error}", "Shrink the picture first, or raise PIL.Image.MAX_IMAGE_PIXELS too."
        ) from error
    except Exception as error:
        if raised_elsewhere(error):
            raise
        if isinstance(error, OSError) and error.errno is not None:
            raise ImageReadError(f"{name} cannot be read: {error.strerror}.", "Check the file and its device.") from error
        if type(error) not in _PILLOW_ERRORS:
            raise
        if isinstance(error, ValueError) and re.search("closed (file|image)", str(error)):
            raise _closed_error(name) from error
        why = str(error) or type(error).__name__
        raise CorruptImageError(f"{name} is damaged or cut short: {why}.", "Copy or save the picture again.") from error


def _closed_error(name: str) -> ImageReadError:
    return ImageReadError(f"{name} is closed.", "Use it before it is closed, or give its path.")


def _seekable(file: BinaryIO, name: str) -> BinaryIO:
    """The file at its beginning; the rest of it in memory if it cannot seek."""
    if getattr(file, "closed", False):
        raise _closed_error(name)
    nothing: object = file.read(0)
    if inspect.isawaitable(nothing):
        if inspect.iscoroutine(nothing):
            nothing.close()
        raise ImageReadError(f"{name} is read asynchronously.", "Await its read() and give the bytes.")
    if not isinstance(nothing, (bytes, bytearray, memoryview)):
        raise ImageReadError(f"{name} is open in text mode.", 'Open it with mode "rb".')
    try:
        file.seek(0)
    except (OSError, AttributeError) as error:
        if raised_elsewhere(error) and not isinstance(error, io.UnsupportedOperation):
            raise
        return io.BytesIO(file.read())
    return file


def _decode(file: BinaryIO, name: str, max_pixels: int, draft_size: int | None, color: Color) -> Image.Image:
    image = _open(file, name, max_pixels)
    check_size(image.size, name, max_pixels)
    rgb, orientation = _load(image, name, draft_size, color, True)
    # Freed before the turned copy is made: three images at once would not fit where two do.
    del image
    return _upright(rgb, orientation)


def _open(file: BinaryIO, name: str, max_pixels: int) -> ImageFile.ImageFile:
    """As `Image.open`, but of `FORMATS` only, and without Pillow's limit on size, which the application may need as it is."""
    file.seek(0)
    prefix = file.read(16)
    if not prefix:
        raise CorruptImageError(f"{name} is empty.", "Give a picture, e.g. PNG or JPEG.")
    Image.preinit()
    why = ""
    for picture_format in FORMATS:
        if picture_format not in Image.OPEN:
            Image.init()
        factory, accept = Image.OPEN.get(picture_format, (None, None))
        try:
            accepted = factory is not None and (accept is None or accept(prefix))
        except (struct.error, IndexError):  # it looks at more bytes than there are
            continue
        if isinstance(accepted, str):
            why = f" Pillow says: {accepted}."
        elif accepted:
            if picture_format == "ICO":
                _check_icons(file, name, max_pixels)
            file.seek(0)
            try:
                return _TiffFile(file) if picture_format == "TIFF" else factory(file, "")  # type: ignore[misc]
            except (SyntaxError, IndexError, TypeError, struct.error) as error:
                if raised_elsewhere(error):
                    raise
                # Not in words it is an exception of Python's on too few bytes, which tells nobody anything.
                if accept is not None and isinstance(error, SyntaxError) and isinstance(error.msg, str):
                    why = f" Pillow says: {error}."
    raise CorruptImageError(
        f"{name} is not a picture in a known format, or its beginning is damaged.{why}",
        "Check the file, or convert it to PNG or JPEG.",
    )


def _check_icons(file: BinaryIO, name: str, max_pixels: int) -> None:
    """Check the sizes inside an ICO file, because Pillow decodes one of its images when it opens it."""
    file.seek(4)
    (count,) = struct.unpack("<H", file.read(2))
    entries = [file.read(16) for _ in range(count)]
    for entry in entries:
        file.seek(*struct.unpack_from("<I", entry, 12))
        header = file.read(24)
        if header[:4] == b"\x89PNG":
            width, height = struct.unpack_from(">II", header, 16)
        else:
            width, height = struct.unpack_from("<ii", header, 4)
            height = abs(height) // 2  # the image, and its mask below it
        if width * height > max_pixels:
            check_size((width, height), name, max_pixels)


def _is_png(file: BinaryIO) -> bool:
    file.seek(0)
    return file.read(8) == b"\x89PNG\r\n\x1a\n"


def _without_texts(file: BinaryIO) -> tuple[BinaryIO, bool]:
    """A PNG file without its texts and too long a colour profile, and whether it had one.

    Short texts that may hold the orientation stay.
    """
    file.seek(0)
    kept, profile_left_out = [file.read(8)], False
    while len(head := file.read(8)) == 8:
        body = file.read(int.from_bytes(head[:4], "big") + 4)
        if head[4:] == b"iCCP" and _inflates_too_far(body):
            profile_left_out = True
        elif head[4:] not in _TEXT_CHUNKS or (len(body) < 2**16 and body.startswith(_ORIENTED_TEXTS)):
            kept += head, body
    return io.BytesIO(b"".join(kept)), profile_left_out


def _inflates_too_far(chunk: bytes) -> bool:
    """Whether the profile in an iCCP chunk is longer than Pillow reads."""
    stream, compressed = zlib.decompressobj(), chunk.partition(b"\0")[2][1:]
    try:
        stream.decompress(compressed, PngImagePlugin.MAX_TEXT_CHUNK)
    except zlib.error:
        return False
    return bool(stream.unconsumed_tail)


def _load(image: Image.Image, name: str, draft_size: int | None, color: Color, ours: bool) -> tuple[Image.Image, int]:
    """The image as stored, in RGB, and its EXIF orientation."""
    if draft_size is not None and image.format in _JPEG_FORMATS:
        image.draft(None, (draft_size, draft_size))
    transparency = _transparent_level(image)
    image.load()
    # After loading, because PNG may have EXIF behind the pixels, and Pillow itself turns TIFFs that the caller opened.
    convert = _conversion(image, name) if color == "srgb" else None
    return to_rgb(image, name, transparency, convert), _orientation(image, ours)


def _conversion(image: Image.Image, name: str) -> Conversion | None:
    try:
        return srgb_conversion(image.info.get("icc_profile"), image.mode, name)
    except (ValueError, OSError, TypeError) as error:
        if raised_elsewhere(error) or type(error) not in _PILLOW_ERRORS:
            raise
        _warn_of_profile(name, str(error))
        return None


def _warn_of_profile(name: str, why: str) -> None:
    warnings.warn(f"{name}: its colour profile is not applied, because {why}.", ColorProfileWarning, stacklevel=2)


def _transparent_level(image: Image.Image) -> Any:
    """A PNG's transparent grey level or colour, scaled to 8 bits as Pillow scales the pixels; None: as Pillow has it."""
    level = image.info.get("transparency")
    if image.format != "PNG" or not getattr(image, "tile", None):
        return None
    layout = image.tile[0][3]  # type: ignore[attr-defined]
    if isinstance(level, int) and layout in ("L;2", "L;4"):
        return level * (85 if layout == "L;2" else 17)
    if isinstance(level, tuple) and layout == "RGB;16B":
        return tuple(value >> 8 for value in level)
    return None


def _orientation(image: Image.Image, ours: bool) -> int:
    """The EXIF orientation, from 1 to 8. Other EXIF tags may be broken: only this one is used."""
    try:
        found = image.getexif().get(_ORIENTATION)
    except Exception as error:
        if raised_elsewhere(error) or type(error) not in _PILLOW_ERRORS:
            raise
        found, ours = None, True
    if isinstance(found, bytes):
        found = found[0]
    # Pillow stops at some broken entries. In an image of the caller's, a missing tag may have been removed on purpose.
    if found is None and ours:
        found = image.tag_v2.get(_ORIENTATION) if isinstance(image, _TiffFile) else _stored_orientation(image.info.get("exif"))
    return found if found in _TRANSPOSITIONS else 1


def _stored_orientation(exif: object) -> int:
    """Tag 0x0112 in EXIF bytes that Pillow cannot read; 1 if it is not there."""
    if not isinstance(exif, bytes):
        return 1
    tiff = exif.removeprefix(b"Exif\0\0")
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None or len(tiff) < 10:
        return 1
    (start,) = struct.unpack_from(order + "I", tiff, 4)
    for at in range(start + 2, len(tiff) - 11, 12):
        tag, kind = struct.unpack_from(order + "HH", tiff, at)
        if tag == _ORIENTATION:
            value: int = struct.unpack_from(order + {1: "B", 4: "I"}.get(kind, "H"), tiff, at + 8)[0]
            return value
    return 1


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    return image.transpose(_TRANSPOSITIONS[orientation]) if orientation in _TRANSPOSITIONS else image
