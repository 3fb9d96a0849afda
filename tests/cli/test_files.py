from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import ROOT
from tokenflow_sdk import Codes, Tokenizer
from tokenflow_sdk.cli import main
from tokenflow_sdk.cli.files import code_files, image_files
from tokenflow_sdk.cli.outputs import Output, output_paths
from tokenflow_sdk.errors import ArgumentError, CodesReadError, ImageReadError

PHOTO = ROOT / "examples" / "chelsea.jpg"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "export")]))
    return tmp_path


def piped(*words: str, data: bytes | None = b"") -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([sys.executable, "-m", "tokenflow_sdk.cli", *words], input=data, capture_output=True, check=False)


def typed(*words: str, data: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    """What `piped` gives, without starting Python anew."""
    streams = [io.TextIOWrapper(io.BytesIO(content), encoding="utf-8") for content in (data, b"", b"")]
    with pytest.MonkeyPatch.context() as patch:
        for name, stream in zip(("stdin", "stdout", "stderr"), streams, strict=True):
            patch.setattr(sys, name, stream)
        status = main(list(words))
    for stream in streams[1:]:
        stream.flush()
    return subprocess.CompletedProcess(words, status, *(stream.buffer.getvalue() for stream in streams[1:]))  # type: ignore[attr-defined]


def test_standard_input_and_output(mini_bundle: Path, here: Path) -> None:
    bundle = ("--bundle", str(mini_bundle))
    with Tokenizer.from_pretrained(mini_bundle) as tokenizer:
        expected = tokenizer.encode(PHOTO)
        picture = np.asarray(tokenizer.decode(expected))
    for run, words in ((piped, ("-",)), (typed, ("-", "-o", "-")), (typed, (str(PHOTO), "-o", "-"))):
        done = run("encode", *words, *bundle, data=PHOTO.read_bytes())
        assert (done.returncode, Codes.from_bytes(done.stdout)) == (0, expected)
        assert b"30 codes" in done.stderr
    for run, words in ((piped, ("-",)), (typed, ("-", "-o", "-"))):
        done = run("decode", *words, *bundle, data=expected.to_bytes())
        assert done.returncode == 0
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(done.stdout))), picture)
    done = typed("reconstruct", str(PHOTO), "-o", "-", *bundle)
    assert Image.open(io.BytesIO(done.stdout)).format == "PNG"
    assert b"PSNR" in done.stderr
    assert os.listdir() == []
    assert typed("encode", "-", "-o", "x.tfc", *bundle, data=PHOTO.read_bytes()).returncode == 0
    assert typed("encode", "-", str(PHOTO), "-o", "out", *bundle, data=PHOTO.read_bytes()).returncode == 0
    assert Codes.load("x.tfc") == Codes.load("out/stdin.tfc") == Codes.load("out/chelsea.tfc") == expected
    Path("-").write_bytes(PHOTO.read_bytes())
    assert typed("encode", "./-", "-o", "y.tfc", *bundle).returncode == 0
    assert Codes.load("y.tfc") == expected


def test_mistakes_with_standard_streams(mini_bundle: Path, here: Path) -> None:
    bundle = ("--bundle", str(mini_bundle))
    for words, sentence in (
        (("encode", "-"), b"is empty"),
        (("decode", "-"), b"error: "),
        (("encode", "-", "-"), b"- was given twice"),
        (("encode", "-", "x.png", "-o", "-"), b"2 results cannot go into the one file -"),
    ):
        done = typed(*words, *bundle)
        assert (done.returncode, done.stdout) == (2, b"")
        assert sentence in done.stderr
        assert b"Traceback" not in done.stderr
    for redirected, sentence in (
        ("encode - 0> /dev/null", "standard input cannot be read: Bad file descriptor"),
        ("encode - <&-", "standard input cannot be read: it is closed"),
        ("decode - <&-", "standard input cannot be read: it is closed"),
        (f"encode {PHOTO} -o - >&-", "standard output cannot be written: it is closed"),
        (f"encode {PHOTO} -o - > /dev/full", "standard output cannot be written: No space left"),
    ):
        line = f"{sys.executable} -m tokenflow_sdk.cli {redirected} --bundle {mini_bundle}"
        shell = subprocess.run(["/bin/bash", "-c", line], capture_output=True, text=True, check=False)
        assert shell.returncode == 2
        assert sentence in shell.stderr
        assert len(shell.stderr.splitlines()) == 1
    assert os.listdir() == []


LONG = "a" * 300


