from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer

from tests.support.mini_generator import SMALLEST, generator_shapes, write_checkpoint
from tests.support.mini_understander import byte_level_tokenizer
from tokenflow_export.language_model.prompt_tokenizer import PromptTokenizer, load_tokenizer, prompt_tokenizer
from tokenflow_export.language_model.tokenizer_files import require_rows
from tokenflow_sdk.errors import CheckpointError

TEXT = "the quick brown fox jumps over the lazy dog"
CODES, WORDS, ROWS = 16, 21, 41
QWEN = {
    "add_bos_token": False,
    "add_prefix_space": False,
    "added_tokens_decoder": {"259": {"content": "<|im_end|>", "special": True, "normalized": False}},
    "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
    "bos_token": None,
    "clean_up_tokenization_spaces": False,
    "eos_token": "<|im_end|>",
    "errors": "replace",
    "model_max_length": 131072,
    "pad_token": "<|endoftext|>",
    "padding_side": "right",
    "split_special_tokens": False,
    "tokenizer_class": "Qwen2Tokenizer",
    "unk_token": None,
    "auto_map": None,
    "sp_model_kwargs": None,
    "surprise": None,
}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    byte_level_tokenizer().save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def test_stored_truncation_and_padding_are_switched_off(directory: Path) -> None:
    tokenizer = byte_level_tokenizer()
    expected = tokenizer.encode(TEXT, add_special_tokens=False).ids
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=64, pad_id=0, pad_token="!")  # noqa: S106
    tokenizer.save(str(directory / "tokenizer.json"))
    found = load_tokenizer(directory)
    assert found.encode(TEXT, add_special_tokens=False).ids == expected
    assert found.to_str() == byte_level_tokenizer().to_str()


def test_what_released_files_say_is_accepted(directory: Path) -> None:
    (directory / "tokenizer_config.json").write_text(json.dumps(QWEN))
    (directory / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "<|im_end|>"}}))
    (directory / "added_tokens.json").write_text(json.dumps({"<|im_start|>": 258, "<|im_end|>": 259}))
    load_tokenizer(directory)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"surprise": 1}, "gives surprise as 1, which this exporter does not apply"),
        ({"add_eos_token": True}, "gives add_eos_token as True"),
        ({"split_special_tokens": True}, "gives split_special_tokens as True"),
        ({"sp_model_kwargs": {"alpha": 0.1}}, "gives sp_model_kwargs as"),
        ({"auto_map": {"AutoTokenizer": ["x.Y", None]}}, "gives auto_map as"),
        ({"add_prefix_space": True}, "gives add_prefix_space as True, and tokenizer.json does otherwise"),
        ({"added_tokens_decoder": {"287": {"content": "<new>"}}}, "names the token '<new>' with id 287; .* it is None"),
        ({"added_tokens_decoder": {"259": {"content": "<|im_end|>", "special": False}}}, "it is 259 of another kind"),
        ({"added_tokens_decoder": {"x": 1}}, "names the token 1 with id x"),
        ({"added_tokens_decoder": [1]}, "has an added_tokens_decoder that is no object"),
    ],
)
def test_settings_that_change_ids_are_refused(config: dict, words: str, directory: Path) -> None:
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=words):
        load_tokenizer(directory)


def test_tokens_added_beside_are_refused(directory: Path) -> None:
    (directory / "added_tokens.json").write_text(json.dumps({"<new>": 287}))
    with pytest.raises(CheckpointError, match="added_tokens.json names the token '<new>' with id 287"):
        load_tokenizer(directory)


def test_ids_that_the_library_passes_over_are_refused(directory: Path) -> None:
    """It counts added tokens on from the vocabulary, whatever ids its file gives them."""
    content = json.loads((directory / "tokenizer.json").read_text())
    for token in content["added_tokens"]:
        token["id"] += 3
    (directory / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"tokenizer.json names the token '<\|im_start\|>' with id 261; .* it is 258"):
        load_tokenizer(directory)


def test_random_ids_are_refused(directory: Path) -> None:
    content = json.loads((directory / "tokenizer.json").read_text())
    content["model"]["dropout"] = 0.5
    (directory / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="has a dropout of 0.5, which makes ids random"):
        load_tokenizer(directory)


