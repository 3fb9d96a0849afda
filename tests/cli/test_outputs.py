from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin, features

from tests.conftest import ROOT
from tests.support.fakes import FakeSession, fake_bundle
from tokenflow_sdk import Codes, Tokenizer
from tokenflow_sdk.cli import decode, encode, main, reconstruct
from tokenflow_sdk.cli.outputs import check_outputs, output_file, output_paths, save_image
from tokenflow_sdk.cli.parser import make_parser
from tokenflow_sdk.errors import ArgumentError, OutputError
from tokenflow_sdk.generation.results import png

PHOTO = ROOT / "examples" / "chelsea.jpg"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def codes() -> Codes:
    return Codes(np.zeros(5, int), (1, 2), 256, "fake", "ab" * 8)


@pytest.fixture
def _fake_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    for command in (encode, decode, reconstruct):
        monkeypatch.setattr(command, "open_tokenizer", lambda *_: Tokenizer(fake_bundle(), open_session=FakeSession))


def contents() -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path().iterdir() if path.is_file()}


@pytest.mark.parametrize(
    "words",
    [
        ["encode", "photo.png", "-o", "photo.png"],
        ["encode", "photo.png", "-o", "photo.png", "--force"],
        ["encode", "photo.png", "-o", "link.tfc"],
        ["encode", "photo.png", "-o", "hard.tfc", "--force"],
        ["encode", "photo.png", "-o", "sub/../photo.png"],
        ["encode", "link.tfc", "-o", "hard.tfc", "--force"],
        ["encode", "photo.png", "-o", "other.png"],
        ["encode", "photo.png", "-o", "other.png", "--force"],
        ["encode", "photo.png", "-o", "picture.tfc"],
        ["encode", "photo.png", "-o", "cut.jpg"],
        ["encode", "photo.png", "-o", "notes.txt"],
        ["encode", "photo.tfc/../photo.png", "picture.tfc", "-o", "."],
        ["decode", "codes.tfc", "-o", "codes.tfc", "--force"],
        ["decode", "codes.tfc", "-o", "new.tfc"],
        ["decode", "codes.png", "-o", "codes.png", "--force"],
        ["decode", "codes.tfc", "-o", "codes.png"],
        ["decode", "codes.png", "-o", "."],
        ["decode", "other.tfc"],
        ["decode", "codes.tfc", "other.tfc", "-o", "sub/.."],
        ["decode", "codes.tfc", "-o", "photo.jpg"],
        ["decode", "codes.tfc", "-o", "photo.webp"],
        ["decode", "codes.tfc", "-o", "cut.jpg"],
        ["decode", "codes.tfc", "-o", "text.png"],
        ["reconstruct", "photo.png", "-o", "photo.png", "--force"],
        ["reconstruct", "photo.png", "-o", "codes.png"],
        ["reconstruct", "photo.png", "-o", "codes.tfc"],
        ["reconstruct", "photo.png", "-o", "other.png"],
        ["reconstruct", "photo.png"],
        ["generate", "a red apple"],
        ["generate", "a red apple", "-o", "sub", "--progressive"],
        ["generate", "a red apple", "-o", "notes.txt"],
        ["generate", "a red apple", "-o", "g.png"],
        ["generate", "a red apple", "-o", "-", "--force"],
    ],
)
def test_nothing_of_value_is_replaced_and_no_model_opened(
    words: list[str], here: Path, codes: Codes, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "sub").mkdir()
    for name in ("photo.png", "other.png", "photo.jpg", "photo.webp", "1.png", "side_by_side.png", "sub/scales.png"):
        Image.new("RGB", (70, 70), "red").save(name)
    (here / "link.tfc").symlink_to("photo.png")
    os.link("photo.png", "hard.tfc")
    shutil.copy("other.png", "picture.tfc")
    (here / "cut.jpg").write_bytes(PHOTO.read_bytes()[:3000])
    for name in ("notes.txt", "text.png"):
        (here / name).write_text("kept")
    for name in ("codes.tfc", "codes.png", "other.tfc"):
        codes.save(name)
    before = contents()
    assert main([*words, "--bundle", "nowhere"]) == 2
    assert contents() == before
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "nowhere" not in error


