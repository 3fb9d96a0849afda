from __future__ import annotations

import io
import os
import re
import signal
import struct
import subprocess
import sys
import threading
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image, PngImagePlugin

from tests.pictures.test_rgb import chunk, png, tiff
from tokenflow_sdk.errors import CorruptImageError, ImageReadError, ImageTooLargeError
from tokenflow_sdk.pictures.decode import FORMATS, raised_elsewhere
from tokenflow_sdk.pictures.images import load_image, preprocess

RED = io.BytesIO()
Image.new("RGB", (40, 20), "red").save(RED, "PNG")
PNG = RED.getvalue()


def entry(tag: int, kind: int, count: int, value: bytes) -> bytes:
    return struct.pack("<HHI", tag, kind, count) + value


TURNED = entry(0x112, 3, 1, struct.pack("<HH", 6, 0))
GPS_AT = 8 + 2 + 24 + 4


def exif(*entries: bytes, tail: bytes = b"", count: int | None = None) -> bytes:
    head = b"II" + struct.pack("<HIH", 42, 8, len(entries) if count is None else count)
    return head + b"".join(entries) + bytes(4) + tail


EXIFS = {
    "plain": exif(TURNED),
    "GPS latitude 0/0": exif(
        TURNED,
        entry(0x8825, 4, 1, struct.pack("<I", GPS_AT)),
        tail=struct.pack("<H", 1) + entry(2, 5, 3, struct.pack("<I", GPS_AT + 18)) + bytes(28),
    ),
    "GPS pointer is text": exif(TURNED, entry(0x8825, 2, 4, b"abc\0")),
    "Exif pointer is a rational": exif(TURNED, entry(0x8769, 5, 1, struct.pack("<I", 8))),
    "Exif pointer leads nowhere": exif(TURNED, entry(0x8769, 4, 1, struct.pack("<I", 10**9))),
    "date leads nowhere": exif(entry(0x132, 2, 20, struct.pack("<I", 10**9)), TURNED),
    "kind 99": exif(entry(0x10E, 99, 20, bytes(4)), TURNED),
    "more entries counted than there are": exif(TURNED, count=900),
    "magic is 43": exif(TURNED)[:2] + b"\x2b\0" + exif(TURNED)[4:],
    "magic is 0": exif(TURNED)[:2] + b"\0\0" + exif(TURNED)[4:],
    "orientation is a byte": exif(entry(0x112, 1, 1, b"\6\0\0\0")),
    "orientation is a long": exif(entry(0x112, 4, 1, b"\6\0\0\0")),
}


@pytest.mark.parametrize("name", EXIFS)
@pytest.mark.parametrize("picture_format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_orientation_is_read_where_other_exif_is_broken(name: str, picture_format: str) -> None:
    lying, buffer = Image.new("RGB", (32, 64), "white"), io.BytesIO()
    if picture_format == "JPEG":
        lying.save(buffer, "JPEG")
        segment = b"Exif\0\0" + EXIFS[name]
        content = buffer.getvalue()
        content = content[:2] + b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment + content[2:]
    else:
        lying.save(buffer, picture_format, exif=EXIFS[name])
        content = buffer.getvalue()
    assert load_image(content).size == (64, 32)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("deflate", [False, True], ids=["raw", "deflate"])
@pytest.mark.parametrize("order", ["<", ">"], ids=["little", "big"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_tiff_with_broken_exif_is_turned_once(orientation: int, deflate: bool, order: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 64), np.uint8)
    more = ((0x0112, orientation), (0x8769, 10**9), (0x8825, 9))
    content = tiff(order, 1, 8, pixels.tobytes(), deflate=deflate, more=more)
    upright = {
        1: pixels,
        2: pixels[:, ::-1],
        3: pixels[::-1, ::-1],
        4: pixels[::-1],
        5: pixels.T,
        6: np.rot90(pixels, -1),
        7: np.rot90(pixels, 2).T,
        8: np.rot90(pixels),
    }
    assert np.array_equal(np.asarray(load_image(content))[..., 0], upright[orientation])


def test_an_orientation_that_the_caller_removed_is_not_applied() -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (32, 64)).save(buffer, "JPEG", exif=b"Exif\0\0" + EXIFS["plain"])
    with Image.open(buffer) as image:
        del image.getexif()[0x0112]
        assert load_image(image).size == (32, 64)


class SoftTimeLimitError(Exception):
    pass


class OutOfTimeError(ValueError):
    pass


@pytest.fixture
def ring() -> Iterator[Callable[[type[BaseException]], None]]:
    """Makes a signal handler raise an exception in a moment."""
    before = signal.getsignal(signal.SIGALRM)

    def start(kind: type[BaseException]) -> None:
        def handler(number: int, frame: FrameType | None) -> None:
            raise kind("the time is over")

        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, 0.02)

    yield start
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


