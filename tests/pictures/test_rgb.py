from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from tokenflow_sdk.errors import CorruptImageError
from tokenflow_sdk.pictures import rgb
from tokenflow_sdk.pictures.images import load_image
from tokenflow_sdk.pictures.rgb import to_rgb

RAMP = [255 * i // 63 for i in range(64)]


def tiff(
    order: str,
    photometric: int,
    bits: int,
    data: bytes,
    *,
    samples: int = 1,
    sample_format: int = 1,
    extra: int | None = None,
    deflate: bool = False,
    more: tuple[tuple[int, int], ...] = (),
) -> bytes:
    """A TIFF of 64 x 32 pixels in one strip, with `more` tags."""
    data = zlib.compress(data) if deflate else data
    tags = [(256, 64), (257, 32), (258, bits), (259, 8 if deflate else 1), (262, photometric), (273, 0), (277, samples)]
    tags += [(278, 32), (279, len(data)), *([(338, extra)] if extra is not None else []), (339, sample_format), *more]
    tags.sort()
    at = 8 + 2 + 12 * len(tags) + 4
    entries = b"".join(struct.pack(f"{order}HHII", tag, 4, 1, at if tag == 273 else value) for tag, value in tags)
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HIH", 42, 8, len(tags))
    return head + entries + bytes(4) + data


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(bits: int, colour: int, rows: list[bytes], width: int, *chunks: bytes) -> bytes:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, len(rows), bits, colour, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunks) + pixels + chunk(b"IEND", b"")


def row(image: Image.Image) -> list[int]:
    array = np.asarray(image)
    assert (array == array[..., :1]).all()
    return [int(value) for value in array[0, :, 0]]


