from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from tests.support.fake_graphs import GENERATOR
from tokenflow_sdk.bundle.bundle import Bundle, find_bundle
from tokenflow_sdk.bundle.model_config import GeneratorConfig
from tokenflow_sdk.errors import CorruptBundleError, MissingPackageError, PromptError
from tokenflow_sdk.generation.prompt import Prompt, PromptEncoder


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Words w1 .. w19, and `<unk>` for all others."""
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0} | {f"w{i}": i for i in range(1, 20)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


@pytest.fixture
def encoder(path: Path) -> PromptEncoder:
    return PromptEncoder(path, GENERATOR)


@pytest.mark.parametrize(
    ("prompt", "ids"),
    [
        ("w5", (5,)),
        ("  w5\n w6 never ", (5, 6, 0)),
        ([5], (5,)),
        ((0, 19, 70, 73), (0, 19, 70, 73)),
        (np.asarray([3, 4], np.int64), (3, 4)),
        (range(3), (0, 1, 2)),
    ],
)
def test_text_and_ids_become_ids_without_bos(encoder: PromptEncoder, prompt: Prompt, ids: tuple[int, ...]) -> None:
    found = encoder.encode(prompt)
    assert found == ids
    assert {type(i) for i in found} == {int}


@pytest.mark.parametrize("count", [6, 7])
def test_as_much_as_the_model_reads_is_kept(encoder: PromptEncoder, count: int) -> None:
    """Eight ids, BOS among them."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert encoder.encode([3] * count, strict=True) == encoder.encode("w3 " * count) == (3,) * count


@pytest.mark.parametrize("prompt", [[3] * 8, "w3 " * 8])
def test_more_is_cut_with_a_warning_or_refused(encoder: PromptEncoder, prompt: Prompt) -> None:
    with pytest.warns(UserWarning, match="The prompt has 8 tokens; this model reads 7. It is cut there"):
        assert encoder.encode(prompt) == (3,) * 7
    with pytest.raises(PromptError, match="has 8 tokens; this model reads 7. .*strict=False"):
        encoder.encode(prompt, strict=True)


@pytest.mark.parametrize("text", ["", "  ", "\n\t"])
def test_an_empty_text_is_refused(encoder: PromptEncoder, text: str) -> None:
    with pytest.raises(PromptError, match="The prompt is empty"):
        encoder.encode(text)


def test_half_characters_are_named(encoder: PromptEncoder) -> None:
    """What a command line gives for a byte that is not UTF-8."""
    with pytest.raises(PromptError, match=r"'a.udce9' is no text: its character 1 is half of one"):
        encoder.encode("a\udce9")


@pytest.mark.parametrize("spelled", ["<s>", "[PAD]", "a <s> b", "</s>", "[PAD][PAD]"])
def test_a_prompt_cannot_spell_control_tokens(spelled: str) -> None:
    path = find_bundle("tiny", GeneratorConfig.kind)
    encoder = PromptEncoder(path / "tokenizer.json", Bundle.open(path, GeneratorConfig).config)
    plain = Tokenizer.from_file(str(path / "tokenizer.json"))
    found = encoder.encode(spelled)
    assert not {0, 1} & set(found)
    assert plain.decode(found, skip_special_tokens=False).strip() == spelled
    # Other prompts have the ids that they always had.
    assert encoder.encode("a red apple, 3d render") == tuple(plain.encode("a red apple, 3d render").ids)


@pytest.mark.parametrize("ids", [[], (), np.zeros(0, int)])
def test_no_ids_are_refused(encoder: PromptEncoder, ids: Sequence[int]) -> None:
    with pytest.raises(PromptError, match="no tokens"):
        encoder.encode(ids)


@pytest.mark.parametrize(
    "prompt", [None, 5, b"cup", bytearray(b"cup"), memoryview(b"cup"), ["a cup"], [1.5], [None], 2.5, [[5]]]
)
def test_what_is_no_prompt_is_named(encoder: PromptEncoder, prompt: object) -> None:
    with pytest.raises(PromptError, match=f"negative prompt is {type(prompt).__name__}, neither text nor.*generate_batch"):
        encoder.encode(prompt, name="negative prompt")  # type: ignore[arg-type]


def test_an_empty_negative_prompt_is_called_by_its_name(encoder: PromptEncoder) -> None:
    for empty in ("", []):
        with pytest.raises(PromptError, match="The negative prompt (is empty|has no tokens)"):
            encoder.encode(empty, name="negative prompt")


@pytest.mark.parametrize("wrong", [-1, 20, 45, 69, 74, 10**9])
def test_ids_that_are_no_text_are_named(encoder: PromptEncoder, wrong: int) -> None:
    """Codes are 20 .. 69; 74 ends the vocabulary."""
    with pytest.raises(PromptError, match=rf"Token id {wrong} is not text. Text ids are 0 .. 19\."):
        encoder.encode([3, wrong, 99])


def test_ids_need_neither_package_nor_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    encoder = PromptEncoder(tmp_path / "tokenizer.json", GENERATOR)
    assert encoder.encode([5]) == (5,)
    with pytest.raises(MissingPackageError, match=r"pip install 'tokenflow-sdk\[generate\]'"):
        encoder.encode("w5")


def test_the_file_is_read_once_when_text_comes(path: Path) -> None:
    encoder = PromptEncoder(path, GENERATOR)
    encoder.encode("w5")
    path.unlink()
    assert encoder.encode("w6") == (6,)
    with pytest.raises(CorruptBundleError, match=r"tokenizer\.json cannot be read"):
        PromptEncoder(path, GENERATOR).encode("w5")