def test_every_token_has_a_row(directory: Path) -> None:
    require_rows(load_tokenizer(directory), 261, directory)
    with pytest.raises(
        CheckpointError, match=r"the token '<\|endoftext\|>' with id 260, and the embedding table only 260 rows"
    ):
        require_rows(load_tokenizer(directory), 260, directory)


def prompts(directory: Path, rows: int = ROWS, words: int = WORDS, config: dict | None = None) -> PromptTokenizer:
    shapes = {"model.norm.weight": generator_shapes(SMALLEST, 1, 1, (1,))["model.norm.weight"]}
    if not directory.joinpath("tokenizer.json").exists():
        write_checkpoint(directory, SMALLEST, shapes, words, CODES)
    return prompt_tokenizer(directory, CODES, rows, config or {})


@pytest.mark.parametrize("rows", [41, 48, 64, 128])
def test_the_table_may_be_padded(rows: int, tmp_path: Path) -> None:
    found = prompts(tmp_path / "hf", rows)
    assert (found.image_token_start, found.image_start_ids, found.bos_id) == (WORDS, (WORDS + CODES,), 1)


@pytest.mark.parametrize("words", [WORDS - 4, WORDS - 1, WORDS + 1, WORDS + 4])
def test_words_more_or_less_than_the_tables_are_refused(words: int, tmp_path: Path) -> None:
    """They would shift all rows of image tokens."""
    with pytest.raises(CheckpointError, match=r"embedding table (only )?41 rows"):
        prompts(tmp_path / "hf", words=words)


@pytest.mark.parametrize("given", [2, [1], True, "1", 10**6])
def test_another_bos_in_config_json_is_refused(given: object, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="config.json gives bos_token_id as .*, and the tokenizer begins a text with 1"):
        prompts(tmp_path / "hf", config={"bos_token_id": given})


def test_another_bos_in_the_tokenizers_settings_is_refused(tmp_path: Path) -> None:
    prompts(tmp_path / "hf")
    for name in ("<s>", "w3"):
        (tmp_path / "hf" / "tokenizer_config.json").write_text(json.dumps({"bos_token": name}))
        with pytest.raises(CheckpointError, match=f"has the bos_token '{name}', id .*, and begins a text with 1"):
            prompts(tmp_path / "hf")


def changed(directory: Path, change) -> None:
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    change(tokenizer)
    tokenizer.save(str(directory / "tokenizer.json"))


def test_bos_is_what_the_tokenizer_says(tmp_path: Path) -> None:
    directory = tmp_path / "hf"
    prompts(directory)
    content = json.loads((directory / "tokenizer.json").read_text())
    (directory / "tokenizer.json").write_text(json.dumps(content | {"post_processor": None}))
    with pytest.raises(CheckpointError, match="does not begin a text with one BOS token"):
        prompts(directory)
    (directory / "special_tokens_map.json").write_text(json.dumps({"bos_token": {"content": "w3"}}))
    assert prompts(directory).bos_id == 3
    (directory / "tokenizer_config.json").write_text(json.dumps({"bos_token": "w4"}))
    assert prompts(directory).bos_id == 4
    (directory / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": False}))
    with pytest.raises(CheckpointError, match="does not begin a text with one BOS token"):
        prompts(directory)


def test_image_tokens_are_consecutive(tmp_path: Path) -> None:
    prompts(tmp_path / "hf")
    content = (tmp_path / "hf" / "tokenizer.json").read_text()
    swapped = content.replace("<vq_token_3>", "<x>").replace("<vq_token_4>", "<vq_token_3>").replace("<x>", "<vq_token_4>")
    (tmp_path / "hf" / "tokenizer.json").write_text(swapped)
    with pytest.raises(CheckpointError, match="no 16 consecutive"):
        prompts(tmp_path / "hf")


def test_tokens_of_any_kind_after_the_tables_end_are_refused(tmp_path: Path) -> None:
    prompts(tmp_path / "hf")
    changed(tmp_path / "hf", lambda tokenizer: tokenizer.add_special_tokens([AddedToken("<late>", special=True)]))
    with pytest.raises(CheckpointError, match="the token '<late>' with id 41"):
        prompts(tmp_path / "hf")