def packed(values: np.ndarray, bits: int, order: str) -> bytes:
    """Rows of 64 values, `bits` each."""
    if bits >= 8:
        return np.tile(values, (32, 1)).astype(f"{order}u{bits // 8}").tobytes()
    digits = "".join(f"{value:0{bits}b}" for value in values)
    return int(digits, 2).to_bytes(len(digits) // 8, "big") * 32


@pytest.mark.parametrize("deflate", [False, True], ids=["raw", "deflate"])
@pytest.mark.parametrize("order", ["<", ">"], ids=["little", "big"])
@pytest.mark.parametrize("photometric", [0, 1], ids=["white is zero", "black is zero"])
@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_grey_tiffs_of_every_depth_order_and_polarity(bits: int, photometric: int, order: str, deflate: bool) -> None:
    largest = 2**bits - 1
    values = np.array([round(level * largest / 255) for level in RAMP])
    expected = [(value * 255 + largest // 2) // largest for value in values.tolist()]
    if photometric == 0:
        expected = [255 - level for level in expected]
    found = load_image(tiff(order, photometric, bits, packed(values, bits, order), deflate=deflate))
    assert row(found) == expected


@pytest.mark.parametrize("photometric", [0, 1])
def test_grey_of_12_bits_is_scaled_by_its_own_largest_value(photometric: int) -> None:
    values = np.array([round(level * 4095 / 255) for level in RAMP])
    digits = "".join(f"{value:012b}" for value in values)
    content = tiff("<", photometric, 12, int(digits, 2).to_bytes(96, "big") * 32)
    assert row(load_image(content)) == (RAMP if photometric else [255 - level for level in RAMP])


def test_a_white_is_zero_tiff_that_the_caller_opened() -> None:
    values = np.array([level * 257 for level in RAMP])
    with Image.open(io.BytesIO(tiff("<", 0, 16, packed(values, 16, "<")))) as image:
        assert row(load_image(image)) == [255 - level for level in RAMP]


@pytest.mark.parametrize("mode", ["I;16", "I;16L", "I;16B", "I;16N"])
def test_16_bit_modes_in_memory(mode: str) -> None:
    levels = np.array([[0, 257, 32768, 65535]], ">u2" if mode == "I;16B" else "<u2")
    assert row(load_image(Image.frombytes(mode, (4, 1), levels.tobytes()))) == [0, 1, 128, 255]


def test_mode_i_is_8_bits_where_nothing_says_more_and_no_pixel_needs_more() -> None:
    def loaded(*levels: int) -> list[int]:
        return row(load_image(Image.fromarray(np.array([levels], np.int32))))

    assert loaded(0, 100, 255) == [0, 100, 255]
    assert loaded(0, 257, 65535) == [0, 1, 255]
    assert row(load_image(Image.new("L", (2, 1), 77).convert("I"))) == [77, 77]
    # A maximal value above 255 makes Pillow read a PGM as 16 bits, scaled to 65535.
    assert row(load_image(b"P5 2 1 65535\n" + struct.pack(">2H", 200, 255))) == [1, 1]
    # Signed 16-bit samples say their depth.
    values = np.full(64, 255)
    assert row(load_image(tiff("<", 1, 16, packed(values, 16, "<"), sample_format=2))) == [1] * 64


@pytest.mark.parametrize(
    ("pixels", "words"),
    [
        (np.array([[-1, 5]], np.int32), "negative pixels"),
        (np.array([[0, 65536]], np.int32), "32-bit pixels"),
        (np.array([[0, 0.5]], np.float32), "floating-point pixels"),
    ],
)
def test_pixels_whose_range_is_not_known_are_refused(pixels: np.ndarray, words: str) -> None:
    with pytest.raises(CorruptImageError, match=words):
        to_rgb(Image.fromarray(pixels), "p")


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_the_transparent_grey_level_of_a_png_is_white(bits: int) -> None:
    rows = [(1).to_bytes(2, "big") if bits == 16 else bytes([1])]
    transparent, other = (png(bits, 0, rows, 1 if bits >= 8 else 8 // bits, chunk(b"tRNS", bytes([0, t]))) for t in (1, 0))
    assert load_image(transparent).getpixel((0 if bits >= 8 else 8 // bits - 1, 0)) == (255, 255, 255)
    # One pixel of level 1, which is not the transparent one.
    shown = load_image(other).getpixel((0 if bits >= 8 else 8 // bits - 1, 0))
    assert shown == ({1: 255, 2: 85, 4: 17, 8: 1, 16: 0}[bits],) * 3


@pytest.mark.parametrize("bits", [8, 16])
def test_the_transparent_colour_of_a_png_is_white(bits: int) -> None:
    kind = {8: "B", 16: "H"}[bits]
    colours = [(250, 2, 3), (9, 8, 7)] if bits == 8 else [(64000, 512, 768), (2304, 2048, 1792)]
    rows = [struct.pack(f">6{kind}", *colours[0], *colours[1])]
    content = png(bits, 2, rows, 2, chunk(b"tRNS", struct.pack(">3H", *colours[0])))
    assert np.asarray(load_image(content)).tolist() == [[[255, 255, 255], [9, 8, 7]]]


@pytest.mark.parametrize("order", ["<", ">"])
def test_16_bit_colour_keeps_the_high_byte(order: str) -> None:
    pixels = np.tile(np.array([0, 255, 32768], f"{order}u2"), (32, 64, 1))
    content = tiff(order, 2, 16, pixels.tobytes(), samples=3)
    assert load_image(content).getpixel((0, 0)) == (0, 0, 128)
    assert load_image(png(16, 2, [struct.pack(">3H", 0, 255, 32768)], 1)).getpixel((0, 0)) == (0, 0, 128)
    assert load_image(png(16, 6, [struct.pack(">4H", 0, 255, 32768, 65535)], 1)).getpixel((0, 0)) == (0, 0, 128)
    assert load_image(png(16, 4, [struct.pack(">2H", 32768, 0)], 1)).getpixel((0, 0)) == (255, 255, 255)


def test_premultiplied_alpha_is_divided_before_compositing() -> None:
    grey = Image.new("LA", (1, 1), (200, 128))
    assert load_image(grey.convert("La")).getpixel((0, 0)) == pytest.approx(load_image(grey).getpixel((0, 0)), abs=1)
    straight = Image.new("RGBA", (1, 1), (200, 100, 0, 128))
    assert load_image(straight.convert("RGBa")).getpixel((0, 0)) == pytest.approx(load_image(straight).getpixel((0, 0)), abs=1)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV", "LAB"])
def test_opaque_8_bit_modes_are_as_pillow_converts_them(mode: str) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30, 3), np.uint8))
    image = Image.new("LAB", (4, 4), (150, 20, 200)) if mode == "LAB" else noise.convert(mode)
    assert np.array_equal(np.asarray(load_image(image)), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("mode", ["LA", "PA", "RGBA", "P", "L", "RGB"])
def test_strips_are_as_the_whole_image_over_white(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (41, 30, 4), np.uint8))
    if mode == "PA":
        image = image.convert("LA").convert("PA")
    elif mode != "RGBA":
        image = image.convert("RGB").convert(mode) if mode != "LA" else image.convert("LA")
    if mode in ["P", "L", "RGB"]:
        image.info["transparency"] = image.getpixel((3, 3))
    layer = image.convert("RGBA")
    whole = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    monkeypatch.setattr(rgb, "_STRIP_PIXELS", 200)
    assert np.array_equal(np.asarray(to_rgb(image, "p")), np.asarray(whole))
    grey = Image.fromarray(np.random.default_rng(1).integers(0, 65536, (41, 30), np.uint16))
    assert np.array_equal(np.asarray(to_rgb(grey, "p"))[..., 0], (np.asarray(grey).astype(int) + 128) // 257)
