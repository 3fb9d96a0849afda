"""The understander of the recipe: its conversations are the runtime's, its model is Qwen2, and its training resumes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from recipes.tiny.codes import quantizer
from recipes.tiny.config import TINY
from recipes.tiny.export import write_llava_layout
from recipes.tiny.measure import _is_right
from recipes.tiny.questions import Turn
from recipes.tiny.subjects import PHOTO, Subject
from recipes.tiny.train_understander import Encoded, UnderstanderTraining, _kept
from recipes.tiny.understander_model import Conversation, UnderstanderModel, apart, check, tokenized, train_text_tokenizer
from tokenflow_export.language_model.chat_template import chat_template
from tokenflow_sdk.understanding.chat_text import ChatText
from tokenflow_sdk.understanding.prompt import ImageBlock

TURNS = [Turn("what", "What is this?", "A red apple."), Turn("count", "How many apples are there?", "One.")]


@pytest.fixture(scope="module")
def text() -> Tokenizer:
    return train_text_tokenizer([each for turn in TURNS for each in (turn.question, turn.answer)])


def answers(said: Conversation) -> list[slice]:
    """Where the answers lie in `after`: each run of taught ids."""
    edges = [i for i in range(len(said.taught)) if said.taught[i] != (i > 0 and said.taught[i - 1])]
    return [slice(start, stop) for start, stop in zip(edges[::2], edges[1::2], strict=True)]


def test_conversations_are_written_as_the_runtime_writes_them(text: Tokenizer, tmp_path: Path) -> None:
    text.save(str(tmp_path / "tokenizer.json"))
    chat = ChatText(tmp_path / "tokenizer.json", chat_template(text, tmp_path))
    image = ImageBlock(np.zeros((TINY.grid**2, TINY.code_dim), np.float32))
    found = tokenized(text, TURNS)
    first = chat.first([image], TURNS[0].question)
    second = chat.next(first, text.encode(TURNS[0].answer).ids, TURNS[1].question)
    assert found.before == list(first.blocks[0])
    spans = answers(found)
    assert found.after[: spans[0].start] == list(first.blocks[2])
    after = [i for block in second.blocks[2:] for i in block]
    assert found.after[: spans[1].start] == after
    end = text.token_to_id("<|im_end|>")
    for span, turn in zip(spans, TURNS, strict=True):
        assert found.after[span] == [*text.encode(turn.answer).ids, end]
        assert all(found.taught[span])
    assert sum(found.taught) == sum(span.stop - span.start for span in spans)


def test_the_understander_in_training_is_qwen2(text: Tokenizer, tmp_path: Path) -> None:
    """Logits equal those of transformers' model, loaded from the released layout that it is written to."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    model = UnderstanderModel(text.get_vocab_size()).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.copy_((parameter + 0.05 * torch.randn_like(parameter)).half().float())
    write_llava_layout(model, text, tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    theta = values.pop("rope_theta")
    del values["model_type"]
    weights = load_file(tmp_path / "model.safetensors")
    projector = {key: weights.pop(key) for key in list(weights) if "mm_projector" in key}
    reference = Qwen2ForCausalLM(Qwen2Config(**values, rope_parameters={"rope_type": "default", "rope_theta": theta})).eval()
    reference.load_state_dict(weights | {"lm_head.weight": weights["model.embed_tokens.weight"]})
    features = torch.randn(1, TINY.grid**2, TINY.code_dim)
    said = tokenized(text, TURNS)
    with torch.inference_mode():
        hidden = torch.nn.functional.linear(
            features, projector["model.mm_projector.0.weight"], projector["model.mm_projector.0.bias"]
        )
        picture = torch.nn.functional.linear(
            torch.nn.functional.gelu(hidden), projector["model.mm_projector.2.weight"], projector["model.mm_projector.2.bias"]
        )
        before, after = (reference.model.embed_tokens(torch.tensor([ids])) for ids in (said.before, said.after))
        expected = reference(inputs_embeds=torch.cat([before, picture, after], dim=1)).logits[:, -len(said.after) - 1 :]
        found = model(features, [said])
        longer = model(
            features.expand(2, -1, -1), [said, Conversation(said.before, said.after * 2, [], [*range(2 * len(said.after))])]
        )
        every = model(features, [said], torch.arange(TINY.grid**2))
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=2e-4)
    torch.testing.assert_close(longer[:1, : found.shape[1]], found, atol=2e-4, rtol=2e-4)  # pads are not seen
    torch.testing.assert_close(every, found)


def test_conversations_apart_do_not_see_each_other(text: Tokenizer) -> None:
    torch.manual_seed(0)
    model = UnderstanderModel(text.get_vocab_size()).eval().requires_grad_(False)
    features, cells = torch.randn(1, TINY.grid**2, TINY.code_dim), torch.tensor([3, 70, 200])
    alone = [tokenized(text, [turn]) for turn in TURNS]
    for seen in (None, cells):
        found = model(features, [apart(alone)], seen)[:, 1:]
        expected = torch.cat([model(features, [said], seen)[:, 1:] for said in alone], dim=1)
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-5)
    assert apart(alone).taught == [taught for said in alone for taught in said.taught]


