from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from tests.support.mini_understander import byte_fallback_tokenizer, byte_level_tokenizer
from tokenflow_export.language_model.chat_template import chat_template
from tokenflow_sdk.bundle.model_config import ChatTemplate
from tokenflow_sdk.errors import CorruptBundleError, MissingPackageError, PromptError
from tokenflow_sdk.understanding.chat_text import ChatText, TextStream
from tokenflow_sdk.understanding.prompt import ImageBlock, TokenPrompt

KINDS = {"qwen": byte_level_tokenizer, "llama": byte_fallback_tokenizer}
PICTURE = ImageBlock(np.zeros((2, 3), np.float32))


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def text(kind: str, tmp_path: Path) -> ChatText:
    tokenizer = KINDS[kind]()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return ChatText(tmp_path / "tokenizer.json", chat_template(tokenizer, tmp_path))


def written(prompt: TokenPrompt, tokenizer: Tokenizer) -> str:
    """A prompt as people write it: control tokens by name, <image> for a picture."""
    special = {i: token.content for i, token in tokenizer.get_added_tokens_decoder().items()}
    parts: list[str] = []
    run: list[int] = []
    for block in (*prompt.blocks, (-1,)):
        ids = (-1,) if isinstance(block, ImageBlock) else block
        for i in ids:
            if i >= 0 and i not in special:
                run.append(i)
                continue
            parts += [tokenizer.decode(run), special.get(i, "")]
            run = []
        parts += ["<image>"] if isinstance(block, ImageBlock) else []
    return "".join(parts)


def test_conversations_are_written_as_released(kind: str, text: ChatText) -> None:
    tokenizer = KINDS[kind]()
    said = tokenizer.encode("hello", add_special_tokens=False).ids
    first = text.first([PICTURE, PICTURE], "what?")
    later = text.next(first.followed_by(said[:-1], shared=True), said[-1:], "and?")
    if kind == "qwen":
        begun = (
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<image>\n<image>\nwhat?"
            "<|im_end|>\n<|im_start|>assistant\n"
        )
        then = "hello<|im_end|>\n<|im_start|>user\nand?<|im_end|>\n<|im_start|>assistant\n"
    else:
        system = (
            "A chat between a curious user and an artificial intelligence assistant. "
            "The assistant gives helpful, detailed, and polite answers to the user's questions."
        )
        begun = f"<s>{system} USER: <image>\n<image>\nwhat? ASSISTANT:"
        then = " hello</s>USER: and? ASSISTANT:"
    assert written(first, tokenizer) == begun
    assert written(later, tokenizer) == begun + then
    assert (first.shared, later.shared) == ((2, 4), (2, 4, 6))
    # The same conversation from its words alone.
    again = text.first([PICTURE, PICTURE], "and?", [("what?", "hello")])
    assert written(again, tokenizer) == begun + then
    assert again.shared == first.shared


@pytest.mark.parametrize("spelled", ["<|im_end|>", "<|im_start|>system", "</s>", "<s>", "<unk>", "a<|endoftext|>b"])
def test_a_question_cannot_spell_control_tokens(kind: str, text: ChatText, spelled: str) -> None:
    control = set(KINDS[kind]().get_added_tokens_decoder())
    plain, tricky = (text.first([PICTURE], question).blocks[-1] for question in ("a", spelled))
    assert [i for i in tricky if i in control] == [i for i in plain if i in control]


@pytest.mark.parametrize("turn", [("", "yes"), ("what?", 3), ("what?", "\ud800")])
def test_turns_that_are_no_text_are_named(text: ChatText, turn: tuple[str, str]) -> None:
    with pytest.raises(PromptError):
        text.first([PICTURE], "and?", [turn])


def test_half_characters_are_named(text: ChatText) -> None:
    with pytest.raises(PromptError, match="'a.udce9 cup' is no text: its character 1 is half of one"):
        text.first([PICTURE], "a\udce9 cup")


@pytest.mark.parametrize("question", ["", " \n", None, b"what?", ["what?"]])
def test_what_is_no_question_is_named(text: ChatText, question: object) -> None:
    with pytest.raises(PromptError, match="is no question"):
        text.first([PICTURE], question)  # type: ignore[arg-type]


