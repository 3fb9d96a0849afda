from __future__ import annotations

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin

from tests.conftest import ROOT
from tests.pictures.test_rgb import chunk, png
from tokenflow_sdk import Tokenizer
from tokenflow_sdk.errors import ArgumentError, ColorProfileWarning, ImageReadError, MissingPackageError
from tokenflow_sdk.pictures import color_profile, rgb
from tokenflow_sdk.pictures.images import load_image

SRGB = ((0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.71410))
P3 = ((0.515121, 0.241196, -0.001053), (0.291977, 0.692245, 0.041885), (0.157104, 0.066574, 0.784073))
WHITE_POINT = (0.9642, 1, 0.8249)


def numbers(*values: float) -> bytes:
    return b"".join(struct.pack(">i", round(value * 65536)) for value in values)


SRGB_CURVE = b"para\0\0\0\0\0\3\0\0" + numbers(2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)


def gamma(value: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(value * 256)) + b"\0\0"


def sampled_srgb_curve(count: int) -> bytes:
    x = np.linspace(0, 1, count)
    y = np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)
    return b"curv\0\0\0\0" + struct.pack(">I", count) + np.round(y * 65535).astype(">u2").tobytes()


def profile(curve: bytes, colours: tuple[tuple[float, ...], ...] = (), space: bytes = b"RGB ", kind: bytes = b"mntr") -> bytes:
    """An ICC profile of version 2: of grey without `colours`, the primaries."""
    name = b"desc\0\0\0\0" + struct.pack(">I", 2) + b"p\0" + bytes(78)
    tags = [(b"desc", name), (b"cprt", b"text\0\0\0\0x\0\0\0"), (b"wtpt", b"XYZ \0\0\0\0" + numbers(*WHITE_POINT))]
    tags += [(tag, b"XYZ \0\0\0\0" + numbers(*value)) for tag, value in zip((b"rXYZ", b"gXYZ", b"bXYZ"), colours, strict=False)]
    tags += [(tag, curve) for tag in ((b"rTRC", b"gTRC", b"bTRC") if colours else (b"kTRC",))]
    table, body, at = struct.pack(">I", len(tags)), b"", 128 + 4 + 12 * len(tags)
    for tag, data in tags:
        table += tag + struct.pack(">II", at + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    head = struct.pack(
        ">I4sI4s4s4s6H4s", at + len(body), b"lcms", 0x02400000, kind, space, b"XYZ ", 2024, 1, 1, 0, 0, 0, b"acsp"
    )
    return (head + bytes(28) + numbers(*WHITE_POINT)).ljust(128, b"\0") + table + body


DISPLAY_P3 = profile(SRGB_CURVE, P3)
GREY_18 = profile(gamma(1.8), space=b"GRAY")


def noise(mode: str = "RGB", size: tuple[int, int] = (40, 30)) -> Image.Image:
    pixels = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 4), np.uint8))
    return pixels if mode == "RGBA" else pixels.convert("RGB").convert(mode)


def with_profile(image: Image.Image, data: object) -> Image.Image:
    image = image.copy()
    image.info["icc_profile"] = data
    return image


def to_srgb(image: Image.Image, data: bytes) -> Image.Image:
    """The oracle: Pillow's own function on the whole image."""
    opened = ImageCms.ImageCmsProfile(io.BytesIO(data))
    found = ImageCms.profileToProfile(image, opened, ImageCms.createProfile("sRGB"), outputMode="RGB")
    assert found is not None
    return found