@pytest.mark.usefixtures("_fake_tokenizer")
def test_force_replaces_what_tokenflow_did_not_write(here: Path, codes: Codes) -> None:
    Image.new("RGB", (70, 70), "red").save("picture.png")
    shutil.move("picture.png", "picture.tfc")
    Image.new("RGB", (70, 70), "red").save("photo.jpg")
    codes.save("codes.png")
    for name in ("empty.tfc", "empty.png"):
        (here / name).write_bytes(b"")
    assert main(["encode", str(PHOTO), "-o", "picture.tfc", "--force"]) == 0
    assert main(["encode", str(PHOTO), "-o", "empty.tfc"]) == 0
    assert main(["encode", str(PHOTO), "-o", "empty.tfc"]) == 0
    assert Codes.load("picture.tfc") == Codes.load("empty.tfc")
    assert main(["decode", "empty.tfc", "-o", "codes.png", "--force"]) == 0
    assert main(["decode", "empty.tfc", "-o", "empty.png"]) == 0
    assert main(["decode", "empty.tfc", "-o", "photo.jpg", "--force"]) == 0
    assert main(["decode", "empty.tfc", "-o", "photo.jpg"]) == 0
    for _ in range(2):
        assert main(["reconstruct", str(PHOTO), "-o", "codes.png"]) == 0
    with Image.open("codes.png") as image:
        assert image.format == "PNG"


@pytest.mark.parametrize("ending", [".png", ".jpg", ".webp", ".tif", ".avif"])
def test_images_that_are_written_are_known_again(ending: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = Image.new("RGB", (9, 9), "red")
    if not features.check("avif") and ending == ".avif":
        pytest.skip("this Pillow has no AVIF")
    output = here / f"a{ending}"
    image.save(output)
    with pytest.raises(OutputError, match="exists and does not say that tokenflow wrote it.*--force"):
        check_outputs([], [output], codes=False, force=False)
    save_image(image, output)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)  # more are warned of, which is an error in tests
    check_outputs([], [output], codes=False, force=False)


def test_formats_without_a_place_for_the_mark_need_force(here: Path) -> None:
    save_image(Image.new("RGB", (9, 9)), here / "a.bmp")
    with pytest.raises(OutputError, match="--force"):
        check_outputs([], [here / "a.bmp"], codes=False, force=False)
    check_outputs([], [here / "a.bmp"], codes=False, force=True)


def test_images_of_earlier_versions_and_of_the_api_are_known_too(here: Path) -> None:
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("tokenflow_decoded", "ab")
    Image.new("RGB", (9, 9)).save("decoded.png", pnginfo=chunks)
    Path("drawn.png").write_bytes(png(Image.new("RGB", (9, 9)), {"prompt": "w5"}))
    check_outputs([], [here / "decoded.png", here / "drawn.png"], codes=False, force=False)


@pytest.mark.parametrize(
    ("text", "codes", "file"),
    [
        ("a.tfc", True, True),
        ("a.TFC", True, True),
        ("-", True, True),
        ("a", True, False),
        ("v1.0", True, False),
        ("a.tfc/", True, False),
        ("a.tfc/.", True, False),
        ("there.tfc", True, False),
        ("a.png", True, None),
        ("a.JPG", True, None),
        ("a.png/", True, False),
        ("there.png", True, False),
        ("a.png", False, True),
        ("sub.dir/a.jpeg", False, True),
        ("-", False, True),
        ("a", False, False),
        ("my.dir", False, False),
        ("a.tfc", False, None),
        ("a.pdf", False, None),
        ("-/", False, False),
    ],
)
def test_a_name_is_a_directory_unless_it_ends_as_what_is_written(text: str, codes: bool, file: bool | None, here: Path) -> None:
    for name in ("there.tfc", "there.png"):
        (here / name).mkdir()
    output = make_parser().parse_args(["encode", "x", f"--output={text}"]).output
    if file is None:
        with pytest.raises(ArgumentError, match=f"{text} does not end as .*for a directory: {text}/"):
            output_file(output, codes=codes)
        return
    assert output_file(output, codes=codes) == (Path(text) if file else None)