@pytest.mark.parametrize(
    "words",
    [
        ["encode", LONG + ".jpg"],
        ["encode", "猫" * 100],
        ["encode", "a\0b.jpg"],
        ["encode", "\ud800.jpg"],
        ["encode", "z.png/x.jpg"],
        ["encode", "z.png", "-o", LONG + ".tfc"],
        ["encode", "z.png", "-o", LONG],
        ["encode", "z.png", "-o", "a\0b"],
        ["encode", "z.png", "-o", "a\0b.tfc"],
        ["encode", "z.png", "-o", "\ud800.tfc"],
        ["encode", "z.png", "-o", "z.png/out"],
        ["encode", "z.png", "-o", "z.png/out.tfc"],
        ["encode", "z.png", "-o", "/proc/out.tfc"],
        ["encode", "z.png", "-o", "/proc/out"],
        ["encode", "z.png", "--bundle", LONG],
        ["encode", "z.png", "--bundle", "a\0b"],
        ["encode", "z.png", "--bundle", "\ud800"],
        ["encode", "z.png", "--bundle", ""],
        ["encode", "z.png", "--bundle", "z.png/x"],
        ["encode", "z.png", "--bundle", "runs/exp--3"],
        ["encode", "z.png", "--bundle", "~nobody-of-this-name/x"],
        ["decode", LONG + ".tfc"],
        ["decode", "a\0b"],
        ["reconstruct", LONG],
        ["reconstruct", "a\0b", "-o", "x.png"],
        ["info", LONG],
        ["info", "a\0b"],
        ["info", "\ud800"],
        ["info", ""],
        ["verify", LONG],
        ["bench", "a\0b"],
        ["generate", "--replay", LONG],
        ["generate", "--replay", "a\0b"],
        ["generate", "x", "--preset", "fast", "-o", "z.png/x"],
        ["ask", LONG, "what?", "--bundle", LONG],
        ["cache", "list", "--cache", "z.png/x/y"],
        ["cache", "clear", "--cache", "z.png"],
        ["cache", "clear", "--cache", "a\0b"],
        ["cache", "clear", "--cache", LONG],
    ],
)
def test_names_that_cannot_be_used_get_a_sentence(words: list[str], here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (70, 70), "red").save("z.png")
    (here / "runs").mkdir()
    status = main(words)
    captured = capsys.readouterr()
    if words[:2] == ["cache", "list"]:
        assert (status, captured.err) == (0, "")
    else:
        assert (status, captured.err[:7]) == (2, "error: ")
        assert len(captured.err.splitlines()) == 1
    assert sorted(os.listdir()) == ["runs", "z.png"]


