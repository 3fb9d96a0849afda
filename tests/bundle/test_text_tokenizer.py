from __future__ import annotations

import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from tokenflow_sdk.bundle.text_tokenizer import load_text_tokenizer
from tokenflow_sdk.errors import CorruptBundleError, MissingPackageError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    Tokenizer(models.WordLevel({"<unk>": 0, "apple": 1}, "<unk>")).save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def test_the_files_tokenizer_is_loaded(path: Path) -> None:
    tokenizer = load_text_tokenizer(path)
    assert [tokenizer.encode(text).ids for text in ("apple", "pear")] == [[1], [0]]
    assert tokenizer.decode([1]) == "apple"


@pytest.mark.parametrize("content", [None, b"", b"{}", b"no json", b"\xff\xfe", b"[1]"])
def test_a_file_that_cannot_be_read_is_named(path: Path, content: bytes | None) -> None:
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CorruptBundleError, match=r"tokenizer\.json cannot be read: .+\. Export the bundle again"):
        load_text_tokenizer(path)


def test_a_missing_package_is_named_with_what_installs_it(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'tokenflow-sdk\[generate\]'.*token ids") as caught:
        load_text_tokenizer(path)
    assert caught.value.__suppress_context__


def test_truncation_and_padding_of_older_bundles_are_switched_off(path: Path) -> None:
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=3, pad_id=0, pad_token="<unk>")  # noqa: S106
    tokenizer.save(str(path))
    loaded = load_text_tokenizer(path)
    assert [loaded.encode(text).ids for text in ("apple", "apple apple apple apple")] == [[1], [1, 1, 1, 1]]
