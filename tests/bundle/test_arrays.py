from __future__ import annotations

import io
import random
import zipfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.fake_graphs import GENERATOR
from tests.support.fakes import CONFIG
from tests.support.mutations import mutated_bytes, no_hang
from tokenflow_sdk.bundle import arrays
from tokenflow_sdk.bundle.arrays import load_codebook, load_reference
from tokenflow_sdk.bundle.bundle import Bundle
from tokenflow_sdk.bundle.schema import FileEntry, GraphEntry, TensorSpec
from tokenflow_sdk.errors import CorruptBundleError
from tokenflow_sdk.files import file_sha256
from tokenflow_sdk.parity.tokenizer import TokenizerReference

CODEBOOK = np.linspace(-1, 1, 150, dtype=np.float32).reshape(50, 3)
ARRAYS: dict[str, np.ndarray] = {
    "images": np.zeros((2, 8, 8, 3), np.uint8),
    "code_indices": np.full((2, 5), 255, np.int32),
    "latent": np.zeros((2, 40, 2, 2), np.float32),
    "features": np.zeros((2, 40, 2, 2), np.float32),
    "decoded": np.zeros((2, 8, 8, 3), np.uint8),
    "semantic": np.zeros((2, 4, 4), np.float32),
    "codebook": np.zeros((256, 40), np.float32),
}


def saved(array: np.ndarray, **options: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, **options)
    return buffer.getvalue()


def archive(save: Callable[..., None] = np.savez, **changes: np.ndarray | None) -> bytes:
    buffer = io.BytesIO()
    save(buffer, **{name: array for name, array in (ARRAYS | changes).items() if array is not None})
    return buffer.getvalue()


def reference_of(content: bytes, directory: Path) -> TokenizerReference:
    path = directory / "reference.npz"
    path.write_bytes(content)
    entry = FileEntry(path.name, len(content), file_sha256(path))
    return load_reference(Bundle(directory, CONFIG, {}, {"reference": entry}, {}, {}), TokenizerReference)


def codebook_of(content: bytes, directory: Path) -> np.ndarray:
    path = directory / "codebook.npy"
    path.write_bytes(content)
    features = TensorSpec("features", "float32", ("batch", "queries", 3))
    graphs = {"embed_image": GraphEntry((), (features,), ())}
    entry = FileEntry(path.name, len(content), "")
    return load_codebook(Bundle(directory, GENERATOR, graphs, {"codebook": entry}, {}, {}))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_reference_is_read_as_it_is_written(save: Callable[..., None], tmp_path: Path) -> None:
    latent = np.asfortranarray(np.random.default_rng(0).standard_normal((2, 40, 2, 2)).astype(np.float32))
    found = reference_of(archive(save, latent=latent), tmp_path)
    assert np.array_equal(found.latent, latent)
    assert found.codebook.flags.writeable


def test_a_codebook_is_read_as_it_is_written(tmp_path: Path) -> None:
    assert np.array_equal(codebook_of(saved(CODEBOOK), tmp_path), CODEBOOK)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"latent": None}, "it holds code_indices"),
        ({"more": np.zeros(1)}, "it holds .*more"),
        ({"latent": ARRAYS["latent"].astype(np.float64)}, "latent is float64"),
        ({"latent": ARRAYS["latent"][:1]}, "latent is float32"),
        ({"images": ARRAYS["images"][:, :7]}, r"images is uint8\[2, 7, 8, 3\]"),
        ({"code_indices": ARRAYS["code_indices"] + 1}, "values outside 0 .. 255"),
        ({"code_indices": ARRAYS["code_indices"] - 256}, "values outside 0 .. 255"),
        ({"semantic": np.zeros(3, np.float32)}, "semantic is float32"),
        ({name: array[:0] for name, array in ARRAYS.items()}, "0"),
    ],
)
def test_references_of_other_sizes_are_refused(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(CorruptBundleError, match=rf"reference\.npz is no reference file: .*{words}"):
        reference_of(archive(**changes), tmp_path)


def test_a_bomb_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file may be compressed a thousandfold; what it says of its size is looked at first."""
    content = archive(np.savez_compressed)
    monkeypatch.setattr(arrays, "_MOST_BYTES", len(content))
    monkeypatch.setattr(zipfile.ZipFile, "open", lambda *_: pytest.fail("it was unpacked"))
    with pytest.raises(CorruptBundleError, match="it holds code_indices"):
        reference_of(content, tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"PK\x03\x04",
        archive(),
        saved(CODEBOOK[:49]),
        saved(CODEBOOK[:, :2]),
        saved(CODEBOOK.astype(np.float64)),
        saved(CODEBOOK.astype(">f4")),
        saved(np.where(CODEBOOK > 0, np.nan, CODEBOOK)),
        saved(CODEBOOK)[:-1],
        saved(CODEBOOK) + b"\0",
        saved(np.array([{}], dtype=object), allow_pickle=True),
        saved(CODEBOOK).replace(b"(50, 3)", b"(5**9,"),
        saved(CODEBOOK).replace(b"(50, 3)", b"(-1, 3)"),
        saved(CODEBOOK).replace(b"(50, 3), }" + b" " * 20, b"(" + b"9" * 20 + b", 3), } "),
        saved(CODEBOOK).replace(b"'<f4'", b"'<V4'"),
        saved(CODEBOOK).replace(b"{'descr'", b"[[[[[[[["),
    ],
)
def test_what_is_no_codebook_is_named(content: bytes, tmp_path: Path) -> None:
    with pytest.raises(CorruptBundleError, match=r"codebook\.npy is no codebook of 50 entries: .*Export the bundle again"):
        codebook_of(content, tmp_path)


def test_any_damage_is_named(tmp_path: Path) -> None:
    rng, contents = random.Random(0), [archive(), archive(np.savez_compressed)]
    with no_hang(60):
        for i in range(150):
            with suppress(CorruptBundleError):
                codebook_of(mutated_bytes(saved(CODEBOOK), rng), tmp_path)
            with suppress(CorruptBundleError):
                reference_of(mutated_bytes(contents[i % 2], rng), tmp_path)


def test_a_file_that_changes_after_it_was_verified_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reference_of(archive(), tmp_path)
    bundle = Bundle(tmp_path, CONFIG, {}, {"reference": FileEntry("reference.npz", 0, "")}, {}, {})
    (tmp_path / "reference.npz").unlink()
    monkeypatch.setattr(Bundle, "verify", lambda self, *entries: None)
    with pytest.raises(CorruptBundleError, match="no reference file"):
        load_reference(replace(bundle), TokenizerReference)