@pytest.mark.parametrize(
    "words", [["encode", ""], ["encode", "x.png", "-o", ""], ["decode", ""], ["cache", "clear", "--cache", ""]]
)
def test_an_empty_name_is_no_file(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(words)
    assert "a file has an empty name" in capsys.readouterr().err


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read anything")
@pytest.mark.parametrize(
    "words", [["encode", "closed"], ["encode", "closed/x.png"], ["info", "closed/x"], ["decode", "closed/x.tfc"]]
)
def test_forbidden_directories_are_named(words: list[str], here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "closed").mkdir(mode=0)
    assert main(words) == 2
    assert "Permission denied" in capsys.readouterr().err


def test_a_directory_that_cannot_be_listed_is_named(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(path: object) -> list[Path]:
        raise PermissionError(13, "Permission denied", str(path))

    (here / "closed").mkdir()
    monkeypatch.setattr(os, "scandir", forbidden)
    with pytest.raises(ImageReadError, match="closed cannot be read: Permission denied"):
        image_files([Path("closed")])


def test_what_is_left_out_of_a_directory_is_said(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pictures = here / "d"
    (pictures / ".git").mkdir(parents=True)
    (pictures / "deep").mkdir()
    for name in ("a.jfif", "c.heic", "e.jp2", "deep/README", "._b.jpg", "b.tfc", ".git/x.png"):
        (pictures / name).write_bytes(b"x")
    Image.new("RGB", (9, 9)).save(pictures / "b.jpg")
    assert image_files([Path("d"), Path("d/a.jfif")]) == {Path("d/b.jpg"): Path(), Path("d/a.jfif"): Path()}
    said = capsys.readouterr().err.splitlines()
    assert said == [
        "d: 4 left out (their endings are not those of pictures; name them to read them all the same): "
        "a.jfif, c.heic, e.jp2, deep/README",
        "d: 1 left out (metadata of macOS): ._b.jpg",
        "d: 1 left out (hidden directories): .git",
    ]
    (pictures / "b.jpg").unlink()
    with pytest.raises(ImageReadError, match="d holds no pictures"):
        image_files([Path("d")])
    (pictures / "b.jpg").write_bytes(b"x")
    with pytest.raises(ArgumentError, match="b.jpg was given twice"):
        image_files([Path("d"), Path("d/b.jpg")])


def test_directories_and_patterns_name_what_is_below_and_results_lie_likewise(here: Path) -> None:
    for name in ("in/a.png", "in/one/a.png", "in/one/two/b.PNG", "in/x[1].png", "other.png"):
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9)).save(here / name)
    below = {"in/a.png": ".", "in/x[1].png": ".", "in/one/a.png": "one", "in/one/two/b.PNG": "one/two"}

    def found(*words: str) -> dict[str, str]:
        return {str(path): str(place) for path, place in image_files([Path(word) for word in words]).items()}

    assert found("in", "other.png") == {**below, "other.png": "."}
    assert found("in/**/a.png") == {"in/a.png": ".", "in/one/a.png": "one"}
    assert found("in/x[1].png", "in/o*/*.png", "missing*.png") == {
        "in/x[1].png": ".",
        "in/one/a.png": "one",
        "missing*.png": ".",
    }
    assert output_paths(image_files([Path("in")]), Output(Path("out")), codes=True)[2:] == [
        Path("out/one/a.tfc"),
        Path("out/one/two/b.tfc"),
    ]
    assert (here / "out/one/two").is_dir()
    Codes(np.zeros(1, int), (1, 2), 500, "x", "ab" * 8).save(here / "in" / "one" / "c.TFC")
    assert code_files([Path("in")]) == {Path("in/one/c.TFC"): Path("one")}
    with pytest.raises(CodesReadError, match="out holds no files of codes"):
        code_files([Path("out")])


def test_a_tree_is_encoded_and_decoded_and_what_is_done_is_skipped(
    mini_bundle: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "in" / "deep").mkdir(parents=True)
    for name, color in (("a.png", "red"), ("deep/a.png", "blue")):
        Image.new("RGB", (70, 70), color).save(here / "in" / name)
    bundle = ["--bundle", str(mini_bundle)]
    assert main(["encode", "in", "-o", "codes", *bundle]) == 0
    assert main(["decode", "codes", "-o", "back", *bundle]) == 0
    assert {str(path.relative_to(here)) for path in here.glob("back/**/*.png")} == {"back/a.png", "back/deep/a.png"}
    before = (here / "back/a.png").stat().st_mtime_ns
    capsys.readouterr()
    assert main(["decode", "codes/**/*.tfc", "-o", "back", *bundle]) == 0
    captured = capsys.readouterr()
    assert (captured.out, "2 of 2 skipped: their images are there" in captured.err) == ("", True)
    assert (here / "back/a.png").stat().st_mtime_ns == before
    assert main(["decode", "codes", "-o", "back", *bundle, "--scales", "2"]) == 0
    assert capsys.readouterr().out.count("2 of 4 scales") == 2
    shutil.copy("back/deep/a.png", "back/a.png")
    assert main(["decode", "codes", "-o", "back", *bundle, "--scales", "2"]) == 0
    assert capsys.readouterr().out == "codes/a.tfc -> back/a.png  2 of 4 scales\n"
    assert main(["decode", "codes", "-o", "back", *bundle, "--force"]) == 0
    assert capsys.readouterr().out.count("4 of 4 scales") == 2


def test_codes_beside_their_pictures_are_not_reported_as_left_out(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (9, 9)).save("a.png")
    for name in ("a.tfc", "B.TFC"):
        (here / name).write_bytes(b"x")
    assert image_files([Path()]) == {Path("a.png"): Path()}
    assert capsys.readouterr().err == ""


def test_many_files_are_checked_in_linear_time(here: Path) -> None:
    class Counted(type(Path())):  # type: ignore[misc]
        compared = 0

        def __eq__(self, other: object) -> bool:
            Counted.compared += 1
            return super().__eq__(other)

        __hash__ = type(Path()).__hash__

    paths = [Counted(f"{i}{ending}") for i in range(1000) for ending in (".jpg", ".png")]
    found = image_files(paths)
    assert list(found) == paths
    assert len(output_paths(found, Output(Path("out")), codes=True)) == 2000
    assert Counted.compared < 20_000
