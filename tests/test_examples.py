"""Each example runs in this process, with `tiny`, on a folder of pictures, one of them twice, and a file that is none."""

from __future__ import annotations

import runpy
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import ROOT
from tokenflow_sdk import Codes, Tokenizer
from tokenflow_sdk.dataset.outputs import Record, Stamp, open_writer
from tokenflow_sdk.pictures.preparation import Preparation

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """`a` and `copy` are the same picture, `copy` smaller and compressed harder."""
    (tmp_path / "photos" / "below").mkdir(parents=True)
    photo = Image.open(ROOT / "examples" / "chelsea.jpg").convert("RGB")
    photo.save(tmp_path / "photos" / "a.png")
    photo.resize((250, 166)).save(tmp_path / "photos" / "copy.jpg", quality=60)
    photo.crop((0, 0, 200, 200)).save(tmp_path / "photos" / "below" / "ear.jpg")
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
    assert len(found) == 4
    assert left_out.startswith(f"left out: {photos / 'bad.jpg'}")
    names = [Path(line.split()[1]).name for line in found]
    # The first two are the same picture, so either may be first.
    assert (set(names[:2]), names[2]) == ({"chelsea.jpg", "a.png"}, "copy.jpg")
    assert found[0].startswith("1.000")
    with Image.open(tmp_path / "found.jpg") as sheet:
        assert sheet.width > 3 * 256


def test_search_with_faiss_finds_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("faiss", reason="`pip install faiss-cpu` runs this")
    search = runpy.run_path(str(ROOT / "examples" / "search.py"))
    vectors = np.random.default_rng(0).normal(size=(50, 8)).astype(np.float32)
    scores, rows = search["nearest"](vectors, vectors[7:8], 5)
    monkeypatch.setitem(sys.modules, "faiss", None)
    exact, expected = search["nearest"](vectors, vectors[7:8], 5)
    assert rows.tolist() == expected.tolist()
    assert np.allclose(scores, exact, atol=1e-6)


def test_near_duplicates(run: Callable[..., str], photos: Path) -> None:
    left_out, copies, count = run("near_duplicates.py", photos).splitlines()
    assert left_out.startswith(f"left out: {photos / 'bad.jpg'}")
    assert [Path(word).name for word in copies.split()] == ["a.png", "copy.jpg"]
    assert count == "pictures: 4, groups of copies: 1"
    assert run("near_duplicates.py", photos / "below") == "pictures: 1, groups of copies: 0\n"


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


@pytest.fixture
def tokenized(tmp_path: Path) -> Path:
    """The output of a job: three shards of seven pictures, all of the same code, and one without codes."""
    preparation = Preparation("crop", "srgb")
    stamp = Stamp("12" * 32, "fake", "ab" * 8, 256, (1, 2), 2, preparation)
    for shard in range(3):
        with open_writer(tmp_path / f"0000{shard}.tar", stamp, "webdataset") as writer:
            for i in range(7):
                codes = Codes(np.full(5, 10 * shard + i), (1, 2), 256, "fake", "ab" * 8)
                writer.add(Record(f"{i}", codes) if i != 3 else Record("3", None, error="CorruptImageError: no picture."))
    return tmp_path


def test_train_on_codes(run: Callable[..., str], tokenized: Path) -> None:
    lines = run("train_on_codes.py", tokenized, "--workers", 0).splitlines()
    assert lines == ["epoch 0: codes [18, 5]", "epoch 1: codes [18, 5]"]


@pytest.mark.parametrize("world", [1, 2, 5])
def test_codes_are_shuffled_and_each_reader_gets_its_own(world: int, tokenized: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = runpy.run_path(str(ROOT / "examples" / "train_on_codes.py"))["ShuffledCodes"](tokenized, buffer=4)
    orders: list[list[int]] = []
    for data.epoch in (0, 0, 1):
        orders.append([])
        for rank in range(world):
            monkeypatch.setenv("WORLD_SIZE", str(world))
            monkeypatch.setenv("RANK", str(rank))
            orders[-1] += [int(row[0]) for row in data]
    assert orders[0] == orders[1] != orders[2]
    every = [10 * shard + i for shard in range(3) for i in range(7) if i != 3]
    assert all(sorted(order) == every != order for order in orders)


@pytest.fixture
def signals() -> Iterator[None]:
    """Gives the handlers back that the appliance replaces."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("signals")
def test_appliance(run: Callable[..., str], photos: Path, tmp_path: Path) -> None:
    outbox = tmp_path / "outbox"

    def end() -> None:
        while len(list(outbox.glob("*.tfc"))) < 3:
            time.sleep(0.01)
        signal.raise_signal(signal.SIGTERM)

    thread = threading.Thread(target=end)
    thread.start()
    out = run("appliance.py", photos, outbox, "--interval", 0.05)
    thread.join()
    first, *_, last = out.splitlines()
    assert (first, last) == (f"watching {photos}", "ended")
    assert out.count("bad.jpg") == 1
    assert "below" not in out
    with Tokenizer.from_pretrained("tiny") as tokenizer:
        codes = tokenizer.encode(photos / "a.png")
    assert Codes.load(outbox / "a.png.tfc") == codes
    assert Codes.load(outbox / "previews" / "a.png.tfc") == codes.truncate(4)


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("search.py nowhere {photo}", "error: nowhere is no directory"),
        ("search.py photos nowhere.jpg", "error: nowhere.jpg cannot be read"),
        ("search.py photos {photo} --bundle nowhere", "error: There is no bundle at nowhere"),
        ("search.py nowhere {photo} --out x.xyz", "--out x.xyz is no .jpg or .png"),
        ("search.py nowhere {photo} --out nowhere/x.jpg", "in a folder that exists"),
        ("near_duplicates.py nowhere", "error: nowhere is no directory"),
        ("near_duplicates.py photos --bundle nowhere", "error: There is no bundle at nowhere"),
        ("dataloader.py nowhere", "error: nowhere has no .tfc"),
        ("dataloader.py . --workers 0", "error: "),
        ("train_on_codes.py nowhere", "nowhere does not exist"),
        ("train_on_codes.py photos", "photos holds no codes"),
        ("demo.py --photo nowhere.jpg", "error: nowhere.jpg cannot be read"),
        ("demo.py --out photos/bad.jpg", "photos/bad.jpg"),
        ("appliance.py nowhere outbox", "INBOX must be a folder"),
        ("appliance.py photos photos/bad.jpg", "error: "),
        ("appliance.py photos outbox --scales 20", "--scales 1 to 9"),
        ("appliance.py photos outbox --interval -1", "--interval above 0"),
    ],
)
@pytest.mark.usefixtures("photos", "signals")
def test_mistakes_end_in_a_sentence(
    line: str, sentence: str, run: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "damaged.tfc").write_bytes(b"TFC")
    with pytest.raises(SystemExit) as ended:
        run(*line.format(photo=ROOT / "examples" / "chelsea.jpg").split())
    assert sentence in f"{capsys.readouterr().err}{ended.value}"


@pytest.mark.parametrize("example", ["dataloader.py", "train_on_codes.py"])
def test_a_missing_pytorch_is_named(example: str, run: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(SystemExit, match="pip install torch"):
        run(example, ".")
