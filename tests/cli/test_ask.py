from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tokenflow_sdk import AnswerParams, Tokenizer, Understander
from tokenflow_sdk.cli import main


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.random.default_rng(0).integers(256, size=(60, 80, 3), dtype=np.uint8)).save("photo.png")
    return tmp_path


def run(*words: object) -> int:
    return main([str(word) for word in words])


def test_a_picture_and_its_codes_get_the_same_answer(
    mini_understander: Path, mini_bundle: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    settings = ("--bundle", mini_understander, "--max-tokens", 12, "--temperature", 0.7, "--top-p", 0.9, "--seed", 3)
    settings = (*settings, "--backend", "onnxruntime")
    with Tokenizer.from_pretrained(mini_bundle) as tokenizer:
        tokenizer.encode("photo.png", preprocess="squash").save("photo.tfc")
    printed = []
    for name in ("photo.png", "photo.tfc"):
        assert run("ask", name, "what is it?", *settings) == 0
        printed.append(capfdbinary.readouterr().out)
    with Understander.from_pretrained(mini_understander) as understander:
        params = AnswerParams(max_tokens=12, temperature=0.7, top_p=0.9, seed=3)
        expected = understander.answer("photo.png", "what is it?", params=params).text
        two = understander.answer(["photo.png", "photo.png"], "which?", params=params).text
    assert printed == [expected.encode() + b"\n"] * 2
    assert run("ask", "photo.png", "photo.tfc", "which?", *settings) == 0
    assert capfdbinary.readouterr().out == two.encode() + b"\n"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["photo.png", "what?", "--tokenizer", "{tokenizer}"], "Give --tokenizer, the bundle that the model was"),
        (["photo.png", "what?", "--bundle", "nowhere"], "There is no bundle at nowhere"),
        (["photo.png", "What", "is", "this?"], "There is no image at What. Check the path, and put the question in quotes."),
        (["photo.png", "", "--bundle", "{bundle}"], "is no question"),
        (["nowhere.png", "what?", "--bundle", "{bundle}"], "nowhere.png"),
        (["nowhere.tfc", "what?", "--bundle", "{bundle}"], "nowhere.tfc"),
        (["photo.png", "what?", "--bundle", "{bundle}", "--temperature", "-1"], "--temperature -1.0"),
        (["photo.png", "what?", "--bundle", "{bundle}", "--max-tokens", "9999"], "this model reads 1024"),
        (["photo.png", "what?", "--bundle", "{bundle}", "--tokenizer", "nowhere"], "is not at nowhere"),
    ],
)
def test_mistakes_get_a_sentence_and_status_2(
    words: list[str], sentence: str, mini_understander: Path, mini_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("ask", *(word.format(bundle=mini_understander, tokenizer=mini_bundle) for word in words)) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert "Traceback" not in error


def test_info_of_an_understander(mini_understander: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("info", mini_understander, "--graphs") == 0
    out = capsys.readouterr().out
    for part in (
        "TokenFlow understander",
        "transformer of 1 layers, width 32, 2 key/value heads of 8",
        "288 tokens, up to 1024 in a conversation, 16 of them a picture's",
        "reads codes of mini_clip",
        "pages of 16 tokens, 2.0 KB each; a picture takes 1 pages (2.0 KB); the default pool has 264",
        "likeliest token the same at 100.0% of positions",
        "logits float32[batch, 288]",
        "runs on onnxruntime, CPU",
    ):
        assert part in out


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run("ask", "--help")
    out = capsys.readouterr().out
    assert "tokenflow export understanding" in out
    assert "tokenflow ask photo.tfc" in out


def test_bench_times_answers(mini_understander: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("bench", mini_understander, "--batch-sizes", "1,2", "--repeat", 1, "--json", "figures.json") == 0
    rows = json.loads(Path("figures.json").read_text())["bundles"][0]["rows"]
    names = ["first token, new picture", "first token, picture seen before", "32 tokens, picture seen before"]
    assert [(row["name"], row["batch"]) for row in rows] == [(name, batch) for batch in (1, 2) for name in names]
    assert all(0 < row["median_s"] <= row["worst_s"] for row in rows)
    out = capsys.readouterr().out
    assert "16 tokens a picture by 1 layers" in out
    assert "answers/s" in out
