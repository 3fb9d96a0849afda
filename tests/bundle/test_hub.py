from __future__ import annotations

import pickle
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from tokenflow_sdk import Generator, Tokenizer, Understander
from tokenflow_sdk.bundle.bundle import MANIFEST, bundles_in, find_bundle, open_bundle
from tokenflow_sdk.bundle.hub import HubOptions
from tokenflow_sdk.errors import ArgumentError, BundleNotFoundError, MissingPackageError
from tokenflow_sdk.files import file_sha256

PATTERNS = ["*.onnx", "*.data", "*.npz", "*.npy", "*.json"]


class Hub:
    """Stands in for `snapshot_download`: what was asked, and what it gives or raises."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, answer: Path | Exception) -> None:
        module = pytest.importorskip("huggingface_hub")
        self.answer, self.asked = answer, []  # type: ignore[var-annotated]
        monkeypatch.setattr(module, "snapshot_download", self)

    def __call__(self, repo_id: str, **options: Any) -> str:
        assert options.pop("allow_patterns") == PATTERNS
        self.asked.append((repo_id, options))
        if isinstance(self.answer, Exception):
            raise self.answer
        return str(self.answer)


def test_hub_ids_and_paths_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert find_bundle("org/name") == Path("org/name")
    assert find_bundle(Path("other/name")) == Path("other/name")
    assert find_bundle("/absolute/name") == Path("/absolute/name")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingPackageError, match=r"'other/name'.*pip install 'tokenflow-sdk\[hub\]'"):
        find_bundle("other/name")


@pytest.mark.parametrize(
    "name",
    [
        *("runs/exp--3", "file/x", "./a/b", "../a/b", "/a/b", "a\\b", "a\0/b", "a" * 300, "\ud800", "a/" + "b" * 300),
        *(
            "bundles/chat",
            "checkpoints/x",
            "models/tiny",
            "org/x.pt",
            "org/x.safetensors",
            "org/encode.onnx",
            "org/bundle.json",
        ),
    ],
)
def test_paths_are_not_asked_of_the_hub(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(monkeypatch, OSError())
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "a").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(BundleNotFoundError):
        open_bundle(bundles_in(name)[0])
    assert bundles_in(name) == [Path(name)]
    assert hub.asked == []


def test_a_hub_id_is_fetched_once_as_a_bundle(mini_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's cache holds links to blobs; the engine must follow them."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    shutil.copytree(mini_bundle, blobs)
    snapshot.mkdir()
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(Path("..") / "blobs" / file.name)
    hub = Hub(monkeypatch, snapshot)
    with Tokenizer.from_pretrained("org/name") as tokenizer:
        tokenizer.load()
    options = {"revision": "v1", "token": "hf_secret", "cache_dir": tmp_path, "local_files_only": True}
    sha256 = file_sha256(snapshot / MANIFEST)
    with Tokenizer.from_pretrained("org/name", sha256=sha256, **options) as tokenizer:  # type: ignore[arg-type]
        assert tokenizer.bundle.path == snapshot
        stored = pickle.dumps(tokenizer)
        with pickle.loads(stored) as copy:  # noqa: S301 - what this test made
            assert copy.bundle.path == snapshot
    nothing = {"revision": None, "token": None, "cache_dir": None, "local_files_only": False}
    assert hub.asked == [("org/name", asked) for asked in (nothing, options, options | {"token": None})]
    assert b"hf_secret" not in stored
    assert "hf_secret" not in repr(HubOptions(token="hf_secret"))  # noqa: S106
    assert bundles_in("org/name") == [snapshot]
    assert len(hub.asked) == 4


@pytest.mark.parametrize("model", [Tokenizer, Generator, Understander])
def test_every_model_takes_the_options(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(monkeypatch, OSError("no network\nand more"))
    options = {"revision": "v1", "token": False, "cache_dir": Path("here"), "local_files_only": True}
    with pytest.raises(BundleNotFoundError, match="not deliver it: no network. Fetch it once with local_files_only=False, or"):
        model.from_pretrained("org/name", **options)
    assert hub.asked == [("org/name", options)]
    wrong: list[dict[str, Any]] = [{"revision": ""}, {"token": b"hf_secret"}, {"cache_dir": 5}, {"local_files_only": "no"}]
    for options in wrong:
        with pytest.raises(ArgumentError, match=next(iter(options))) as raised:
            model.from_pretrained("org/name", **options)
        assert "secret" not in str(raised.value)


def test_a_repository_without_a_bundle_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Hub(monkeypatch, tmp_path)
    with pytest.raises(BundleNotFoundError, match=r"'org/name' on the hub has no bundle.*--checkpoint hf://org/name/FILE"):
        find_bundle("org/name")


@pytest.mark.parametrize("name", ["org/exp--3", "org/" + "a" * 97, "org-/name", "猫/狗"])
def test_ids_that_the_hub_refuses_name_no_bundle(name: str) -> None:
    pytest.importorskip("huggingface_hub")
    with pytest.raises(BundleNotFoundError, match=r"no directory here|no bundle at"):
        open_bundle(find_bundle(name))


@pytest.mark.parametrize("error", [OSError(), ValueError("odd id."), TimeoutError("Got: OSError: too slow\nand more")])
def test_whatever_the_hub_raises_is_named(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    Hub(monkeypatch, error)
    why = {"": "OSError", "odd id.": "odd id"}.get(str(error), "OSError: too slow")
    with pytest.raises(BundleNotFoundError, match=f"did not deliver it: {why}. Check the name and the network, or give"):
        find_bundle("org/name")


def test_a_misspelt_path_that_looks_like_an_id_is_told_the_nearest(
    mini_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bundles").mkdir()
    (tmp_path / "bundles" / "chat").symlink_to(mini_bundle)
    Hub(monkeypatch, OSError())
    with pytest.raises(BundleNotFoundError, match=r"give the path of a bundle. Did you mean bundles/chat\?$"):
        find_bundle("bundels/chat")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingPackageError, match=r"Did you mean bundles/chat\?$"):
        find_bundle("bundels/chat")