def test_a_check_is_taught_by_one_token_that_an_answer_begins_with() -> None:
    turns = [Turn("present", "is it a fox?", "Yes, a fox."), Turn("present", "is it a fox?", "No, an owl.")]
    text = train_text_tokenizer([each for turn in turns for each in (turn.question, turn.answer)])
    for turn, is_so in zip(turns, (True, False), strict=True):
        said, whole = check(text, turn.question, is_so), tokenized(text, [turn])
        assert said.taught.index(True) == len(said.after) - 1
        assert said.after[-1] == whole.after[answers(whole)[0].start]
        assert whole.after[: len(said.after) - 1] == said.after[:-1]


def test_cells_that_are_not_seen_change_nothing_and_others_keep_their_places(text: Tokenizer) -> None:
    torch.manual_seed(0)
    model = UnderstanderModel(text.get_vocab_size()).eval().requires_grad_(False)
    features = torch.randn(1, TINY.grid**2, TINY.code_dim)
    said, cells = [tokenized(text, TURNS)], torch.tensor([3, 70, 200])
    found = model(features, said, cells)
    others = features.clone()
    others[:, 4:70] = 0
    torch.testing.assert_close(model(others, said, cells), found)
    assert not torch.allclose(model(features, said, cells - 1), found, atol=1e-4)
    moved = torch.roll(features, 1, dims=1)
    assert not torch.allclose(model(moved, said, cells + 1), found, atol=1e-6)  # the same features elsewhere


@pytest.mark.parametrize(("step", "noise"), [(0, 0.0), (5, 0.5), (8, 0.0)])
def test_a_resumed_understander_training_repeats_the_steps(text: Tokenizer, tmp_path: Path, step: int, noise: float) -> None:
    rng = np.random.default_rng(0)
    subjects = [Subject((("apple", 1 + i % 2),), ("red",), "3d") for i in range(5)] + [Subject((), ("blue",), PHOTO)]
    codes = torch.from_numpy(rng.integers(0, TINY.codebook_size, (6, TINY.n_codes)).astype(np.int16))
    rows = torch.nn.functional.normalize(torch.randn(TINY.codebook_size, TINY.code_dim), dim=1)
    pictures = Encoded(codes, subjects)

    def training() -> UnderstanderTraining:
        return UnderstanderTraining(pictures, pictures, ["apple", "dog"], rows, text, 10, 2, 1e-3, 3, noise)

    first = training()
    first.step = step
    assert list(first.run_step()) == ["guess", "loss"]
    torch.save(first.state(), tmp_path / "state")
    expected = first.run_step()
    again = training()
    again.load(torch.load(tmp_path / "state", weights_only=True))
    assert again.run_step() == expected
    figures = again.evaluate(tmp_path, pictures=2)
    assert figures == first.evaluate(tmp_path, pictures=2)
    assert 0 <= again.score(figures) <= 1


def test_what_was_encoded_is_kept_for_what_it_was_made_of(tmp_path: Path) -> None:
    made: list[int] = []

    def make() -> dict[str, Encoded]:
        made.append(len(made))
        return {"train": Encoded(torch.full((1, 3), len(made)), [Subject((("apple", 2),), ("red",), "3d")])}

    for made_of, count in (("a", 1), ("a", 1), ("b", 2), ("b", 2), ("a", 3)):
        found = _kept(tmp_path / "kept.pt", made_of, make)["train"]
        assert found.codes.tolist() == [[count] * 3]
        assert found.subjects == [Subject((("apple", 2),), ("red",), "3d")]


@pytest.mark.parametrize(
    ("kind", "answer", "right", "expected"),
    [
        ("present", "Yes, a cat.", "Yes, a dog.", True),
        ("present", "No, a dog.", "Yes, a dog.", False),
        ("coloured", "", "No, red.", False),
        ("photograph", "No.", "No, a drawing.", True),
        ("photograph", "Yes, a drawing.", "No, a drawing.", False),
        ("colour", "Red and white.", "Red.", True),
        ("what", "A red apple.", "An apple.", False),
    ],
)
def test_answers_count_by_their_first_word_or_whole(kind: str, answer: str, right: str, expected: bool) -> None:
    assert _is_right(kind, answer, right) == expected


def test_features_are_those_of_the_quantizer() -> None:
    """Rows of the codebook added up over the scales, each half of unit length."""
    torch.manual_seed(0)
    halves = [
        torch.nn.functional.normalize(torch.randn(TINY.codebook_size, n), dim=1) for n in (TINY.semantic_dim, TINY.pixel_dim)
    ]
    rows = torch.cat(halves, dim=1)
    features = quantizer(rows).decode(torch.tensor([[7]]))
    torch.testing.assert_close(features, rows[7][None, :, None, None].expand_as(features))