KINDS = [SoftTimeLimitError, OutOfTimeError, TimeoutError, ValueError, OSError, RuntimeError]


# Of a kind that Pillow itself never catches; the other kinds are tested with a file object.
# The exception may come between the opening of a file and the `with` that closes it.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_what_a_signal_handler_raises_passes(ring: Callable[[type[BaseException]], None], tmp_path: Path) -> None:
    (tmp_path / "p.png").write_bytes(PNG)
    for source in (PNG, tmp_path / "p.png", Image.new("RGBA", (200, 100))):
        ring(SoftTimeLimitError)
        with pytest.raises(SoftTimeLimitError, match="the time is over"):
            for _ in range(3000):
                load_image(source)


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_file_object_raises_passes(kind: type[Exception]) -> None:
    class Source(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            if self.tell() > 16:
                raise kind("of the application")
            return super().read(size)

    with pytest.raises(kind, match="of the application") as caught:
        load_image(Source(PNG))
    assert type(caught.value) is kind
    assert raised_elsewhere(caught.value)


def test_what_reading_exif_raises_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    def getexif(self: Image.Image) -> Image.Exif:
        raise SoftTimeLimitError("the time is over")

    monkeypatch.setattr(Image.Image, "getexif", getexif)
    with pytest.raises(SoftTimeLimitError):
        load_image(PNG)


@pytest.mark.filterwarnings("ignore::tokenflow_sdk.errors.ColorProfileWarning")
@pytest.mark.parametrize("behind", [False, True], ids=["before the pixels", "behind the pixels"])
@pytest.mark.parametrize("kind", [b"zTXt", b"iTXt", b"iCCP", b"tEXt"])
def test_a_png_with_much_metadata_is_read(kind: bytes, behind: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    text = zlib.compress(bytes(2_000_000))
    body = {
        b"zTXt": b"workflow\0\0" + text,
        b"iTXt": b"workflow\0\1\0\0\0" + text,
        b"iCCP": b"x\0\0" + zlib.compress(os.urandom(1_200_000)),
        b"tEXt": b"workflow\0" + b"x" * 2_000_000,
    }[kind]
    monkeypatch.setattr(PngImagePlugin, "MAX_TEXT_MEMORY", 1_500_000)
    at = len(PNG) - 12 if behind else 33
    content = PNG[:at] + chunk(kind, body) + PNG[at:]
    assert load_image(content).getpixel((0, 0)) == (255, 0, 0)
    xmp = b'XML:com.adobe.xmp\0\0\0\0\0<x tiff:Orientation="6"/>'
    oriented = PNG[:33] + chunk(b"iTXt", xmp) + content[33:]
    assert load_image(oriented).size == (20, 40)


class Pipe(io.BytesIO):
    def seekable(self) -> bool:
        return False

    def seek(self, *_: int) -> int:
        raise io.UnsupportedOperation("seek")


class Upload:
    async def read(self, size: int = -1) -> bytes:
        return b""

    async def seek(self, position: int) -> int:
        return 0


def test_sources_that_cannot_be_read_are_not_called_damaged(tmp_path: Path) -> None:
    path = tmp_path / "p.png"
    path.write_bytes(PNG)
    with Image.open(path) as closed_image:
        pass
    released = Image.open(io.BytesIO(PNG))
    released.load()
    released.close()
    with path.open("rb") as closed_file:
        pass
    with path.open() as text_file:
        for source, words in (
            (closed_image, "is closed"),
            (released, "is closed"),
            (closed_file, "p.png is closed"),
            (text_file, 'text mode.*Open it with mode "rb"'),
            (io.StringIO("text"), "text mode"),
            (Upload(), "asynchronously.*Await"),
        ):
            with pytest.raises(ImageReadError, match=words):
                load_image(source)


def test_a_read_error_of_the_device_is_named() -> None:
    with os.fdopen(os.open("/proc/self/mem", os.O_RDONLY), "rb") as file, pytest.raises(ImageReadError, match="cannot be read"):
        load_image(file)


def test_pipes_are_read_once() -> None:
    assert load_image(Pipe(PNG)).size == (40, 20)
    for content, words in ((b"<html>404</html>", "not a picture in a known format"), (b"", "is empty")):
        with pytest.raises(CorruptImageError, match=words):
            load_image(Pipe(content))
    for buffering in (0, -1):
        reader, writer = os.pipe()
        os.write(writer, PNG)
        os.close(writer)
        with os.fdopen(reader, "rb", buffering=buffering) as pipe:
            assert load_image(pipe).size == (40, 20)


def test_max_pixels_alone_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3000)
    limits = set()
    finished = threading.Event()

    def watch() -> None:
        while not finished.is_set():
            limits.add(Image.MAX_IMAGE_PIXELS)

    watcher = threading.Thread(target=watch)
    watcher.start()
    pixels = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 100, 3), np.uint8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for picture_format in ("PNG", "TIFF", "BMP", "PPM", "GIF"):
            buffer = io.BytesIO()
            pixels.save(buffer, picture_format)
            assert preprocess(buffer.getvalue(), 32, "crop").shape == (32, 32, 3)
            with pytest.raises(ImageTooLargeError, match="the limit is 8,999"):
                load_image(buffer.getvalue(), max_pixels=8999)
    finished.set()
    watcher.join()
    assert limits == {3000}