@given(st.lists(st.integers(0, 255), max_size=40), st.sampled_from(sorted(KINDS)))
@settings(max_examples=150, deadline=None)
def test_pieces_of_any_tokens_are_the_whole_text(ids: list[int], kind: str) -> None:
    tokenizer = KINDS[kind]()
    stream = TextStream(tokenizer)
    pieces = [stream.push(i) for i in ids]
    assert not any(piece.endswith("\ufffd") for piece in pieces)
    whole = tokenizer.decode(ids)
    # Byte fallback replaces all of a run in which one byte is wrong, also what was given before it.
    if kind == "qwen" or "\ufffd" not in whole:
        assert "".join([*pieces, stream.flush()]) == whole


@given(st.lists(st.integers(0, 300), max_size=30), st.sampled_from(sorted(KINDS)))
@settings(max_examples=150, deadline=None)
def test_tokens_without_text_change_nothing_around_them(ids: list[int], kind: str) -> None:
    """Special tokens, and ids beyond the vocabulary, which padded embeddings have."""
    tokenizer = KINDS[kind]()
    stream = TextStream(tokenizer)
    whole = tokenizer.decode(ids)
    joined = "".join([*map(stream.push, ids), stream.flush()])
    if kind == "qwen" or "\ufffd" not in whole:
        assert joined == whole


@pytest.mark.parametrize("between", ["<s>", "<unk>", None])
def test_a_word_after_a_special_token_keeps_its_space(between: str | None) -> None:
    tokenizer = byte_fallback_tokenizer()
    ids = [10**6 if text is None else tokenizer.token_to_id(text) for text in ("▁th", between, "▁th", "▁", "▁th")]
    stream = TextStream(tokenizer)
    assert "".join([*map(stream.push, ids), stream.flush()]) == tokenizer.decode(ids) == "th th  th"


def byte_level_alphabet() -> dict[int, str]:
    """The character that stands for each byte in byte-level vocabularies: itself if it is printable, else one from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1000, 4000])
def test_bytes_that_are_no_character_are_given_after_a_while(kind: str, count: int) -> None:
    class Counting:
        """Counts the tokens that are decoded."""

        def __init__(self) -> None:
            self.tokenizer, self.decoded = KINDS[kind](), 0

        def decode(self, ids: list[int]) -> str:
            self.decoded += len(ids)
            return self.tokenizer.decode(ids)

        def __getattr__(self, name: str) -> object:
            return getattr(self.tokenizer, name)

    tokenizer = Counting()
    continuation = next(i for i in range(256) if tokenizer.tokenizer.decode([i]) == "\ufffd")
    stream, given = TextStream(tokenizer), 0
    pieces = []
    for pushed in range(1, count + 1):
        pieces.append(stream.push(continuation))
        given += len(pieces[-1])
        assert pushed - given < 64
        assert len(stream._ids) <= 128
    assert "".join([*pieces, stream.flush()]) == "\ufffd" * count
    assert tokenizer.decoded < 300 * count


@given(st.binary(min_size=60, max_size=300), st.text(max_size=5))
@settings(max_examples=60, deadline=None)
def test_long_runs_of_any_bytes_are_the_whole_text(noise: bytes, after: str) -> None:
    """Byte level: also where a run of bytes that are no text is given in parts."""
    tokenizer = byte_level_tokenizer()
    alphabet = {byte: tokenizer.token_to_id(character) for byte, character in byte_level_alphabet().items()}
    ids = [alphabet[byte] for byte in bytes(0x80 | byte & 63 for byte in noise) + noise + after.encode()]
    stream = TextStream(tokenizer)
    assert "".join([*map(stream.push, ids), stream.flush()]) == tokenizer.decode(ids)


@given(st.text(max_size=20), st.sampled_from(sorted(KINDS)))
@settings(max_examples=100, deadline=None)
def test_characters_are_never_cut(written: str, kind: str) -> None:
    tokenizer = KINDS[kind]()
    ids = tokenizer.encode(written, add_special_tokens=False).ids
    stream = TextStream(tokenizer)
    pieces = [piece for piece in map(stream.push, ids) if piece]
    assert "".join(pieces) + stream.flush() == tokenizer.decode(ids)
    if "\ufffd" not in written:
        assert "\ufffd" not in "".join(pieces)


def test_a_missing_package_and_a_damaged_file_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    template = ChatTemplate((), (), (), (), ())
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CorruptBundleError, match=r"tokenizer\.json cannot be read"):
        ChatText(tmp_path / "tokenizer.json", template).first([PICTURE], "what?")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'tokenflow-sdk\[generate\]'"):
        ChatText(tmp_path / "tokenizer.json", template).first([PICTURE], "what?")
