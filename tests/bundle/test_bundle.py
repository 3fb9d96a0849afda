from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.mini import MINI
from tokenflow_sdk import Tokenizer
from tokenflow_sdk.bundle.bundle import MANIFEST, SCHEMA_VERSION, Bundle, bundle_kind, bundles_in, find_bundle, open_bundle
from tokenflow_sdk.bundle.model_config import TokenizerConfig
from tokenflow_sdk.errors import BundleKindError, BundleNotFoundError, BundleVersionError, CorruptBundleError


def edit(bundle: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    data = json.loads((bundle / MANIFEST).read_text())
    change(data)
    (bundle / MANIFEST).write_text(json.dumps(data))
    return bundle


def test_an_exported_bundle_opens_and_verifies(mini_bundle: Path) -> None:
    bundle = Bundle.open(mini_bundle, TokenizerConfig)
    bundle.verify()
    config = MINI["clip"]
    assert (bundle.config.variant, bundle.config.patch_nums) == (config.variant, config.patch_nums)
    assert (bundle.config.n_codes, bundle.config.grid, bundle.config.code_dim) == (30, 4, 40)
    assert set(bundle.graphs) == {"encode", "decode", "semantic", "features"}
    assert {file.name for file in bundle.files()} | {MANIFEST, "README.md"} == set(os.listdir(mini_bundle))
    assert str(bundle.graph("decode").outputs[0]) == "images uint8[batch, 64, 64, 3]"


@pytest.mark.parametrize("name", ["encode.onnx", "reference.npz"])
def test_a_flipped_byte_is_noticed(name: str, bundle_copy: Path) -> None:
    content = bytearray((bundle_copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (bundle_copy / name).write_bytes(content)
    with pytest.raises(CorruptBundleError, match=f"{name} is damaged: its SHA-256.*Export the bundle again"):
        Tokenizer.from_pretrained(bundle_copy)


def test_a_missing_or_truncated_file_is_noticed(bundle_copy: Path) -> None:
    content = (bundle_copy / "decode.onnx").read_bytes()
    (bundle_copy / "decode.onnx").write_bytes(content[:-1])
    with pytest.raises(CorruptBundleError, match=r"decode\.onnx is damaged: [\d,]+ bytes instead of [\d,]+"):
        Bundle.open(bundle_copy, TokenizerConfig)
    (bundle_copy / "decode.onnx").unlink()
    with pytest.raises(CorruptBundleError, match=r"decode\.onnx is missing from the bundle"):
        Bundle.open(bundle_copy, TokenizerConfig)


def test_a_missing_graph_is_named(bundle_copy: Path) -> None:
    edit(bundle_copy, lambda data: data["graphs"].pop("semantic"))
    with pytest.raises(CorruptBundleError, match="no 'semantic' graph"):
        Bundle.open(bundle_copy, TokenizerConfig)


def test_a_bundle_of_another_kind_is_named(bundle_copy: Path) -> None:
    edit(bundle_copy, lambda data: data.update(kind="generator"))
    assert bundle_kind(bundle_copy) == "generator"
    with pytest.raises(BundleKindError, match="kind 'generator', not a tokenizer"):
        Bundle.open(bundle_copy, TokenizerConfig)


def test_a_newer_schema_asks_for_an_upgrade(bundle_copy: Path) -> None:
    edit(bundle_copy, lambda data: data.update(schema_version=SCHEMA_VERSION + 1, anything="new"))
    with pytest.raises(BundleVersionError, match="schema 2; this SDK reads up to 1.*pip install --upgrade"):
        Bundle.open(bundle_copy, TokenizerConfig)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d.pop("config"), "has no 'config'"),
        (lambda d: d.pop("schema_version"), "no schema_version"),
        (lambda d: d.update(schema_version="1"), "no schema_version"),
        (lambda d: d.update(graphs=[]), "graphs is not an object"),
        (lambda d: d.update(parity=None), "parity is not an object"),
        (lambda d: d["config"].update(surprise=1), "unknown 'surprise'"),
        (lambda d: d["config"].pop("patch_nums"), "no 'patch_nums'"),
        (lambda d: d["config"].update(patch_nums=[4, 2]), "patch_nums"),
        (lambda d: d["config"].update(patch_nums=[1, 10**6]), "1000000"),
        (lambda d: d["config"].update(image_size=-1), "image_size"),
        (lambda d: d["config"].update(image_size=True), "image_size"),
        (lambda d: d["config"].update(preprocess="stretch"), "stretch"),
        (lambda d: d["config"].update(variant=""), "variant name"),
        (lambda d: d["graphs"].update(encode={}), "graphs.encode has no"),
        (lambda d: d["graphs"]["encode"].update(files=[]), "lists no files"),
        (lambda d: d["graphs"]["encode"]["files"][0].update(name="../encode.onnx"), "not a plain file name"),
        (lambda d: d["graphs"]["encode"]["files"][0].update(name="/etc/passwd"), "not a plain file name"),
        (lambda d: d["graphs"]["encode"]["files"][0].update(size="1"), "size"),
        (lambda d: d["graphs"]["encode"]["files"][0].update(sha256="12"), "no SHA-256"),
        (lambda d: d["graphs"]["encode"]["inputs"][0].update(dtype="object"), "dtype 'object'"),
        (lambda d: d["graphs"]["encode"]["inputs"][0].update(shape=[1.5]), "no usable shape"),
    ],
)
def test_a_damaged_manifest_is_named(change: Callable[[dict[str, Any]], object], words: str, bundle_copy: Path) -> None:
    edit(bundle_copy, change)
    with pytest.raises(CorruptBundleError, match=words):
        Bundle.open(bundle_copy, TokenizerConfig)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000])
