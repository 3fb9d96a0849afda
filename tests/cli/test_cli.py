from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import ROOT
from tokenflow_sdk import Codes, Tokenizer
from tokenflow_sdk.cli import main

PHOTO = ROOT / "examples" / "chelsea.jpg"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*words: object) -> int:
    return main([str(word) for word in words])


def test_encode_and_decode_one_picture(mini_bundle: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("encode", PHOTO, "--bundle", mini_bundle, "-o", "p.tfc") == 0
    assert run("decode", "p.tfc", "--bundle", mini_bundle, "-o", "p.png") == 0
    with Tokenizer.from_pretrained(mini_bundle) as tokenizer:
        expected = tokenizer.encode(PHOTO)
        assert Codes.load("p.tfc") == expected
        assert np.array_equal(np.asarray(Image.open("p.png")), np.asarray(tokenizer.decode(expected)))
    out = capsys.readouterr().out
    assert f"-> p.tfc  30 codes, {(here / 'p.tfc').stat().st_size} bytes" in out
    assert "4 of 4 scales" in out


def test_max_pixels_is_an_option(mini_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command, output in (("encode", "p.tfc"), ("reconstruct", "p.png")):
        assert run(command, PHOTO, "--bundle", mini_bundle, "-o", output, "--max-pixels", 1000) == 2
        assert "the limit is 1,000" in capsys.readouterr().err
        assert run(command, PHOTO, "--bundle", mini_bundle, "-o", output, "--max-pixels", 300_000_000) == 0


def test_several_files_go_into_a_directory(mini_bundle: Path, here: Path) -> None:
    pictures = here / "pictures"
    pictures.mkdir()
    for i in range(3):
        Image.new("RGB", (80, 70), (80 * i, 10, 10)).save(pictures / f"{i}.png")
    (pictures / "notes.txt").write_text("not a picture")
    assert run("encode", pictures, PHOTO, "--bundle", mini_bundle, "-o", "codes/deep", "--batch-limit", 2) == 0
    assert sorted(os.listdir("codes/deep")) == ["0.tfc", "1.tfc", "2.tfc", "chelsea.tfc"]
    assert run("decode", *sorted(Path("codes/deep").iterdir()), "--bundle", mini_bundle, "-o", "back", "--scales", 2) == 0
    assert sorted(os.listdir("back")) == ["0.png", "1.png", "2.png", "chelsea.png"]


def test_one_bad_file_of_several_does_not_stop_the_others(
    mini_bundle: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "bad.jpg").write_bytes(PHOTO.read_bytes()[:5000])
    (here / "empty.png").write_bytes(b"")
    assert run("encode", "bad.jpg", PHOTO, "empty.png", "--bundle", mini_bundle, "-o", "out") == 1
    assert os.listdir("out") == ["chelsea.tfc"]
    captured = capsys.readouterr()
    assert "error: bad.jpg is damaged or cut short" in captured.err
    assert "error: empty.png is empty" in captured.err
    assert "2 of 3 failed" in captured.err
    shutil.copy("bad.jpg", "out/bad.tfc")
    assert run("decode", "out/bad.tfc", "out/chelsea.tfc", "--bundle", mini_bundle, "-o", "back") == 1
    assert os.listdir("back") == ["chelsea.png"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["encode", "missing.jpg", "--bundle", "{bundle}"], "missing.jpg cannot be read: No such file"),
        (["encode", PHOTO, "--bundle", "nowhere"], "no bundle at nowhere"),
        (["encode", PHOTO, PHOTO, "--bundle", "{bundle}"], "was given twice"),
        (["encode", PHOTO, "x/chelsea.jpg", "--bundle", "{bundle}"], "would both be written to chelsea.jpg.tfc"),
        (["encode", PHOTO, "b.png", "--bundle", "{bundle}", "-o", "one.tfc"], "2 results cannot go into the one file"),
        (["encode", PHOTO, "--bundle", "{bundle}", "-o", "no/such/p.tfc"], "no/such/p.tfc cannot be written"),
        (["encode", PHOTO, "--bundle", "{bundle}", "--device", "tpu"], "no device 'tpu'"),
        (["encode", PHOTO, "--bundle", "{bundle}", "--batch-limit", "0"], "--batch-limit 0"),
        (["verify", "{bundle}", "--batch-limit", "0"], "--batch-limit 0"),
        (["encode", "empty", "--bundle", "{bundle}"], "empty holds no pictures"),
        (["decode", PHOTO, "--bundle", "{bundle}"], "not a file of TokenFlow codes"),
        (["decode", "p.tfc", "--bundle", "{bundle}", "--scales", "9"], "--scales 9 is no number of scales"),
        (["decode", "p.tfc", "--bundle", "{bundle}", "-o", "p.jp2"], "does not end as the name of an image"),
        (["decode", "other.tfc", "--bundle", "{bundle}"], "made by other"),
        (["info", "nowhere"], "no bundle at nowhere"),
        (["info", "a", "--bundle", "b"], "Two bundles were given"),
        (["bench", "{bundle}", "--batch-sizes", "1,x"], "no list of sizes"),
        (["bench", "{bundle}", "--repeat", "0"], "times nothing"),
        (["encode", "in/*.jpg", "--bundle", "{bundle}"], "No file matches in/*.jpg."),
        (["decode", "[y].tfc", "--bundle", "{bundle}"], "No file matches [y].tfc."),
        (["reconstruct", "missing.jpg", "--bundle", "{bundle}"], "missing.jpg cannot be read"),
    ],
)
def test_mistakes_get_a_sentence_and_status_2(
    words: list[object], sentence: str, mini_bundle: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "empty").mkdir()
    Codes(np.zeros(1, int), (1, 2), 500, "mini_clip", "ab" * 8).save("x.tfc")
    with Tokenizer.from_pretrained(mini_bundle) as tokenizer:
        tokenizer.codes(np.zeros(30, int)).save("p.tfc")
    Codes(np.zeros(5, int), (1, 2), 500, "other", "ab" * 8).save("other.tfc")
    before = sorted(os.listdir())
    assert run(*(str(word).format(bundle=mini_bundle) for word in words)) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.startswith("error: ")
    assert "Traceback" not in error
    assert sorted(os.listdir()) == before


