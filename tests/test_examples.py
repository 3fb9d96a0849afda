"""Each example runs in this process, with `tiny`, on a folder of pictures, one of them twice, and a file that is none."""

from __future__ import annotations

import runpy
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import ROOT
from tokenflow_sdk import Codes, Tokenizer

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """`a` and `copy` are the same picture, `copy` smaller and compressed harder."""
    (tmp_path / "photos").mkdir()
    photo = Image.open(ROOT / "examples" / "chelsea.jpg").convert("RGB")
    photo.save(tmp_path / "photos" / "a.png")
    photo.resize((250, 166)).save(tmp_path / "photos" / "copy.jpg", quality=60)
    photo.crop((0, 0, 200, 200)).save(tmp_path / "photos" / "ear.jpg")
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    Image.fromarray(noise).resize((256, 256)).save(tmp_path / "photos" / "noise.png")
    (tmp_path / "photos" / "bad.jpg").write_bytes(b"no picture")
    return tmp_path / "photos"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., str]:
    def run(example: str, *words: object) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [example, *map(str, words)])
        runpy.run_path(str(ROOT / "examples" / example), run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize("path", [path for path in EXAMPLES if path.stem != "demo"], ids=lambda path: path.stem)
def test_an_example_is_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) < 60


def test_search(run: Callable[..., str], photos: Path, tmp_path: Path) -> None:
    out = run("search.py", photos, ROOT / "examples" / "chelsea.jpg", "--count", 3)
    left_out, *found = out.splitlines()
    assert left_out.startswith(f"left out: {photos / 'bad.jpg'}")
    assert [Path(line.split()[1]).name for line in found][:3] == ["chelsea.jpg", "a.png", "copy.jpg"]
    assert found[0].startswith("1.000")
    with Image.open(tmp_path / "found.jpg") as sheet:
        assert sheet.width > 3 * 256


def test_search_with_faiss_finds_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("faiss", reason="`pip install faiss-cpu` runs this")
    search = runpy.run_path(str(ROOT / "examples" / "search.py"))
    vectors = search["unit"](np.random.default_rng(0).normal(size=(50, 8)).astype(np.float32))
    scores, rows = search["nearest"](vectors, vectors[7:8], 5)
    monkeypatch.setitem(search["nearest"].__globals__, "faiss", None)
    exact, expected = search["nearest"](vectors, vectors[7:8], 5)
    assert rows.tolist() == expected.tolist()
    assert np.allclose(scores, exact, atol=1e-6)


def test_near_duplicates(run: Callable[..., str], photos: Path) -> None:
    left_out, copies = run("near_duplicates.py", photos).splitlines()
    assert left_out.startswith(f"left out: {photos / 'bad.jpg'}")
    assert [Path(word).name for word in copies.split()] == ["a.png", "copy.jpg"]


def test_groups_of_near_duplicates_do_not_overlap() -> None:
    groups = runpy.run_path(str(ROOT / "examples" / "near_duplicates.py"))["groups"]
    a, b = np.arange(20), np.arange(20) + 50
    near = np.where(np.arange(20) < 12, a, 99)
    assert groups(np.array([a, b, near, b, np.arange(20) + 80, a])) == [[0, 2, 5], [1, 3]]


def test_dataloader(run: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    for i in range(5):
        Codes(np.full(5, i), (1, 2), 256, "fake", "ab" * 32).save(tmp_path / ("more" if i else "") / f"{i}.tfc")
    out = run("dataloader.py", tmp_path, "--batch", 2, "--workers", 0)
    assert out.splitlines()[0] == "[2, 5] in scales of [1, 4]"
    assert out.splitlines()[-1] == "5 pictures use 5 of 256 codes"


def test_appliance(run: Callable[..., str], photos: Path, tmp_path: Path) -> None:
    outbox = tmp_path / "outbox"

    def end() -> None:
        while len(list(outbox.glob("*.tfc"))) < 4:
            time.sleep(0.01)
        signal.raise_signal(signal.SIGTERM)

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    thread = threading.Thread(target=end)
    thread.start()
    try:
        out = run("appliance.py", photos, outbox, "--interval", 0.05)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    thread.join()
    assert out.count("bad.jpg") == 1
    with Tokenizer.from_pretrained("tiny") as tokenizer:
        codes = tokenizer.encode(photos / "a.png")
    assert Codes.load(outbox / "a.png.tfc") == codes
    assert Codes.load(outbox / "previews" / "a.png.tfc") == codes.truncate(4)