def saved(image: Image.Image, picture_format: str, data: bytes, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, picture_format, icc_profile=data, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("picture_format", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_files_with_a_profile_become_srgb_in_strips(picture_format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    content = saved(noise(), picture_format, DISPLAY_P3)
    with Image.open(io.BytesIO(content)) as stored:
        stored.load()
        expected = np.asarray(to_srgb(stored, DISPLAY_P3))
        monkeypatch.setattr(rgb, "_STRIP_PIXELS", 100)
        assert np.array_equal(np.asarray(load_image(content)), expected)
        assert np.array_equal(np.asarray(load_image(stored)), expected)
        assert np.array_equal(np.asarray(load_image(content, color="as-stored")), np.asarray(stored))
        assert not np.array_equal(expected, np.asarray(stored))


def test_a_photo_in_display_p3_has_nearly_the_codes_of_its_srgb_original() -> None:
    with Image.open(ROOT / "examples" / "chelsea.jpg") as photo:
        original = Image.fromarray(np.clip((np.asarray(photo, float) - 128) * 1.2 + 128, 0, 255).astype(np.uint8))
    opened = ImageCms.ImageCmsProfile(io.BytesIO(DISPLAY_P3))
    wide = ImageCms.profileToProfile(original, ImageCms.createProfile("sRGB"), opened)
    assert wide is not None
    content = saved(wide, "PNG", DISPLAY_P3)
    with Tokenizer.from_pretrained("tiny") as tokenizer:
        codes, honoured, ignored = (
            tokenizer.encode(source, color=color)
            for source, color in ((original, "srgb"), (content, "srgb"), (content, "as-stored"))
        )
        assert tokenizer.encode(content) == honoured
        assert (tokenizer.reconstruct(content) == tokenizer.reconstruct(content, color="as-stored")) is False
    assert np.count_nonzero(honoured.indices != codes.indices) < 250
    assert np.count_nonzero(ignored.indices != codes.indices) > 600


@pytest.mark.parametrize(
    "data",
    [
        profile(SRGB_CURVE, SRGB),
        profile(sampled_srgb_curve(1024), SRGB),
        profile(sampled_srgb_curve(26), SRGB),
        ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(),
        profile(SRGB_CURVE, space=b"GRAY"),
        None,
        b"",
    ],
    ids=["parametric", "1024 samples", "26 samples", "LittleCMS", "grey", "none", "empty"],
)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "P"])
def test_pixels_that_are_srgb_stay_as_stored(data: object, mode: str) -> None:
    image = with_profile(noise(mode), data)
    assert np.array_equal(np.asarray(load_image(image)), np.asarray(load_image(image, color="as-stored")))


@pytest.mark.parametrize("mode", ["RGBA", "RGBX", "P", "YCbCr", "HSV", "RGBa"])
def test_every_coloured_mode_is_converted_before_it_is_put_on_white(mode: str) -> None:
    image = noise("RGBA").convert(mode) if mode == "RGBa" else noise(mode)
    layer = image.convert("RGBA")
    converted = to_srgb(layer.convert("RGB"), DISPLAY_P3)
    converted.putalpha(layer.getchannel("A"))
    expected = Image.alpha_composite(Image.new("RGBA", image.size, "white"), converted).convert("RGB")
    assert np.array_equal(np.asarray(load_image(with_profile(image, DISPLAY_P3))), np.asarray(expected))


def test_every_grey_mode_is_converted() -> None:
    levels = noise("L")
    expected = np.asarray(to_srgb(levels, GREY_18))
    alike = [levels, Image.merge("LA", [levels, Image.new("L", levels.size, 255)]), levels.convert("I")]
    wide = np.asarray(levels).astype("<u2") * 257
    alike += [Image.fromarray(wide), Image.frombytes("I;16B", levels.size, wide.astype(">u2").tobytes())]
    for image in alike:
        assert np.array_equal(np.asarray(load_image(with_profile(image, GREY_18))), expected)
    clear = Image.merge("LA", [levels, Image.new("L", levels.size, 0)])
    assert (np.asarray(load_image(with_profile(clear, GREY_18))) == 255).all()
    assert np.asarray(load_image(with_profile(levels.convert("1"), GREY_18))).max() == 255


def test_transparent_levels_and_colours_stay_white() -> None:
    compressed = chunk(b"iCCP", b"p\0\0" + zlib.compress(GREY_18))
    content = png(16, 0, [struct.pack(">2H", 257 * 100, 257 * 50)], 2, compressed, chunk(b"tRNS", struct.pack(">H", 257 * 100)))
    found = np.asarray(load_image(content))
    assert found[0, 0].tolist() == [255] * 3
    assert found[0, 1].tolist() == np.asarray(to_srgb(Image.new("L", (1, 1), 50), GREY_18))[0, 0].tolist()
    colours = with_profile(noise(), DISPLAY_P3)
    colours.info["transparency"] = colours.getpixel((3, 3))
    assert load_image(colours).getpixel((3, 3)) == (255, 255, 255)
    assert load_image(colours).getpixel((4, 3)) == to_srgb(noise(), DISPLAY_P3).getpixel((4, 3))


def cmyk_profile() -> bytes:
    """A lut8 profile of two points an ink: Lab falls with black, and with the ink in its place."""
    inks = np.stack(np.meshgrid(*[[0, 1]] * 4, indexing="ij"), -1).reshape(-1, 4)
    lightness = 255 * (1 - inks[:, 3]) * (1 - 0.2 * inks[:, :3].sum(1))
    lab = np.stack([lightness, 128 + 60 * (inks[:, 1] - inks[:, 0]), 128 + 60 * (inks[:, 2] - inks[:, 0])], -1)
    ramp = bytes(range(256))
    lut = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + numbers(1, 0, 0, 0, 1, 0, 0, 0, 1) + ramp * 4 + lab.astype(np.uint8).tobytes()
    lut += ramp * 3
    at = 128 + 4 + 12
    head = struct.pack(
        ">I4sI4s4s4s6H4s", at + len(lut), b"lcms", 0x02400000, b"prtr", b"CMYK", b"Lab ", 2024, 1, 1, 0, 0, 0, b"acsp"
    )
    table = struct.pack(">I4sII", 1, b"A2B0", at, len(lut))
    return (head + bytes(28) + numbers(*WHITE_POINT)).ljust(128, b"\0") + table + lut


def test_cmyk_is_converted_by_a_profile_of_inks() -> None:
    content = saved(noise("CMYK"), "JPEG", cmyk_profile(), quality=95)
    with Image.open(io.BytesIO(content)) as stored:
        assert stored.mode == "CMYK"
        expected = np.asarray(to_srgb(stored, cmyk_profile()))
    assert np.array_equal(np.asarray(load_image(content)), expected)
    assert not np.array_equal(np.asarray(load_image(content, color="as-stored")), expected)


UNUSABLE = {
    "text": ("RGB", b"no profile", "cannot open profile"),
    "cut short": ("RGB", DISPLAY_P3[:200], "cannot"),
    "not bytes": ("RGB", "sRGB", "it is str, not bytes"),
    "an array": ("RGB", np.zeros(3, np.uint8), "it is ndarray"),
    "too long": ("RGB", DISPLAY_P3 + bytes(2**22), "at most 4,194,304 are read"),
    "of inks on RGB": ("RGB", cmyk_profile(), "it is for CMYK colours, and the picture's mode is RGB"),
    "of RGB on inks": ("CMYK", DISPLAY_P3, "it is for RGB colours, and the picture's mode is CMYK"),
    "of RGB on grey": ("L", DISPLAY_P3, "mode is L"),
    "of grey on RGB": ("RGB", GREY_18, "it is for GRAY colours"),
    "of RGB on Lab": ("LAB", DISPLAY_P3, "mode is LAB"),
    "of HSV": ("RGB", profile(SRGB_CURVE, P3, space=b"HSV "), "."),
    "a link": ("RGB", profile(SRGB_CURVE, P3, kind=b"link"), "."),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_a_profile_that_cannot_be_applied_is_a_warning(name: str) -> None:
    mode, data, words = UNUSABLE[name]
    image = with_profile(Image.new("LAB", (4, 4), (150, 20, 200)) if mode == "LAB" else noise(mode), data)
    with pytest.warns(ColorProfileWarning, match=rf"its colour profile is not applied, because .*{words}"):
        found = load_image(image)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(np.asarray(found), np.asarray(load_image(image, color="as-stored")))


def test_damaged_profiles_give_the_picture_and_nothing_but_warnings() -> None:
    random, image = np.random.default_rng(0), noise(size=(9, 9))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ColorProfileWarning)
        for source in (DISPLAY_P3, GREY_18, cmyk_profile()):
            for _ in range(60):
                damaged = bytearray(source)
                for at in random.integers(0, min(len(source), 700), 4):
                    damaged[at] = random.integers(256)
                assert load_image(with_profile(image, bytes(damaged))).size == (9, 9)


def test_a_warning_made_an_error_passes() -> None:
    with warnings.catch_warnings(), pytest.raises(ColorProfileWarning):
        warnings.simplefilter("error")
        load_image(with_profile(noise(), b"x"))


def test_a_profile_in_a_png_with_much_text_is_applied_and_a_long_one_is_a_warning() -> None:
    pixels = [np.asarray(noise())[y].tobytes() for y in range(30)]
    text = chunk(b"zTXt", b"t\0\0" + zlib.compress(bytes(PngImagePlugin.MAX_TEXT_CHUNK + 1)))
    compressed = chunk(b"iCCP", b"p\0\0" + zlib.compress(DISPLAY_P3))
    found = load_image(png(8, 2, pixels, 40, text, compressed))
    assert np.array_equal(np.asarray(found), np.asarray(to_srgb(noise(), DISPLAY_P3)))
    long = chunk(b"iCCP", b"p\0\0" + zlib.compress(DISPLAY_P3 + bytes(PngImagePlugin.MAX_TEXT_CHUNK)))
    with pytest.warns(ColorProfileWarning, match="more than 1,048,576 bytes"):
        assert np.array_equal(np.asarray(load_image(png(8, 2, pixels, 40, long))), np.asarray(noise()))
    assert np.array_equal(np.asarray(load_image(png(8, 2, pixels, 40, long), color="as-stored")), np.asarray(noise()))


def test_other_notes_about_colour_in_a_png_change_nothing() -> None:
    pixels = [np.asarray(noise())[y].tobytes() for y in range(30)]
    chunks = [
        chunk(b"gAMA", struct.pack(">I", 100000)),
        chunk(b"cHRM", struct.pack(">8I", 31270, 32900, 68000, 32000, 26500, 69000, 15000, 6000)),
        chunk(b"sRGB", b"\0"),
        chunk(b"cICP", bytes([9, 16, 0, 1])),
    ]
    for notes in ([note] for note in chunks):
        assert np.array_equal(np.asarray(load_image(png(8, 2, pixels, 40, *notes))), np.asarray(noise()))


def test_the_callers_image_is_left_alone_and_a_closed_one_is_named() -> None:
    image = with_profile(noise(), DISPLAY_P3)
    load_image(image)
    assert np.array_equal(np.asarray(image), np.asarray(noise()))
    assert image.info["icc_profile"] == DISPLAY_P3
    stored = Image.open(io.BytesIO(saved(noise(), "PNG", DISPLAY_P3)))
    stored.close()
    with pytest.raises(ImageReadError, match="is closed"):
        load_image(stored)


def test_without_littlecms_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> None:
        raise ImportError("No module named _imagingcms")

    monkeypatch.setattr(ImageCms, "ImageCmsProfile", missing)
    with pytest.raises(MissingPackageError, match=r"built without LittleCMS.*color='as-stored'"):
        load_image(with_profile(noise(), DISPLAY_P3))
    assert load_image(noise()) is not None
    assert load_image(with_profile(noise(), DISPLAY_P3), color="as-stored") is not None


@pytest.mark.parametrize("color", ["sRGB", "", None, 5, ["srgb"], np.zeros(2)])
def test_there_are_two_ways_to_read_colours(color: object) -> None:
    with pytest.raises(ArgumentError, match="Choose one of: srgb, as-stored"):
        load_image(noise(), color=color)  # type: ignore[arg-type]


def test_srgb_profiles_differ_less_than_the_bound_and_other_curves_more() -> None:
    assert color_profile.srgb_conversion(profile(gamma(2.2), SRGB), "RGB", "p") is not None