def test_reconstruct_shows_every_scale(mini_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("reconstruct", PHOTO, "--bundle", mini_bundle, "-o", "sheet.png") == 0
    assert re.search(r"PSNR \d+\.\d\d dB, 30 codes", capsys.readouterr().out)
    assert run("reconstruct", PHOTO, "--bundle", mini_bundle, "-o", "sheet.png", "--quiet") == 0
    assert capsys.readouterr().out == ""
    sheet = np.asarray(Image.open("sheet.png"))
    with Tokenizer.from_pretrained(mini_bundle) as tokenizer:
        codes = tokenizer.encode(PHOTO)
        tiles = [tokenizer.preprocess(PHOTO)] + [np.asarray(tokenizer.decode(codes.truncate(n))) for n in range(1, 5)]
    for i, tile in enumerate(tiles):
        x = 12 + i * (64 + 12)
        assert np.array_equal(sheet[12 : 12 + 64, x : x + 64], tile)


def test_info_of_bundles_and_codes(mini_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("info", mini_bundle) == 0
    assert run("info", "--bundle", mini_bundle) == 0
    assert run("info", mini_bundle / "bundle.json", "--graphs") == 0
    out = capsys.readouterr().out
    assert out.count("TokenFlow tokenizer mini_clip") == 3
    for part in ("4 scales (1 2 3 4): 30 codes of 9 bits", "codes equal", "checkpoint: mini", "images uint8[batch, 64, 64, 3]"):
        assert part in out
    run("encode", PHOTO, "--bundle", mini_bundle, "-o", "p.tfc")
    capsys.readouterr()
    assert run("info", "p.tfc") == 0
    out = capsys.readouterr().out
    assert "mini_clip: 30 codes of 9 bits in 4 scales" in out
    assert "its picture was fitted by crop; colours were converted to sRGB; the SHA-256 of its file begins with " in out
    first_end = int(re.findall(r"1 x 1\s*│\s*1\s*│\s*(\d+)", out)[0])
    Path("preview.tfc").write_bytes(Path("p.tfc").read_bytes()[:first_end])
    assert run("info", "preview.tfc") == 0
    assert "1 of 4 scales" in capsys.readouterr().out


def test_verify(mini_bundle: Path, bundle_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("verify", mini_bundle) == 0
    assert "files and numbers are right" in capsys.readouterr().out
    (bundle_copy / "decode.onnx").write_bytes(b"x")
    assert run("verify", bundle_copy) == 2
    assert "decode.onnx is damaged" in capsys.readouterr().err


def test_bench(mini_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("bench", mini_bundle, "--batch-sizes", "1,2", "--repeat", 2, "--json", "figures.json") == 0
    figures = json.loads(Path("figures.json").read_text())
    rows = figures["bundles"][0]["rows"]
    assert [(row["name"], row["batch"]) for row in rows] == [
        (graph, batch) for batch in (1, 2) for graph in ("encode", "decode", "semantic", "features")
    ]
    assert all(0 < row["median_s"] <= row["worst_s"] for row in rows)
    assert "pictures/s" in capsys.readouterr().out


@pytest.mark.parametrize("word", ["", "info", "encode", "decode", "reconstruct", "verify", "bench"])
def test_help_teaches(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        run(*word.split(), "--help")
    assert left.value.code == 0
    assert len(capsys.readouterr().out) > 200


def test_no_torch_no_rich_markup_no_traceback_in_a_real_process(mini_bundle: Path) -> None:
    command = [sys.executable, "-m", "tokenflow_sdk.cli", "encode", "[bold]missing[/].jpg", "--bundle", str(mini_bundle)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "error: No file matches [bold]missing[/].jpg." in done.stderr
    assert "Traceback" not in done.stderr


def test_ctrl_c_leaves_no_partial_file(mini_bundle: Path, here: Path) -> None:
    pictures = here / "pictures"
    pictures.mkdir()
    for i in range(300):
        shutil.copy(PHOTO, pictures / f"{i}.jpg")
    # A shell's background jobs ignore Ctrl-C, and so would the command.
    script = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from tokenflow_sdk.cli import main; sys.exit(main())"
    )
    command = [sys.executable, "-c", script, "encode", "pictures", "--bundle", str(mini_bundle), "-o", "out"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list(here.glob("out/*.tfc")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert "Traceback" not in error
    made = os.listdir("out")
    assert 0 < len(made) < 300
    assert all(Codes.load(here / "out" / name).complete for name in made)


def test_the_exporter_is_reached_by_both_names(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    assert "export" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="0"):
        main(["export", "standin", "--help"])
    shown = capsys.readouterr().out
    assert "usage: tokenflow export standin" in shown
    command = [sys.executable, "-m", "tokenflow_export", "standin", "--help"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.split() == shown.split()
