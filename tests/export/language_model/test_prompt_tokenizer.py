from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tokenflow_export.language_model.prompt_tokenizer import prompt_tokenizer
from tokenflow_sdk.errors import CheckpointError, MissingPackageError

WORDS = [
    "a",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "the",
    "lazy",
    "dog,",
    "then",
    "eats",
    "12",
    "red",
    "apples",
    "on",
    "a",
    "table;",
    "an",
    "été",
    "in",
    "the",
    "snow!",
]
CODES = 3


@pytest.fixture(scope="module")
def sentencepiece_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tokenizer.model as Llama's: BPE with byte fallback, and the image tokens added after it."""
    sentencepiece = pytest.importorskip("sentencepiece")
    directory = tmp_path_factory.mktemp("sp")
    sentences = [" ".join(WORDS[i:] + WORDS[:i]) for i in range(len(WORDS))] * 4
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences), model_prefix=str(directory / "tokenizer"), vocab_size=330, model_type="bpe",
        byte_fallback=True, pad_id=-1, normalization_rule_name="identity", remove_extra_whitespaces=False,
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    size = sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model")).vocab_size()
    added = [f"<vq_token_{i}>" for i in range(CODES)] + ["<img>"]
    (directory / "added_tokens.json").write_text(json.dumps({token: size + i for i, token in enumerate(added)}))
    (directory / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", "legacy": True}))
    return directory


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("text", ["a red apple", "two  spaces ", "<vq_token_1> été 中 12!", "", "<img>"])
def test_a_sentencepiece_model_is_converted(sentencepiece_directory: Path, text: str) -> None:
    """Ids are SentencePiece's own, and image tokens in a prompt are spelled out as text."""
    import sentencepiece
    from tokenizers import Tokenizer

    oracle = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_directory / "tokenizer.model"))
    size = oracle.vocab_size()
    found = prompt_tokenizer(sentencepiece_directory, CODES, size + CODES + 1, {"bos_token_id": 1})
    assert (found.image_token_start, found.image_start_ids, found.bos_id) == (size, (size + CODES,), 1)
    converted = Tokenizer.from_str(json.dumps(found.content))
    assert converted.encode(text, add_special_tokens=False).ids == oracle.encode(text)
    assert sorted(path.name for path in sentencepiece_directory.glob("tokenizer.json")) == []


def test_without_transformers_the_command_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingPackageError, match="pip install transformers sentencepiece"):
        prompt_tokenizer(tmp_path, CODES, 400, {})


@pytest.mark.parametrize("settings", [None, {}, {"tokenizer_class": "BertTokenizer"}])
def test_without_its_class_a_model_is_not_converted(settings: dict | None, tmp_path: Path) -> None:
    """transformers would take a class that gives other ids."""
    pytest.importorskip("sentencepiece")
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    if settings is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match="gives tokenizer_class as (None|'BertTokenizer'); converted are LlamaTokenizer"):
        prompt_tokenizer(tmp_path, CODES, 400, {})


@pytest.mark.filterwarnings("ignore")
def test_a_damaged_model_is_named(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    (tmp_path / "tokenizer.model").write_bytes(b"not a model")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    with pytest.raises(CheckpointError, match="cannot be converted"):
        prompt_tokenizer(tmp_path, CODES, 400, {})


def test_a_tokenizer_without_image_tokens_is_named(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordLevel({"<unk>": 0}, "<unk>")).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(CheckpointError, match="no 3 consecutive"):
        prompt_tokenizer(tmp_path, CODES, 400, {})
