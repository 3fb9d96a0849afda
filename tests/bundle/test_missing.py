from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tokenflow_sdk import Generator, Tokenizer, Understander
from tokenflow_sdk.bundle.bundle import Bundle, open_bundle
from tokenflow_sdk.bundle.model_config import GeneratorConfig
from tokenflow_sdk.cli import main
from tokenflow_sdk.errors import BundleNotFoundError

PHOTO = ROOT / "examples" / "chelsea.jpg"


@pytest.mark.parametrize(
    ("kind", "command"), [(Tokenizer, "tokenizer"), (Generator, "generator"), (Understander, "understanding")]
)
def test_each_kind_is_told_its_own_export(kind: Any, command: str, tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(BundleNotFoundError, match=f"no bundle at.*`tokenflow export {command} --out DIR` wrote"):
            kind.from_pretrained(path)


def test_a_checkpoint_is_told_how_it_becomes_a_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my x.pt").write_bytes(b"PK")
    (tmp_path / "llava").mkdir()
    (tmp_path / "llava" / "config.json").write_text("{}")
    command = r"`tokenflow export tokenizer --checkpoint 'my x.pt' --out bundles/'my x'` on a machine with PyTorch"
    with pytest.raises(BundleNotFoundError, match=f"my x.pt is a PyTorch checkpoint, not a bundle. Run {command}"):
        Tokenizer.from_pretrained("my x.pt")
    for name in ("gone.safetensors", "checkpoints/gone.pt"):
        with pytest.raises(BundleNotFoundError, match=f"export tokenizer --checkpoint {name}"):
            Tokenizer.from_pretrained(name)
    with pytest.raises(
        BundleNotFoundError, match="llava is a PyTorch checkpoint.*`tokenflow export understanding --checkpoint"
    ):
        Understander.from_pretrained("llava")
    with pytest.raises(BundleNotFoundError, match="Run `tokenflow export generator --checkpoint llava --tokenizer BUNDLE"):
        Generator.from_pretrained("llava")
    for kind, command in ((Generator, "generator"), (Understander, "understanding")):
        with pytest.raises(BundleNotFoundError, match=f"is a PyTorch checkpoint.*`tokenflow export {command} --checkpoint DIR"):
            kind.from_pretrained("my x.pt")


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("Tiny", "tiny"),
        ("tniy", "tiny"),
        ("clipb_256", "bundles/clipb_256"),
        ("bundles/CLIPB-256", "bundles/clipb_256"),
        ("modall", "models/modal"),
        ("models/modal/tokeniser", "models/modal/tokenizer"),
        ("./bundels/clipb_256", "bundles/clipb_256"),
        ("x", ""),
    ],
)
def test_a_misspelt_name_is_told_the_nearest(
    name: str, meant: str, mini_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bundles").mkdir()
    (tmp_path / "bundles" / "clipb_256").symlink_to(mini_bundle)
    (tmp_path / "models" / "modal").mkdir(parents=True)
    (tmp_path / "models" / "modal" / "tokenizer").symlink_to(mini_bundle)
    with pytest.raises(BundleNotFoundError) as raised:
        Tokenizer.from_pretrained(name)
    assert raised.value.hint.startswith(f"Did you mean {meant}? Else give the directory" if meant else "Give the directory")


def test_a_name_of_other_kinds_says_which(mini_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer").symlink_to(mini_bundle)
    with pytest.raises(
        BundleNotFoundError, match="holds a tokenizer, and no generator. Make one by `tokenflow export generator"
    ):
        Generator.from_pretrained(tmp_path)
    (tmp_path / "generator").mkdir()
    shutil.copy(ROOT / "models" / "tiny" / "generator" / "bundle.json", tmp_path / "generator")
    with pytest.raises(BundleNotFoundError, match="holds a tokenizer and a generator, and no understander. Make one by "):
        Understander.from_pretrained(tmp_path)
    with pytest.raises(BundleNotFoundError, match="but holds some: .*generator, .*tokenizer, .*understander. Give one of them"):
        Bundle.open(ROOT / "models" / "tiny", GeneratorConfig)


def test_a_directory_of_bundles_names_them(mini_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "both").mkdir()
    for name in ("both/tokenizer", *"abcdef"):
        (tmp_path / name).symlink_to(mini_bundle)
    listed = ", ".join(str(tmp_path / name) for name in ("a", "b", "both", "c", "d"))
    for use in (Tokenizer.from_pretrained, Understander.from_pretrained, open_bundle):
        with pytest.raises(BundleNotFoundError, match=f"but holds some: {listed}, .... Give one of them"):
            use(tmp_path)


def put_photo(path: Path) -> None:
    shutil.copy(PHOTO, path)


def put_codes(path: Path) -> None:
    path.write_bytes(b"TFC")


@pytest.mark.parametrize(
    ("name", "put", "words"),
    [
        ("photo.jpg", put_photo, "photo.jpg is a picture, not a bundle. `tokenflow encode photo.jpg` encodes it"),
        ("my photo.tfc", put_codes, "my photo.tfc is a file of codes, not a bundle. `tokenflow info 'my photo.tfc'` describes"),
        ("nope.tfc", None, "There is no file nope.tfc, and no bundle of this name. Check"),
        ("nope.jpg", None, "There is no file nope.jpg, and no bundle of this name. Check"),
        ("in", "in/photo.jpg", "in is a directory of pictures, not a bundle. `tokenflow encode in` encodes them"),
        ("in", "in/photo.tfc", "in is a directory of files of codes, not a bundle. `tokenflow decode in` decodes them"),
        ("clip/encode.onnx", "clip", "encode.onnx is a file of a bundle, not a bundle. Give its directory, clip."),
        ("clip/bundle.json", "clip", "bundle.json is a file of a bundle, not a bundle. Give its directory, clip."),
    ],
)
def test_what_is_there_instead_is_named_with_what_takes_it(
    name: str,
    put: Callable[[Path], None] | str | None,
    words: str,
    mini_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    if put == "clip":
        Path("clip").symlink_to(mini_bundle)
    elif isinstance(put, str):
        Path(put).parent.mkdir()
        Path(put).write_bytes(b"")
    elif put is not None:
        put(Path(name))
    for kind in (Tokenizer, Generator):
        with pytest.raises(BundleNotFoundError) as raised:
            kind.from_pretrained(name)
        assert words in str(raised.value)
        assert "Did you mean" not in str(raised.value)
    assert main(["verify", name]) == 2
    assert words in capsys.readouterr().err


def test_a_name_is_not_looked_for_among_all_of_a_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Path] = []
    monkeypatch.setattr(Path, "iterdir", lambda path: iter(seen.append(path) or []))
    for name in ("/nowhere/x", "/nowhere"):
        with pytest.raises(BundleNotFoundError, match="no bundle at"):
            Tokenizer.from_pretrained(name)
    assert seen == []