def test_a_manifest_that_is_no_json_object_is_named(content: bytes, bundle_copy: Path) -> None:
    (bundle_copy / MANIFEST).write_bytes(content)
    with pytest.raises(CorruptBundleError, match="bundle.json"):
        Bundle.open(bundle_copy, TokenizerConfig)


def test_an_enormous_manifest_is_not_read(bundle_copy: Path) -> None:
    with (bundle_copy / MANIFEST).open("wb") as file:
        file.truncate(2**34)
    with pytest.raises(CorruptBundleError, match="larger than 16,777,216 bytes"):
        Bundle.open(bundle_copy, TokenizerConfig)


def test_a_graph_with_other_inputs_than_declared_is_refused(bundle_copy: Path) -> None:
    edit(bundle_copy, lambda data: data["graphs"]["encode"]["inputs"][0].update(shape=["batch", 32, 32, 3]))
    edit(bundle_copy, lambda data: data["config"].update(image_size=32))
    edit(bundle_copy, lambda data: data["graphs"]["decode"]["outputs"][0].update(shape=["batch", 32, 32, 3]))
    with (
        Tokenizer.from_pretrained(bundle_copy) as tokenizer,
        pytest.raises(CorruptBundleError, match=r"encode\.onnx has the inputs images uint8\[batch, 64, 64, 3\] instead of"),
    ):
        tokenizer.load("encode")


def test_no_bundle_there(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path, tmp_path / "missing", tmp_path / "file", "./no/such"):
        with pytest.raises(BundleNotFoundError, match="no bundle at.*tokenflow export tokenizer"):
            Tokenizer.from_pretrained(path)


def test_a_directory_may_hold_a_bundle_of_each_kind(mini_bundle: Path, tmp_path: Path) -> None:
    both = tmp_path / "both"
    both.mkdir()
    (both / "tokenizer").symlink_to(mini_bundle)
    assert find_bundle(both, "tokenizer") == both / "tokenizer"
    assert find_bundle(both, "generator") == both
    assert find_bundle(mini_bundle, "tokenizer") == mini_bundle
    assert bundles_in(both) == [both / "tokenizer"]
    assert bundles_in(mini_bundle) == [mini_bundle]
    assert bundles_in(tmp_path / "nowhere") == [tmp_path / "nowhere"]
    with Tokenizer.from_pretrained(both) as tokenizer:
        assert tokenizer.bundle.path == both / "tokenizer"


def test_tiny_is_the_embedded_model_wherever_one_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tiny").mkdir()
    monkeypatch.chdir(tmp_path)
    assert [bundle_kind(path) for path in bundles_in("tiny")] == ["tokenizer", "generator", "understander"]
    assert [open_bundle(path).config.kind for path in bundles_in("tiny")] == ["tokenizer", "generator", "understander"]
    assert find_bundle("./tiny", "tokenizer") == Path("tiny")


def test_reading_never_writes(mini_bundle: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in mini_bundle.iterdir()}
    with Tokenizer.from_pretrained(mini_bundle) as tokenizer:
        tokenizer.load()
    assert {path: path.stat().st_mtime_ns for path in mini_bundle.iterdir()} == before


def test_empty_and_homeless_names(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BundleNotFoundError, match="An empty name"):
        find_bundle("")
    with pytest.raises(BundleNotFoundError, match=r"~nobody-of-this-name/x cannot be found.*without ~"):
        find_bundle("~nobody-of-this-name/x")