@pytest.mark.usefixtures("_fake_tokenizer")
def test_results_lie_in_the_directory_that_a_separator_says(here: Path) -> None:
    assert main(["encode", str(PHOTO), "-o", "my.tfc/"]) == 0
    assert main(["decode", "my.tfc", "-o", "v1.0"]) == 0
    assert main(["reconstruct", str(PHOTO), "-o", "sheets.png/"]) == 0
    assert main(["reconstruct", str(PHOTO), "-o", "sheets.png"]) == 0
    found = {str(path.relative_to(here)) for path in here.glob("*/*")}
    assert found == {"my.tfc/chelsea.tfc", "v1.0/chelsea.png", "sheets.png/side_by_side.png"}


def test_results_of_one_name_keep_the_endings_of_their_inputs() -> None:
    def names(*words: str, place: str = ".") -> list[str]:
        return [str(path) for path in output_paths({Path(word): Path(place) for word in words}, None, codes=True)]

    assert names("same.jpg", "other.png", "same.png") == ["same.jpg.tfc", "other.tfc", "same.png.tfc"]
    assert names("same.jpg", "same.png", "same.jpg.png") == ["same.jpg.tfc", "same.png.tfc", "same.jpg.png.tfc"]
    assert names("same.jpg", "same.jpg.png") == ["same.tfc", "same.jpg.tfc"]
    assert names("same", "same.png") == ["same.tfc", "same.png.tfc"]
    assert names("-", "stdin.png", "x.png") == ["stdin.tfc", "stdin.png.tfc", "x.tfc"]
    with pytest.raises(ArgumentError, match=r"a/x.png and b/x.png would both be written to x.png.tfc"):
        names("a/x.png", "a/x.jpg", "b/x.png")


@pytest.mark.usefixtures("_fake_tokenizer")
def test_a_directory_with_two_of_one_name_is_encoded_decoded_and_skipped(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "in").mkdir()
    for name, color in (("same.jpg", "red"), ("same.png", "blue"), ("other.png", "green")):
        Image.new("RGB", (70, 70), color).save(here / "in" / name)
    for command, source, out in (("encode", "in", "codes"), ("decode", "codes", "back")):
        words = [command, source, "-o", out]
        assert main(words) == 0
        capsys.readouterr()
        assert main(words) == 0
        assert "3 of 3 skipped" in capsys.readouterr().err
    assert sorted(os.listdir("codes")) == ["other.tfc", "same.jpg.tfc", "same.png.tfc"]
    assert sorted(os.listdir("back")) == ["other.png", "same.jpg.png", "same.png.png"]
    assert Codes.load("codes/same.jpg.tfc") != Codes.load("codes/same.png.tfc")


def test_a_replay_is_not_replaced_by_what_it_draws(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "a red apple", "--preset", "fast", "-o", "out"]) == 0
    before = (here / "out/1.png").read_bytes()
    assert main(["generate", "--replay", "out/1.png", "-o", "out", "--force"]) == 2
    assert "out/1.png is an input" in capsys.readouterr().err
    assert (here / "out/1.png").read_bytes() == before
    shutil.copy("out/1.png", "out/replay.png")
    Codes(np.zeros(1, int), (1, 2), 500, "x", "ab" * 8).save("out/1.png")
    assert main(["generate", "--replay", "out/replay.png", "-o", "out"]) == 2
    assert "out/1.png exists and is a file of codes" in capsys.readouterr().err
    assert sorted(os.listdir()) == ["out"]


def test_endings_that_are_written(here: Path) -> None:
    image = Image.new("RGB", (300, 200), "red")
    Image.init()
    for ending in sorted(Image.EXTENSION):
        output = here / f"x{ending}"
        try:
            save_image(image, output)
        except ArgumentError as error:
            assert "no ending of a picture format" in str(error)
            assert not output.exists()
            continue
        with Image.open(output) as written:
            assert written.size == image.size
            assert np.abs(np.asarray(written.convert("RGB"), int) - np.asarray(image, int)).max() < 8
    assert {"x.png", "x.jpg", "x.webp", "x.tif", "x.bmp"} <= set(os.listdir())
    with pytest.raises(OutputError, match="cannot be written as WEBP"):
        save_image(Image.new("RGB", (20000, 1)), here / "wide.webp")
