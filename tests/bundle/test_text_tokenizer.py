from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models

from tests.support.mini_understander import byte_fallback_tokenizer
from tests.support.mutations import SPECIAL, mutated_text, no_hang
from tokenflow_sdk.bundle.text_tokenizer import TextTokenizer, load_text_tokenizer
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


@pytest.mark.parametrize("put", SPECIAL)
def test_what_is_no_file_is_named(put: Callable[[Path], None], path: Path) -> None:
    path.unlink()
    put(path)
    with no_hang(), pytest.raises(CorruptBundleError, match="cannot be read"):
        load_text_tokenizer(path)


def test_any_damage_is_named(path: Path) -> None:
    rng, original = random.Random(0), json.loads(byte_fallback_tokenizer().to_str())
    with no_hang(60):
        for _ in range(200):
            path.write_bytes(mutated_text(original, rng))
            try:
                tokenizer = load_text_tokenizer(path)
                for text in ("the cat", "\u732b <s>"):
                    tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids)
                tokenizer.id_to_token(5)
                tokenizer.get_added_tokens_decoder()
            except CorruptBundleError:
                continue


class PanicException(BaseException):
    """As pyo3 raises where the library has a bug."""


PanicException.__module__ = "pyo3_runtime"


@pytest.mark.parametrize("error", [PanicException("index out of bounds"), Exception("no merges"), OverflowError("too large")])
def test_what_the_library_raises_is_named(error: BaseException, path: Path) -> None:
    class Broken:
        def encode(self, text: str, add_special_tokens: bool) -> None:
            raise error

    with pytest.raises(CorruptBundleError, match=rf"tokenizer\.json cannot be read: {error}"):
        TextTokenizer(path, Broken()).encode("text")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), TimeoutError("of the application"), SystemExit()])
def test_what_others_raise_passes(error: BaseException, path: Path) -> None:
    class Interrupted:
        def decode(self, ids: list[int]) -> str:
            raise error

    with pytest.raises(type(error)) as caught:
        TextTokenizer(path, Interrupted()).decode([1])
    assert caught.value is error
