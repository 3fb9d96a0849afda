from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.support.fakes import FakeSession, fake_bundle
from tokenflow_sdk import Codes, Tokenizer
from tokenflow_sdk.cli import encode as encode_module
from tokenflow_sdk.cli import main
from tokenflow_sdk.pictures.preparation import Preparation


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    for i in range(4):
        noise = np.random.default_rng(i).integers(0, 200, (8, 8, 3), np.uint8)
        Image.fromarray(noise).save(f"in/{i}.png")
    return tmp_path


@pytest.fixture
def encode(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., list[str]]:
    """Encodes the directory `in` to `out`, and gives the names of the images that were encoded."""

    def run(*words: str, status: int = 0, **config: object) -> list[str]:
        bundle = fake_bundle()
        loaded: list[Path] = []

        def open_session(path: Path, *rest: Any) -> FakeSession:
            loaded.append(path)
            return FakeSession(path, *rest)

        tokenizer = Tokenizer(replace(bundle, config=replace(bundle.config, **config)), open_session=open_session)
        monkeypatch.setattr(encode_module, "open_tokenizer", lambda *_: tokenizer)
        assert main(["encode", "in", "-o", "out", *words]) == status
        captured = capsys.readouterr()
        encoded = [Path(line.split(" -> ")[0]).name for line in captured.out.splitlines()]
        skipped = 4 - len(encoded) - status
        assert (f"{skipped} of 4 skipped: their codes are there" in captured.err) == (skipped > 0)
        assert "--force" in captured.err or not skipped
        assert len(loaded) == (skipped < 4)
        return encoded

    return run


ALL = ["0.png", "1.png", "2.png", "3.png"]


def test_a_rerun_skips_what_is_done_loads_no_encoder_and_changes_nothing(encode: Callable[..., list[str]]) -> None:
    assert encode() == ALL
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in Path("out").iterdir()}
    assert encode() == []
    assert {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in Path("out").iterdir()} == before


def test_force_encodes_again(encode: Callable[..., list[str]]) -> None:
    assert encode() == ALL
    assert encode("--force") == ALL


def test_what_is_missing_damaged_cut_or_of_another_source_is_not_done(encode: Callable[..., list[str]]) -> None:
    assert encode() == ALL
    whole = Codes.load("out/1.tfc")
    Path("out/0.tfc").unlink()
    whole.truncate(1).save("out/1.tfc")
    Path("out/2.tfc").write_bytes(Path("out/2.tfc").read_bytes()[:-1])
    assert encode() == ["0.png", "1.png", "2.png"]
    assert Codes.load("out/1.tfc") == whole
    # Older files, and as old as can be: only their content tells.
    shutil.copy2("in/1.png", "in/0.png")
    os.utime("in/0.png", (0, 0))
    Path("in/2.png").rename("spare.png")
    Path("in/3.png").rename("in/2.png")
    Path("spare.png").rename("in/3.png")
    assert encode() == ["0.png", "2.png", "3.png"]
    assert encode() == []


@pytest.mark.parametrize(
    "words", [["--preprocess", "squash"], ["--color", "as-stored"], ["--fast"]], ids=lambda words: words[0]
)
def test_other_options_are_other_codes(words: list[str], encode: Callable[..., list[str]]) -> None:
    assert encode() == ALL
    assert encode(*words) == ALL
    assert encode(*words) == []
    assert encode() == ALL


def test_codes_of_another_tokenizer_or_of_unknown_origin_are_not_done(
    encode: Callable[..., list[str]],
) -> None:
    for other in ({"codebook_sha256": "cd" * 32}, {"variant": "other"}, {"codebook_size": 255}, {}):
        assert encode(**other) == ALL
    codes = Codes.load("out/0.tfc")
    assert codes.preparation is not None
    source = codes.preparation.source
    for i, preparation in enumerate(
        (None, Preparation("crop", "srgb"), Preparation("pad", "srgb", source=source), codes.preparation)
    ):
        foreign = "other" if i == 3 else codes.variant
        Codes(codes.indices, codes.patch_nums, codes.codebook_size, foreign, codes.codebook_id, preparation).save("out/0.tfc")
        assert encode() == ["0.png"]
    assert encode() == []


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes")
def test_a_pipe_in_the_place_of_codes_or_of_a_picture_is_never_waited_for(encode: Callable[..., list[str]]) -> None:
    Path("out").mkdir()
    os.mkfifo("out/0.tfc")
    Path("in/1.png").unlink()
    os.mkfifo("in/1.png")
    assert main(["encode", "in/1.png", "-o", "one.tfc"]) == 2
    Path("in/1.png").unlink()
    Image.new("RGB", (8, 8)).save("in/1.png")
    assert encode(status=1) == ["1.png", "2.png", "3.png"]


def test_the_last_bad_file_of_several_is_still_one_of_several(encode: Callable[..., list[str]], here: Path) -> None:
    (here / "in/2.png").write_bytes(b"no picture")
    assert encode(status=1) == ["0.png", "1.png", "3.png"]
    assert encode(status=1) == []