def test_an_icon_is_checked_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(buffer, "ICO", sizes=[(64, 64)])
    assert load_image(buffer.getvalue()).getpixel((9, 9)) == (255, 0, 0)
    large = png(8, 0, [bytes(300)] * 300, 300)
    icon = struct.pack("<3H", 0, 1, 1) + bytes([0, 0, 0, 0]) + struct.pack("<HHII", 1, 32, len(large), 22) + large
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(ImageTooLargeError, match="300x300"):
        load_image(icon, max_pixels=80_000)
    bitmap = struct.pack("<IiiHH", 40, 300, 600, 1, 32) + bytes(24)
    icon = struct.pack("<3H", 0, 1, 1) + bytes([0, 0, 0, 0]) + struct.pack("<HHII", 1, 32, len(bitmap), 22) + bitmap
    with pytest.raises(ImageTooLargeError, match="300x300"):
        load_image(icon, max_pixels=80_000)


def test_formats_that_are_not_named_are_not_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_: pytest.fail("Ghostscript was started"))
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "EPS")
    assert "EPS" not in FORMATS
    with pytest.raises(CorruptImageError, match="not a picture in a known format"):
        load_image(buffer.getvalue())


@pytest.mark.parametrize(
    "picture_format", ["JPEG", "PNG", "GIF", "BMP", "PPM", "WEBP", "TIFF", "JPEG2000", "PCX", "SGI", "TGA"]
)
def test_named_formats_are_opened(picture_format: str) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (32, 16), (10, 200, 30)).save(buffer, picture_format)
    assert picture_format in FORMATS
    assert load_image(buffer.getvalue()).getpixel((5, 5)) == pytest.approx((10, 200, 30), abs=4)


@pytest.mark.parametrize("start", [b"hi\n", b"h", b"\n", b"\n\5", b"BM", b"\1\xda", b"II*\0", b"\x89PNG", b"GIF89a"])
def test_a_file_of_few_bytes_is_no_picture(start: bytes, tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(start)
    with pytest.raises(CorruptImageError, match=r"photo\.jpg is not a picture in a known format") as raised:
        load_image(tmp_path / "photo.jpg")
    assert not re.search("unpack|buffer|index|struct", str(raised.value))


def test_a_tiff_that_pillow_does_not_know_says_so() -> None:
    buffer = io.BytesIO()
    Image.new("L", (8, 8)).save(buffer, "TIFF", tiffinfo={339: 3})
    with pytest.raises(CorruptImageError, match="Pillow says: unknown pixel mode"):
        load_image(buffer.getvalue())


@pytest.mark.parametrize(("bits", "colour", "channels"), [(16, 0, 1), (8, 6, 4)], ids=["grey 16", "RGBA"])
def test_memory_inside_the_limit(bits: int, colour: int, channels: int, tmp_path: Path) -> None:
    """16 million pixels: 64 MB in RGB, as many in RGBA, and strips; copies of the whole image would be 200 MB and more."""
    side = 4000
    (tmp_path / "p.png").write_bytes(png(bits, colour, [bytes(side * channels * bits // 8)] * side, side))
    script = (
        "import resource, sys; from tokenflow_sdk.pictures.images import load_image, preprocess\n"
        "import numpy as np; load_image(np.zeros((9, 9, 4), np.uint8)); load_image(sys.argv[1], max_pixels=16_000_000)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    peaks = []
    small = tmp_path / "small.png"
    small.write_bytes(png(bits, colour, [bytes(9 * channels * bits // 8)] * 9, 9))
    for path in (small, tmp_path / "p.png"):
        done = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout))
    assert (peaks[1] - peaks[0]) * 1024 < 170_000_000
