from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import ROOT
from tokenflow_sdk.cli import main
from tokenflow_sdk.cli.generate import read_metadata
from tokenflow_sdk.generation.generator import Generator
from tokenflow_sdk.generation.results import METADATA_KEY

PHOTO = ROOT / "examples" / "chelsea.jpg"


@pytest.fixture
def bundle(mini_generator: Path) -> Path:
    return mini_generator


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*words: object) -> int:
    return main([str(word) for word in words])


def test_pictures_scales_and_replay(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--bundle", bundle, "-o", "out", "--seed", 7, "-n", 2, "--progressive")
    assert run("generate", "w5 w6", *words) == 0
    assert sorted(path.name for path in Path("out").iterdir()) == ["1.png", "2.png", "scales.png"]
    assert "seed 7" in capsys.readouterr().out
    metadata = read_metadata(Path("out/2.png"))
    assert run("info", "out/2.png") == 0
    assert "prompt: w5 w6\n" in capsys.readouterr().out
    assert run("info", "out/2.png", "--json") == 0
    assert json.loads(capsys.readouterr().out) == metadata
    assert (metadata["prompt"], metadata["seed"], metadata["n"], metadata["image"]) == ("w5 w6", 7, 2, 1)
    with Generator.from_pretrained(bundle) as generator:
        expected = generator.generate("w5 w6", seed=7, n=2).images
    assert np.array_equal(np.asarray(Image.open("out/2.png")), np.asarray(expected[1]))
    assert run("generate", "--replay", "out/2.png", "--bundle", bundle, "-o", "again", "-q") == 0
    assert capsys.readouterr().out == ""
    for name in ("1.png", "2.png"):
        assert (Path("out") / name).read_bytes() == (Path("again") / name).read_bytes()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--bundle", "{bundle}"], "No prompt was given"),
        (["", "--bundle", "{bundle}"], "The prompt is empty"),
        (["w5", "--bundle", "{bundle}", "--preset", "best"], "no preset 'best'"),
        (["w5", "--bundle", "{bundle}", "-n", "0"], "-n 0"),
        (["w5", "--bundle", "{bundle}", "-n", "500"], "or open the model with --pages "),
        (["w5", "--bundle", "{bundle}", "--pages", "1"], "of 1 are free"),
        (["w5", "--bundle", "{bundle}", "--cfg-scale", "-1"], "--cfg-scale -1.0"),
        (["w5", "--bundle", "{bundle}", "--tokenizer", "nowhere"], "is not at nowhere"),
        (["--replay", "plain.png", "--bundle", "{bundle}"], "does not say how it was made"),
        (["--replay", "text.png", "--bundle", "{bundle}"], "cannot be read"),
        (["--replay", "nope.png", "--bundle", "{bundle}"], "nope.png cannot be read: No such file or directory. Give a PNG"),
        (["w5", "--replay", "other.png", "--bundle", "{bundle}"], "Leave PROMPT out"),
        (["--replay", "other.png", "--bundle", "{bundle}", "-n", "1"], "Leave -n out"),
        (["--replay", "other.png", "--bundle", "{bundle}", "--seed", "0"], "Leave --seed out"),
        (["--replay", "other.png", "--bundle", "{bundle}", "--preset", "paper"], "Leave --preset out"),
        (["--replay", "other.png", "--bundle", "{bundle}", "--negative-prompt", "w5"], "Leave --negative-prompt out"),
        (["--replay", "other.png", "--bundle", "{bundle}", "--cfg-scale", "2"], "Leave --cfg-scale out"),
        (["--replay", "other.png", "--bundle", "{bundle}"], "drawn by another model (0000000000000000)"),
    ],
)
def test_mistakes_get_a_sentence_and_status_2(
    words: list[str], sentence: str, bundle: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import PngImagePlugin

    Image.new("RGB", (4, 4)).save("plain.png")
    Path("text.png").write_text("hello")
    metadata = {"prompt": "w5", "negative_prompt": None, "n": 1, "seed": 0, "cfg_scale": 1.0, "passes": [[1, 0]], "image": 0}
    chunk = PngImagePlugin.PngInfo()
    chunk.add_itxt(METADATA_KEY, json.dumps(metadata | {"model": "0" * 16}))
    Image.new("RGB", (4, 4)).save("other.png", pnginfo=chunk)
    before = sorted(path.name for path in here.iterdir())
    assert run("generate", *(word.format(bundle=bundle) for word in words)) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert "Traceback" not in error
    assert sorted(path.name for path in here.iterdir()) == before


def test_info_of_a_generator(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("info", bundle, "--graphs") == 0
    out = capsys.readouterr().out
    for part in (
        "TokenFlow generator",
        "transformer of 1 layers",
        "drawn for mini_clip",
        "a picture takes",
        "hidden float32[batch, queries, 32]",
        "default pool",
    ):
        assert part in out


def test_verify(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("verify", bundle) == 0
    assert "likeliest code the same at 100.0%" in capsys.readouterr().out


def test_a_generator_is_no_tokenizer(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("encode", PHOTO, "--bundle", bundle) == 2
    assert "holds a bundle of kind 'generator', not a tokenizer" in capsys.readouterr().err


def test_bench_times_every_preset(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("bench", bundle, "--batch-sizes", "1,2", "--repeat", 1, "--json", "figures.json") == 0
    figures = json.loads(Path("figures.json").read_text())
    rows = figures["bundles"][0]["rows"]
    names = [(row["name"], row["batch"]) for row in rows]
    assert names == [(preset, batch) for batch in (1, 2) for preset in ("turbo", "fast", "balanced", "paper")]
    assert all(0 < row["median_s"] <= row["worst_s"] for row in rows)
    out = capsys.readouterr().out
    assert "codes a picture" in out
    assert "; 1 timed call each after one to warm up" in out
