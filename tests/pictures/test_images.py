from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.conftest import ROOT
from tokenflow_sdk.errors import (
    ArgumentError,
    ArrayError,
    CorruptImageError,
    ImageReadError,
    ImageShapeError,
    ImageTooLargeError,
    TokenFlowError,
)
from tokenflow_sdk.pictures import images
from tokenflow_sdk.pictures.images import check_batch, fit, load_image, pictures_in, preprocess, psnr, ssim
from tokenflow_sdk.pictures.preparation import PREPROCESS_MODES, Preprocess

PHOTO = ROOT / "examples" / "chelsea.jpg"


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(width * height).integers(0, 256, (height, width, 3), np.uint8))


def encoded(image: Image.Image, picture_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, picture_format, **options)
    return buffer.getvalue()


def box_halved(array: np.ndarray) -> np.ndarray:
    """Oracle of one 2x box step on even sides: the rounded mean of each 2 x 2 block."""
    blocks = array.reshape(array.shape[0] // 2, 2, array.shape[1] // 2, 2, 3).astype(np.float64)
    return np.floor(blocks.mean(axis=(1, 3)) + 0.5).astype(np.uint8)


def test_crop_halves_then_resizes_the_short_side_then_cuts_the_centre() -> None:
    picture = noise(320, 160)
    halved = Image.fromarray(box_halved(box_halved(np.asarray(picture))))  # 80 x 40: 160 and 80 are at least 2 x 32
    resized = np.asarray(halved.resize((64, 32), Image.Resampling.BICUBIC))
    # Pillow rounds after each side; bicubic amplifies that a little.
    difference = np.abs(fit(picture, 32, "crop").astype(int) - resized[:, 16:48])
    assert difference.max() <= 4
    assert difference.mean() < 1


@given(st.integers(8, 400), st.integers(8, 400), st.sampled_from([8, 17, 64]))
@settings(max_examples=60, deadline=None)
def test_crop_agrees_with_the_evaluation_recipe(width: int, height: int, size: int) -> None:
    picture = noise(width, height)
    expected = picture
    while min(expected.size) >= 2 * size:
        expected = expected.resize((expected.size[0] // 2, expected.size[1] // 2), resample=Image.Resampling.BOX)
    scale = size / min(expected.size)
    expected = expected.resize(tuple(round(x * scale) for x in expected.size), resample=Image.Resampling.BICUBIC)
    array = np.array(expected)
    y, x = (array.shape[0] - size) // 2, (array.shape[1] - size) // 2
    assert np.array_equal(fit(picture, size, "crop"), array[y : y + size, x : x + size])


def test_squash_takes_the_whole_picture_and_loses_its_aspect() -> None:
    picture = noise(100, 50)
    assert np.array_equal(fit(picture, 32, "squash"), np.asarray(picture.resize((32, 32), Image.Resampling.BICUBIC)))


def on_a_grey_square(picture: Image.Image, size: int) -> np.ndarray:
    """Oracle of the released preprocessing of understanding models (docs/model.md, section 2)."""
    side = max(picture.size)
    square = Image.new("RGB", (side, side), (int(0.5 * 255),) * 3)
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return np.asarray(square.resize((size, size), Image.Resampling.BICUBIC))


@given(st.integers(1, 99), st.integers(1, 99), st.sampled_from([8, 31]), st.sampled_from([700, 2**20]))
@settings(max_examples=30, deadline=None)
@example(481, 320, 384, 700)
@example(1, 100, 31, 700)
@example(99, 1, 31, 700)
def test_pad_grey_is_what_the_released_training_does(width: int, height: int, size: int, strip: int) -> None:
    picture = noise(width, height)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(images, "_STRIP_PIXELS", strip)
        assert np.array_equal(fit(picture, size, "pad-grey"), on_a_grey_square(picture, size))


def test_pad_grey_halves_very_tall_pictures_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "_MAX_SQUARE", 300 * 300)
    for size, halvings in (((30, 300), 0), ((30, 302), 1), ((20, 900), 2), ((900, 90), 0)):
        picture = noise(*size)
        expected = picture
        for _ in range(halvings):
            expected = expected.resize((expected.width // 2, expected.height // 2), Image.Resampling.BOX)
        assert np.array_equal(fit(picture, 32, "pad-grey"), on_a_grey_square(expected, 32))


def test_pad_keeps_the_whole_picture_on_white() -> None:
    found = fit(Image.new("RGB", (100, 50), (10, 20, 30)), 32, "pad")
    assert (found[8:24] == (10, 20, 30)).all()
    assert (found[:8] == 255).all()
    assert (found[24:] == 255).all()
    assert fit(noise(10, 1000), 32, "pad").shape == (32, 32, 3)


@pytest.mark.parametrize("mode", PREPROCESS_MODES)
def test_a_picture_of_the_right_size_is_untouched(mode: Preprocess) -> None:
    picture = noise(32, 32)
    assert np.array_equal(preprocess(picture, 32, mode), np.asarray(picture))


def test_every_kind_of_source_gives_the_same_picture(tmp_path: Path) -> None:
    content = encoded(noise(20, 30), "PNG")
    (tmp_path / "p.png").write_bytes(content)
    expected = np.asarray(noise(20, 30))
    with (tmp_path / "p.png").open("rb") as file:
        sources = [str(tmp_path / "p.png"), tmp_path / "p.png", content, bytearray(content), memoryview(content), file]
        sources.append(memoryview(bytes(byte for pair in zip(content, content, strict=True) for byte in pair))[::2])
        sources += [io.BytesIO(content), noise(20, 30), expected]
        for source in sources:
            assert np.array_equal(np.asarray(load_image(source)), expected)
        assert not file.closed


def test_the_callers_image_is_left_alone(tmp_path: Path) -> None:
    noise(20, 30).save(tmp_path / "p.png")
    with Image.open(tmp_path / "p.png") as image:
        load_image(image)
        assert image.getpixel((0, 0)) == noise(20, 30).getpixel((0, 0))
    rgb = noise(4, 4)
    preprocess(rgb, 8, "crop")
    assert rgb.size == (4, 4)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    upright = Image.new("RGB", (32, 16), "white")
    upright.paste((255, 0, 0), (0, 0, 8, 8))  # red marks the top left
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(undo[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    for picture_format in ("PNG", "TIFF"):
        assert np.array_equal(np.asarray(load_image(encoded(stored, picture_format, exif=exif))), np.asarray(upright))


def test_transparency_lies_over_white() -> None:
    clear = Image.new("RGBA", (2, 2), (10, 20, 30, 0))
    half = Image.new("RGBA", (2, 2), (0, 0, 0, 128))
    assert load_image(encoded(clear, "PNG")).getpixel((0, 0)) == (255, 255, 255)
    assert load_image(encoded(half, "PNG")).getpixel((0, 0)) == (127, 127, 127)
    assert load_image(encoded(half.convert("LA"), "PNG")).getpixel((0, 0)) == (127, 127, 127)
    palette = Image.new("P", (2, 2), 1)
    palette.putpalette([0, 0, 0, 200, 100, 50])
    assert load_image(encoded(palette, "PNG")).getpixel((0, 0)) == (200, 100, 50)
    assert load_image(encoded(palette, "PNG", transparency=1)).getpixel((0, 0)) == (255, 255, 255)
    assert (
        load_image(encoded(Image.new("RGB", (2, 2), (1, 2, 3)), "PNG", transparency=(1, 2, 3))).getpixel((0, 0)) == (255,) * 3
    )
    assert load_image(np.array([[[10, 20, 30, 0]]], np.uint8)).getpixel((0, 0)) == (255, 255, 255)


def test_16_bit_grey_is_scaled_not_clipped() -> None:
    levels = np.array([[0, 257, 32768, 65535]], np.uint16)
    found = np.asarray(load_image(encoded(Image.fromarray(levels), "PNG")))
    assert found[0, :, 0].tolist() == [0, 1, 128, 255]
    assert np.asarray(load_image(encoded(Image.fromarray(levels.astype(np.int32)), "TIFF")))[0, :, 1].tolist() == [
        0,
        1,
        128,
        255,
    ]


def test_other_colour_modes() -> None:
    red = Image.new("RGB", (8, 8), (255, 0, 0))
    assert load_image(encoded(red.convert("CMYK"), "TIFF")).getpixel((0, 0)) == (255, 0, 0)
    assert load_image(encoded(red.convert("CMYK"), "JPEG", quality=100)).mode == "RGB"
    assert load_image(encoded(Image.new("1", (8, 8), 1), "PNG")).getpixel((0, 0)) == (255, 255, 255)
    assert load_image(encoded(Image.new("L", (8, 8), 77), "PNG")).getpixel((0, 0)) == (77, 77, 77)
    assert load_image(Image.new("LAB", (8, 8))).mode == "RGB"
    assert np.asarray(load_image(np.full((3, 4), 9, np.uint8)))[2, 3].tolist() == [9, 9, 9]
    assert np.asarray(load_image(np.full((3, 4, 1), 9, np.uint8)))[2, 3].tolist() == [9, 9, 9]


@pytest.mark.parametrize("picture_format", ["GIF", "PNG", "WEBP", "TIFF"])
def test_the_first_frame_of_an_animation(picture_format: str) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    options = {"lossless": True} if picture_format == "WEBP" else {}
    content = encoded(frames[0], picture_format, save_all=True, append_images=frames[1:], **options)
    assert load_image(content).getpixel((8, 8)) == (255, 0, 0)


def test_fast_decodes_large_jpegs_smaller_and_leaves_small_ones_alone() -> None:
    large = Image.open(PHOTO).resize((1804, 1200), Image.Resampling.BICUBIC)
    content = encoded(large, "JPEG", quality=95)
    assert load_image(content, draft_size=256).size == (451, 300)
    reference, fast = preprocess(content, 256, "crop"), preprocess(content, 256, "crop", fast=True)
    assert 30 < psnr(reference, fast) < math.inf
    assert np.array_equal(preprocess(PHOTO, 256, "crop", fast=True), preprocess(PHOTO, 256, "crop"))
    assert np.array_equal(preprocess(PHOTO, 64, "pad", fast=False), preprocess(PHOTO, 64, "pad"))


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    for source, words in (
        (tmp_path / "nothing.jpg", r"nothing\.jpg cannot be read: No such file"),
        (tmp_path, "is not a file"),
        ("http://example.org/a.jpg", "is an address.*Download it first"),
        ("a\0b.png", "cannot be read"),
        (Path("/dev/zero"), "is not a file"),
    ):
        with pytest.raises(ImageReadError, match=words):
            load_image(source)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.png", b"", "empty.png is empty"),
        ("text.png", b"hello, I am a text\n" * 50, "not a picture in a known format"),
        ("cut.jpg", PHOTO.read_bytes()[:20000], "cut.jpg is damaged or cut short"),
        ("cut.png", encoded(noise(64, 64), "PNG")[:3000], "cut.png is damaged or cut short"),
        ("head.png", encoded(noise(64, 64), "PNG")[:20], "head.png"),
    ],
)
def test_damaged_files_are_named(name: str, content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CorruptImageError, match=words):
        load_image(tmp_path / name)
    with pytest.raises(CorruptImageError, match="bytes>"):
        load_image(content)


def test_bombs_are_refused_before_they_are_decoded() -> None:
    content = encoded(Image.new("1", (20000, 20000)), "PNG")
    assert len(content) < 100_000
    with pytest.raises(ImageTooLargeError, match="too large|limit is"):
        load_image(content)
    with pytest.raises(ImageTooLargeError, match=r"64x64 = 4,096 pixels; the limit is 1,000.*raise max_pixels"):
        preprocess(noise(64, 64), 8, "crop", max_pixels=1000)
    with pytest.raises(ImageTooLargeError):
        load_image(np.zeros((64, 64), np.uint8), max_pixels=1000)


@pytest.mark.parametrize("mode", PREPROCESS_MODES)
def test_long_thin_pictures_are_refused(mode: Preprocess) -> None:
    with pytest.raises(ImageShapeError, match="1x5000, longer than 100 times"):
        preprocess(Image.new("RGB", (1, 5000)), 256, mode)
    assert preprocess(Image.new("RGB", (1, 100)), 8, mode).shape == (8, 8, 3)


@pytest.mark.parametrize(
    ("array", "error", "words"),
    [
        (np.zeros((4, 4, 3)), ArrayError, r"not float64.*\(array \* 255\)"),
        (np.full((4, 4, 3), np.nan), ArrayError, "NaN"),
        (np.zeros((4, 4, 3), bool), ArrayError, "not bool"),
        (np.zeros((4, 4, 3), np.int64), ArrayError, "astype"),
        (np.zeros((3, 4, 4), np.uint8), None, ""),
        (np.zeros((4, 4, 2), np.uint8), ArrayError, r"\[4, 4, 2\]"),
        (np.zeros((3, 8, 8), np.uint8), ArrayError, r"transpose\(1, 2, 0\)"),
        (np.zeros((1, 4, 4, 3), np.uint8), ArrayError, "encode_array"),
        (np.zeros((0, 4, 3), np.uint8), ImageShapeError, "no pixels"),
        (np.float32(3), ArrayError, "u8 array, not float32"),
        (3, ArgumentError, "cannot be made from int"),
        (None, ArgumentError, "NoneType"),
    ],
)
def test_arrays_that_are_no_pictures(array: object, error: type[Exception] | None, words: str) -> None:
    if error is None:
        assert load_image(array).size == (4, 3)  # type: ignore[arg-type]
        return
    with pytest.raises(error, match=words):
        load_image(array)  # type: ignore[arg-type]


def test_pixels_of_unknown_range_are_refused() -> None:
    with pytest.raises(CorruptImageError, match="floating-point"):
        load_image(encoded(Image.fromarray(np.zeros((4, 4), np.float32)), "TIFF"))
    with pytest.raises(CorruptImageError, match="32-bit"):
        load_image(encoded(Image.fromarray(np.full((4, 4), 10**6, np.int32)), "TIFF"))


def test_unknown_preprocessing_is_named() -> None:
    with pytest.raises(ArgumentError, match="no preprocessing 'stretch'.*crop, squash, pad"):
        preprocess(noise(4, 4), 8, "stretch")  # type: ignore[arg-type]


FORMATS = ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP"]


@given(st.sampled_from(FORMATS), st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damaged_bytes_give_a_picture_or_a_named_error(picture_format: str, data: st.DataObject) -> None:
    content = bytearray(encoded(noise(24, 17), picture_format))
    for _ in range(data.draw(st.integers(0, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(0, len(content)))]
    try:
        picture = preprocess(content, 16, "crop")
    except TokenFlowError as error:
        assert error.hint
    else:
        assert picture.shape == (16, 16, 3)


@given(st.binary(max_size=300))
@settings(deadline=None)
def test_any_bytes_give_a_picture_or_a_named_error(content: bytes) -> None:
    with pytest.raises(TokenFlowError):
        preprocess(content, 16, "crop")


def test_pictures_in_a_directory(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    for name in ("b.PNG", "a.jpg", "notes.txt", "below/c.webp"):
        (tmp_path / name).touch()
    (tmp_path / "d.png").mkdir()
    assert pictures_in(tmp_path) == [tmp_path / "a.jpg", tmp_path / "b.PNG"]
    assert pictures_in(tmp_path, below=True) == [tmp_path / "a.jpg", tmp_path / "b.PNG", tmp_path / "below" / "c.webp"]
    with pytest.raises(ImageReadError, match=r"d\.png holds no pictures"):
        pictures_in(tmp_path / "d.png")
    for path in (tmp_path / "missing", tmp_path / "a.jpg"):
        with pytest.raises(ImageReadError, match=f"{path.name} is no directory"):
            pictures_in(path)


def test_check_batch() -> None:
    batch = np.zeros((2, 8, 8, 3), np.uint8)
    assert check_batch(batch, 8) is batch
    strided = np.zeros((2, 3, 8, 8), np.uint8).transpose(0, 2, 3, 1)
    assert check_batch(strided, 8).flags.c_contiguous
    for array, error, words in (
        (batch[0], ArrayError, r"images\[None\]"),
        (batch[:0], ArrayError, "B >= 1"),
        (batch.astype(np.float32), ArrayError, "not float32"),
        (batch.transpose(0, 3, 1, 2), ArrayError, "transpose"),
        (batch, ImageShapeError, "8x8; this tokenizer takes 16x16.*encode_batch"),
        ([[1]], ArrayError, "got list"),
    ):
        with pytest.raises(error, match=words):
            check_batch(array, 16)  # type: ignore[arg-type]


def test_psnr() -> None:
    a = np.zeros((4, 4, 3), np.uint8)
    assert psnr(a, a) == math.inf
    assert psnr(a, a + 255) == 0
    assert psnr(a, a + 1) == pytest.approx(48.13, abs=0.01)


def test_ssim_is_the_mean_over_windows() -> None:
    rng = np.random.default_rng(0)
    a = rng.integers(0, 256, (12, 10, 3), np.uint8)
    b = np.clip(a + rng.normal(0, 20, a.shape), 0, 255).astype(np.uint8)
    x, y = (picture @ np.array([0.299, 0.587, 0.114]) for picture in (a, b))
    found = []
    for i in range(12 - 6):
        for j in range(10 - 6):
            p, q = x[i : i + 7, j : j + 7].ravel(), y[i : i + 7, j : j + 7].ravel()
            (vp, vpq), (_, vq) = np.cov(p, q)
            top = (2 * p.mean() * q.mean() + 6.5025) * (2 * vpq + 58.5225)
            found.append(top / ((p.mean() ** 2 + q.mean() ** 2 + 6.5025) * (vp + vq + 58.5225)))
    assert ssim(a, b) == pytest.approx(np.mean(found))
    assert ssim(a, a) == pytest.approx(1)


@pytest.mark.parametrize("limit", [0, "9", 9.5, None, True])
def test_limits_that_are_no_integers_are_named(limit: object) -> None:
    with pytest.raises(ArgumentError, match=f"max_pixels={limit!r} accepts no picture"):
        load_image(np.zeros((3, 3), np.uint8), max_pixels=limit)  # type: ignore[arg-type]
    assert load_image(np.zeros((3, 3), np.uint8), max_pixels=np.int64(9)).size == (3, 3)  # type: ignore[arg-type]
