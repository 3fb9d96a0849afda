from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.support.mutations import SPECIAL, mutated_text, no_hang, put_pipe
from tokenflow_sdk import TokenFlowError, Tokenizer
from tokenflow_sdk.bundle.bundle import Bundle, open_bundle
from tokenflow_sdk.bundle.manifest import MANIFEST, read_manifest
from tokenflow_sdk.bundle.model_config import GeneratorConfig, TokenizerConfig
from tokenflow_sdk.cli import main
from tokenflow_sdk.errors import ArgumentError, BundleNotFoundError, CorruptBundleError

TINY = ROOT / "models" / "tiny"
GRAPH = b"\x08\x08"
"""An ONNX file without a graph."""


@pytest.fixture(params=["tokenizer", "generator"])
def small(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The manifest of a bundled model with files of two bytes, which opens in no time."""
    data = json.loads((TINY / request.param / MANIFEST).read_text())
    entries = [file for graph in data["graphs"].values() for file in graph["files"]] + list(data["assets"].values())
    for entry in entries:
        (tmp_path / entry["name"]).write_bytes(GRAPH)
        entry.update(size=len(GRAPH), sha256=hashlib.sha256(GRAPH).hexdigest())
    (tmp_path / MANIFEST).write_text(json.dumps(data))
    return tmp_path


def test_any_manifest_is_a_bundle_or_a_named_error(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    original, rng, opened = json.loads((small / MANIFEST).read_text()), random.Random(0), 0
    open_bundle(small).verify()
    for _ in range(200):
        (small / MANIFEST).write_bytes(mutated_text(original, rng))
        with no_hang():
            try:
                open_bundle(small).verify()
                opened += 1
            except TokenFlowError:
                continue
            # What is informative only may be anything.
            assert main(["info", str(small)]) in (0, 2)
    assert 0 < opened < 100


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"schema_version": 1, "schema_version": 1}', "a key is there twice"),
        ('{"schema_version": 1, "parity": {"a": 1, "a": 2}}', "a key is there twice"),
        ('{"schema_version": 1, "parity": ' + "[" * 40 + "]" * 40 + "}", "nests values more than 32 deep"),
        ('{"schema_version": 1' + "0" * 5000 + "}", "not valid JSON"),
        ('{"schema_version": NaN}', "gives no schema_version"),
    ],
)
def test_what_json_allows_and_manifests_do_not(content: str, words: str, tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_text(content)
    with pytest.raises(CorruptBundleError, match=words):
        read_manifest(tmp_path)


@pytest.mark.parametrize("put", SPECIAL)
def test_what_is_no_file_is_named(put: Callable[[Path], None], tmp_path: Path) -> None:
    put(tmp_path / MANIFEST)
    with no_hang(), pytest.raises(BundleNotFoundError, match=r"bundle\.json cannot be read"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("put", SPECIAL)
@pytest.mark.parametrize("size", [0, len(GRAPH)])
def test_no_listed_file_is_anything_but_a_file(put: Callable[[Path], None], size: int, small: Path) -> None:
    data = json.loads((small / MANIFEST).read_text())
    data["assets"]["reference"]["size"] = size
    (small / MANIFEST).write_text(json.dumps(data))
    (small / "reference.npz").unlink()
    put(small / "reference.npz")
    with no_hang(), pytest.raises(CorruptBundleError, match=r"reference\.npz is (not a regular file|missing)"):
        open_bundle(small)


def test_verify_does_not_wait_for_a_pipe(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (small / MANIFEST).unlink()
    put_pipe(small / MANIFEST)
    with no_hang():
        assert main(["verify", str(small)]) == 2
    assert "not a regular file" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["a\x1b[31m", "\ud800", "a\nb", "\u202egnp.exe"])
def test_names_of_files_are_printable(name: str, small: Path) -> None:
    data = json.loads((small / MANIFEST).read_text())
    data["assets"]["more"] = data["assets"]["reference"] | {"name": name}
    (small / MANIFEST).write_text(json.dumps(data))
    with pytest.raises(CorruptBundleError, match="not a plain file name"):
        open_bundle(small)


@pytest.mark.parametrize("name", ["encode.ort", "encode.json", "encode.textproto", "encode"])
def test_a_graph_is_an_onnx_file(name: str, small: Path) -> None:
    data = json.loads((small / MANIFEST).read_text())
    graph = next(iter(data["graphs"].values()))
    (small / graph["files"][0]["name"]).rename(small / name)
    graph["files"][0]["name"] = name
    (small / MANIFEST).write_text(json.dumps(data))
    with pytest.raises(CorruptBundleError, match=r"is no \.onnx file"):
        open_bundle(small)


def test_a_pinned_bundle_is_that_bundle_or_none(tmp_path: Path) -> None:
    path = TINY / "tokenizer"
    digest = hashlib.sha256((path / MANIFEST).read_bytes()).hexdigest()
    with Tokenizer.from_pretrained("tiny", sha256=digest.upper()) as tokenizer:
        assert tokenizer.bundle.sha256 == digest
    for kind, name in ((TokenizerConfig, "tokenizer"), (GeneratorConfig, "generator")):
        with pytest.raises(CorruptBundleError, match=rf"has the SHA-256 \w+, not {'0' * 64} as asked"):
            Bundle.open(TINY / name, kind, "0" * 64)  # type: ignore[arg-type]
    wrong: tuple[Any, ...] = ("", "12", "g" * 64, 5, b"0" * 64, True)
    for value in wrong:
        with pytest.raises(ArgumentError, match="is no SHA-256.*tokenflow info"):
            Bundle.open(path, TokenizerConfig, value)


def test_a_revision_is_of_the_hub() -> None:
    for name in ("tiny", str(TINY / "tokenizer")):
        with pytest.raises(ArgumentError, match="revision='main' is for models on the hub"):
            Tokenizer.from_pretrained(name, revision="main")
    wrong: tuple[Any, ...] = ("", 5)
    for value in wrong:
        with pytest.raises(ArgumentError, match="Give a branch, a tag or a commit"):
            Tokenizer.from_pretrained("nobody/nothing", revision=value)


def test_commands_print_and_take_the_digest(capsys: pytest.CaptureFixture[str]) -> None:
    path = str(TINY / "tokenizer")
    digest = hashlib.sha256((TINY / "tokenizer" / MANIFEST).read_bytes()).hexdigest()
    assert main(["info", path, "--sha256", digest]) == 0
    assert f"SHA-256 of bundle.json: {digest}" in capsys.readouterr().out
    for command in ("info", "verify", "bench", "encode"):
        words = [path] if command != "encode" else ["photo.jpg", "--bundle", path]
        assert main([command, *words, "--sha256", "0" * 64]) == 2
        assert "as asked" in capsys.readouterr().err
    assert main(["info", "tiny", "--sha256", digest]) == 2
    assert "--sha256 is that of one bundle, and tiny has several" in capsys.readouterr().err
