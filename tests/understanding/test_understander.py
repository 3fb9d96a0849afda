from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support.mini_generator import tokenizer_bundle
from tests.support.mini_understander import (
    GEOMETRIES,
    export_quietly,
    features,
    pool_is_clean,
    reference_model,
    reference_projector,
    write_checkpoint,
)
from tokenflow_export.tracing.weight_quantization import FULL_PRECISION, ExportPrecision
from tokenflow_sdk import AnswerParams, Codes, Tokenizer, Understander
from tokenflow_sdk.bundle.bundle import Bundle
from tokenflow_sdk.bundle.model_config import TokenizerConfig
from tokenflow_sdk.errors import (
    ArgumentError,
    ArrayError,
    BundleKindError,
    BundleNotFoundError,
    CodebookMismatchError,
    CorruptBundleError,
    ImageReadError,
    NotFiniteError,
    PagesExhausted,
    PreparationWarning,
    PromptError,
)
from tokenflow_sdk.pictures.preparation import Preparation
from tokenflow_sdk.understanding.params import sample_token
from tokenflow_sdk.understanding.prompt import ImageBlock, TokenPrompt
from tokenflow_sdk.understanding.token_loop import AnswerRequest

FREE = AnswerParams(max_tokens=64, stop_ids=())
QUESTIONS = ("what is the matter?", "?", "tell me all about the other thing that is there, and then some more: " * 2)


@dataclass(frozen=True)
class Reference:
    """transformers' model, the projector, and the bundle exported from both."""

    model: Any
    projector: torch.nn.Module
    bundle: Path

    def embed(self, prompt: TokenPrompt, answer: Sequence[int] = ()) -> torch.Tensor:
        """[1, Q, H]."""
        table = self.model.model.embed_tokens
        blocks = [*prompt.blocks, tuple(answer)]
        parts = [
            self.projector(torch.tensor(b.features)) if isinstance(b, ImageBlock) else table(torch.tensor(b).long())
            for b in blocks
        ]
        return torch.cat(parts)[None]

    @torch.inference_mode()
    def logits(self, prompt: TokenPrompt, answer: Sequence[int]) -> np.ndarray:
        """What each token of the answer is drawn from, [Q, V]: one pass over everything, without a cache."""
        found = self.model(inputs_embeds=self.embed(prompt, answer[:-1])).logits[0]
        return found[-len(answer) :].numpy()

    @torch.inference_mode()
    def generate(self, prompt: TokenPrompt, count: int = 64) -> list[int]:
        x = self.embed(prompt)
        settings = {"do_sample": False, "max_new_tokens": count, "eos_token_id": None, "pad_token_id": 0}
        found = self.model.generate(inputs_embeds=x, attention_mask=torch.ones(x.shape[:2], dtype=torch.long), **settings)
        return found[0].tolist()


@pytest.fixture(scope="module")
def references(mini_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Reference]:
    """By geometry; all read the small CLIP tokenizer's codes."""
    directory, made = tmp_path_factory.mktemp("understanders"), {}

    def get(name: str) -> Reference:
        if name not in made:
            config = GEOMETRIES[name]
            model, projector = reference_model(config), reference_projector(config["hidden_size"])
            checkpoint = write_checkpoint(directory / f"{name}_hf", config, model, projector)
            bundle = export_quietly(checkpoint, Bundle.open(mini_bundle, TokenizerConfig), directory / name)
            made[name] = Reference(model, projector, bundle)
        return made[name]

    return get


@pytest.fixture(scope="module")
def reference(references: Callable[[str], Reference]) -> Reference:
    return references("qwen")


@pytest.fixture(scope="module")
def understander(reference: Reference) -> Iterator[Understander]:
    with Understander.from_pretrained(reference.bundle, threads=2, page_size=4) as understander:
        yield understander


def prompt_of(understander: Understander, pictures: Sequence[np.ndarray], question: str) -> TokenPrompt:
    return understander._answering._text.first([ImageBlock(picture) for picture in pictures], question)


def recorded(understander: Understander, ask: Callable[[], Any]) -> tuple[Any, list[np.ndarray]]:
    """What `ask` gives, and the logits [B, V] of every step."""
    head, steps = understander._runner.model.sessions["head"], []
    plain = head._infer

    def spying(feeds, outputs):
        found = plain(feeds, (*outputs, "logits"))
        steps.append(found[-1])
        return found[:-1]

    head._infer = spying
    try:
        return ask(), steps
    finally:
        head._infer = plain


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("page_size", [5, 16])
def test_answers_are_transformers_own(geometry: str, page_size: int, references: Callable[[str], Reference]) -> None:
    """64 greedy tokens and the logits of each, alone, with a shared picture, and after an eviction."""
    reference = references(geometry)
    with Understander.from_pretrained(reference.bundle, page_size=page_size) as understander:
        for case, question in (("fresh", QUESTIONS[0]), ("shared", QUESTIONS[2]), ("evicted", QUESTIONS[2])):
            while case == "evicted" and understander._runner.model.scheduler.cache.evict():
                pass
            answer, steps = recorded(understander, lambda q=question: understander.answer(features(0), q, params=FREE))
            prompt = prompt_of(understander, [features(0)], question)
            assert answer.cached_tokens == (prompt.prefix_boundaries[0][0] if case == "shared" else 0)
            assert list(answer.token_ids) == reference.generate(prompt)
            assert np.abs(np.concatenate(steps) - reference.logits(prompt, answer.token_ids)).max() < 1e-3
        assert pool_is_clean(understander)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_answers_in_batches_of_mixed_lengths_are_transformers_own(
    geometry: str, references: Callable[[str], Reference]
) -> None:
    """Questions of all lengths about one or several pictures, in a pool that makes some wait and evicts beginnings."""
    reference = references(geometry)
    with Understander.from_pretrained(reference.bundle, page_size=7, pages=160) as understander:
        asked = [([features(i % 3)] * (1 + i % 2), QUESTIONS[i % 3]) for i in range(6)]
        for _ in range(2):
            for answer, (pictures, question) in zip(understander.answer_batch(asked, params=FREE), asked, strict=True):
                prompt = prompt_of(understander, pictures, question)
                assert list(answer.token_ids) == reference.generate(prompt)
        assert pool_is_clean(understander)


def test_logits_in_a_batch_are_transformers_own(reference: Reference, understander: Understander) -> None:
    asked = [([features(i)], QUESTIONS[i]) for i in range(3)]
    params = AnswerParams(max_tokens=9, stop_ids=())
    answers, steps = recorded(understander, lambda: understander.answer_batch(asked, params=params))
    rows = np.concatenate(steps)
    for answer, (pictures, question) in zip(answers, asked, strict=True):
        expected = reference.logits(prompt_of(understander, pictures, question), answer.token_ids)
        distances = np.abs(rows[:, None] - expected[None]).max(axis=-1)
        assert distances.min(axis=0).max() < 1e-3


def test_later_questions_read_the_whole_conversation_but_run_only_what_is_new(
    reference: Reference, understander: Understander
) -> None:
    pictures = [features(7), features(8)]
    chat, prompt, known = understander.chat(pictures), prompt_of(understander, pictures, "what?"), 0
    for number, count in enumerate((64, 5, 20), start=1):
        answer = chat.ask("what?", params=AnswerParams(max_tokens=count, stop_ids=()))
        assert list(answer.token_ids) == reference.generate(prompt, count)
        assert answer.prompt_tokens == len(prompt)
        assert number == 1 or answer.cached_tokens == known
        # The last token was never run, so it is read with the next question.
        history = prompt.followed_by(answer.token_ids[:-1], shared=True)
        prompt, known = understander._answering._text.next(history, answer.token_ids[-1:], "what?"), len(history)
    assert len(chat.turns) == 3
    assert pool_is_clean(understander)


def test_a_conversation_whose_pages_are_gone_is_read_again(reference: Reference) -> None:
    with Understander.from_pretrained(reference.bundle, page_size=4) as understander:
        kept, lost = understander.chat(features(1)), understander.chat(features(1))
        for chat in (kept, lost):
            chat.ask("what?", params=FREE)
        with_pages = kept.ask("and?", params=FREE)
        while understander._runner.model.scheduler.cache.evict():
            pass
        without = lost.ask("and?", params=FREE)
        assert (without.token_ids, without.cached_tokens) == (with_pages.token_ids, 0)
        assert with_pages.cached_tokens > 0


def test_among_equal_logits_the_first_is_taken(mini_bundle: Path, tmp_path: Path) -> None:
    """As transformers does, whatever the seed: from 1 to 128 tokens are equally likely, more than are sorted."""
    config = GEOMETRIES["qwen"]
    model, projector = reference_model(config), reference_projector(config["hidden_size"])
    alike = np.frompyfunc(lambda i: 2 ** int(i).bit_length() // 2, 1, 1)(np.arange(288)).astype(np.int64)
    with torch.no_grad():
        model.lm_head.weight[:] = model.lm_head.weight[torch.from_numpy(alike)]
    checkpoint = write_checkpoint(tmp_path / "hf", config, model, projector)
    tokenizer = Bundle.open(mini_bundle, TokenizerConfig)
    reference = Reference(model, projector, export_quietly(checkpoint, tokenizer, tmp_path / "bundle"))
    found: set[int] = set()
    with Understander.from_pretrained(reference.bundle, threads=1) as understander:
        for number in range(4):
            prompt = prompt_of(understander, [features(number)], "?")
            asked = [(features(number), "?")] * 2
            for seed in (1, 2):
                params = AnswerParams(max_tokens=8, stop_ids=(), seed=seed)
                answers = understander.answer_batch(asked, params=params)
                assert [list(answer.token_ids) for answer in answers] == [reference.generate(prompt, 8)] * 2
            found |= set(answers[0].token_ids)
        assert found <= set(alike)
        assert max(found) >= 16
        drawn = understander.answer(features(0), "?", params=AnswerParams(max_tokens=30, stop_ids=(), temperature=1.0))
        assert not set(drawn.token_ids) <= set(alike)


def wide(size: float) -> np.ndarray:
    """Features that overflow inside the model."""
    return np.full((16, 40), size, np.float32)


def test_features_that_overflow_fail_alone(understander: Understander) -> None:
    asked = [(features(8 + i), "?") for i in range(3)]
    params = AnswerParams(max_tokens=24, stop_ids=())
    alone = [understander.answer(*question, params=params).token_ids for question in asked]
    threads, found = [], {}

    def ask(number: int) -> None:
        try:
            found[number] = understander.answer(*asked[number], params=params).token_ids
        except NotFiniteError as error:
            found[number] = str(error)

    asked.append(([wide(3e38), features(2), features(3)], "a wide table"))  # type: ignore[arg-type]
    for number in range(4):
        threads.append(threading.Thread(target=ask, args=(number,)))
        threads[-1].start()
    for thread in threads:
        thread.join()
    assert [found[number] for number in range(3)] == alone
    assert "NaN or infinity" in found[3]
    assert pool_is_clean(understander)


@pytest.mark.parametrize("precision", [FULL_PRECISION, ExportPrecision("fp16")], ids=str)
def test_pages_of_what_overflowed_are_clean(
    precision: ExportPrecision, mini_understander: Path, mini_bundle: Path, tmp_path: Path
) -> None:
    bundle = mini_understander
    if precision != FULL_PRECISION:
        checkpoint = mini_understander.with_name("hf")
        bundle = export_quietly(checkpoint, Bundle.open(mini_bundle, TokenizerConfig), tmp_path / "bundle", precision)
    with Understander.from_pretrained(bundle, threads=1, pages=8) as understander:
        transformer = understander._runner.model.transformer
        params = AnswerParams(max_tokens=24, stop_ids=())
        expected = understander.answer(features(8), "?", params=params).token_ids
        for _ in range(3):
            while understander._runner.model.scheduler.cache.evict():
                pass
            with pytest.raises(NotFiniteError):
                understander.answer(wide(3e38), "?", params=params)
            assert transformer.pool.free == 8
            assert understander.answer(features(8), "?", params=params).token_ids == expected
        assert all(np.isfinite(np.asarray(pages.slots)).all() for pages in (transformer._k, transformer._v))


def test_the_pieces_of_a_stream_are_the_answer(understander: Understander) -> None:
    whole = understander.answer(features(0), QUESTIONS[0], params=FREE)
    pieces = list(understander.stream(features(0), QUESTIONS[0], params=FREE))
    assert "".join(pieces) == whole.text
    assert len(pieces) > 5
    chat = understander.chat(features(0))
    assert "".join(chat.stream(QUESTIONS[0], params=FREE)) == whole.text
    assert chat.turns == [(QUESTIONS[0], whole.text)]


def test_cancelled_streams_leak_no_page_and_were_never_asked(understander: Understander) -> None:
    rng = np.random.default_rng(0)
    # A chat answers one question at a time, and four streams are open here.
    chats = [understander.chat(features(0)) for _ in range(50)]
    streams = []
    for i in range(150):
        chat = chats[i // 3]
        stream = chat.stream(f"{i}?", params=FREE) if i % 3 == 0 else understander.stream(features(i % 4), f"{i}?", params=FREE)
        for _ in range(int(rng.integers(0, 4))):
            next(stream, None)
        streams.append(stream)
        if len(streams) > 3:
            streams.pop(int(rng.integers(4))).close()
    del streams, stream
    gc.collect()
    assert pool_is_clean(understander)
    assert not any(chat.turns for chat in chats)


def test_the_head_graph_is_its_numpy_twin(understander: Understander) -> None:
    """Settings of all kinds in one batch: each token is the one that NumPy draws from the same logits and noise."""
    from tokenflow_sdk.model.sampling import uniform

    settings = [
        AnswerParams(max_tokens=40, stop_ids=(), temperature=1.5, seed=3),
        AnswerParams(max_tokens=40, stop_ids=(), temperature=0.7, top_k=20, top_p=0.8, repetition_penalty=1.3, seed=4),
        AnswerParams(max_tokens=40, stop_ids=(), repetition_penalty=1.5),
        AnswerParams(max_tokens=40, stop_ids=(), temperature=2.0, top_k=288, seed=5),
    ]
    turns = [understander._request(features(0), "what?", params) for params in settings]
    loop = understander._runner.model.scheduler.loop
    plain, orders = loop._sample, []

    def noting(given: Sequence[AnswerRequest], hidden: np.ndarray) -> None:
        orders.append([turns.index(turn) for turn in given])
        plain(given, hidden)

    loop._sample = noting  # type: ignore[method-assign]
    _, steps = recorded(understander, lambda: understander._answering.answers(turns))
    loop._sample = plain  # type: ignore[method-assign]
    drawn = [0] * len(turns)
    same = total = 0
    for order, logits in zip(orders, steps, strict=True):
        for i, row in zip(order, logits, strict=True):
            params, answer = settings[i], turns[i].tokens
            noise = float(uniform(params.seed, 0, drawn[i], 0, 1)[0])
            total += 1
            same += sample_token(row, params, answer[: drawn[i]], noise) == answer[drawn[i]]
            drawn[i] += 1
    assert (total, drawn) == (160, [40] * 4)
    assert same >= 159
    assert len({tuple(turn.tokens) for turn in turns}) == 4


def test_a_seed_repeats_an_answer(understander: Understander) -> None:
    first, again, other = (understander.answer(features(0), "what?", temperature=2.0, seed=s, max_tokens=20) for s in (1, 1, 2))
    assert first.token_ids == again.token_ids != other.token_ids
    assert first.params.seed == 1
    unseeded = [understander.answer(features(0), "what?", temperature=2.0, max_tokens=3).params.seed for _ in range(2)]
    assert unseeded[0] != unseeded[1]


def test_stop_tokens_end_an_answer(understander: Understander) -> None:
    free = understander.answer(features(0), "what?", params=FREE)
    stop = free.token_ids[10]
    stopped = understander.answer(features(0), "what?", params=AnswerParams(max_tokens=64, stop_ids=(stop,)))
    assert stopped.finish == "stop"
    assert stopped.token_ids == free.token_ids[: free.token_ids.index(stop)]
    assert len(stopped.timings) == len(stopped.token_ids) + 1
    assert free.finish == "length"
    assert list(free.timings) == sorted(free.timings)


def test_codes_need_no_encoder_and_pictures_are_encoded_once(reference: Reference, mini_bundle: Path) -> None:
    image = Image.effect_noise((90, 70), 80).convert("RGB")
    with Tokenizer.from_pretrained(mini_bundle) as tokenizer:
        codes = tokenizer.encode(image, preprocess="squash")
    with Understander.from_pretrained(reference.bundle) as understander:
        by_codes = understander.answer(codes, "what?", max_tokens=8)
        assert list(understander.tokenizer.graphs._sessions) == ["features"]
        calls = []
        encode = understander.tokenizer.encode_array
        understander.tokenizer.encode_array = lambda array: (calls.append(1), encode(array))[1]  # type: ignore[method-assign]
        by_picture = [understander.answer(image, "what?", max_tokens=8) for _ in range(3)]
        assert len(calls) == 1
        by_features = understander.answer(understander.tokenizer.features(codes), "what?", max_tokens=8)
        assert {a.token_ids for a in (by_codes, by_features, *by_picture)} == {by_codes.token_ids}
        # The first of them left the picture's pages for all others.
        ((beginning, _),) = understander._request(codes, "what?", AnswerParams()).prompt.prefix_boundaries
        assert [a.cached_tokens for a in (by_codes, by_features, *by_picture)] == [0] + [beginning] * 4
        assert 16 < beginning < by_codes.prompt_tokens
        assert understander.answer([image, codes.truncate(2)], "what?", max_tokens=8).prompt_tokens > by_codes.prompt_tokens
        cropped = replace(codes, preparation=Preparation("crop", "srgb"))
        for ask in (
            lambda: understander.answer(cropped, "what?", max_tokens=1),
            lambda: understander.answer_batch([(cropped, "what?"), ([image, cropped], "what?")], max_tokens=1),
            lambda: understander.chat([cropped, cropped]),
            lambda: understander.stream(cropped, "what?", max_tokens=1).close(),  # type: ignore[attr-defined]
        ):
            with pytest.warns(PreparationWarning, match=r"prepared by 'crop'.*by 'squash'") as caught:
                ask()
            assert [warning.filename for warning in caught] == [__file__]
        assert understander.answer(cropped, "what?", preprocess="crop", max_tokens=8).token_ids == by_codes.token_ids


def test_threads_may_share_an_understander(understander: Understander) -> None:
    asked = {i: (features(i % 2), f"{i} what?" * (1 + i)) for i in range(6)}
    expected = {i: understander.answer(*asked[i], params=FREE).token_ids for i in asked}
    found: dict[int, tuple[int, ...]] = {}
    threads = [
        threading.Thread(target=lambda i=i: found.update({i: understander.answer(*asked[i], params=FREE).token_ids}))
        for i in asked
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == expected
    assert pool_is_clean(understander)


def foreign_codes() -> Codes:
    return Codes(np.zeros(5, np.int32), (1, 2), 500, "other", "cd" * 32)


@pytest.mark.parametrize(
    ("pictures", "question", "settings", "error", "words"),
    [
        (None, "what?", {}, ArgumentError, "No image was given"),
        ([], "what?", {}, ArgumentError, "No image was given"),
        ([features(0), None], "what?", {}, ArgumentError, "No image was given"),
        (features(0), "", {}, PromptError, "no question"),
        (features(0), 5, {}, PromptError, "no question"),
        ("nowhere.jpg", "what?", {}, ImageReadError, "nowhere.jpg"),
        (features(0)[:9], "what?", {}, ArrayError, r"Features of mini_clip are \[16, 40\], not \[9, 40\]"),
        (features(0)[:, :28], "what?", {}, ArrayError, r"not \[16, 28\]"),
        (features(0) * np.nan, "what?", {}, ArrayError, "NaN"),
        (foreign_codes(), "what?", {}, CodebookMismatchError, "made by other.*not by mini_clip"),
        (features(0), "what?", {"max_tokens": 0}, ArgumentError, "max_tokens=0"),
        (features(0), "what?", {"temperature": -0.5}, ArgumentError, "temperature=-0.5"),
        (features(0), "what?", {"seed": -1}, ArgumentError, "seed=-1"),
        (features(0), "what?", {"max_tokens": 500}, PromptError, "this model reads 512"),
        (features(0), "what? " * 100, {}, PromptError, "this model reads 512"),
        ([features(0)] * 30, "what?", {}, PromptError, "this model reads 512"),
    ],
)
def test_questions_that_cannot_work_are_named(
    understander: Understander, pictures: Any, question: Any, settings: dict, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        understander.answer(pictures, question, **settings)
    with pytest.raises(error, match=words):
        understander.stream(pictures, question, **settings)
    with pytest.raises(error, match=words):
        understander.answer_batch([(features(1), "what?"), (pictures, question)], **settings)
    with pytest.raises(error, match=words):
        understander.chat(pictures).stream(question, **settings)
    assert pool_is_clean(understander)


@pytest.mark.parametrize(
    "one",
    [
        ("cat.jpg", "what?"),
        (("a.jpg", "b.jpg"), "what?"),
        (features(0), "what?"),
        "ab",
        ["ab", "cd"],
        [(features(0), "a", "b")],
        None,
    ],
)
def test_one_question_is_not_taken_for_several(understander: Understander, one: Any) -> None:
    with pytest.raises(ArgumentError, match=r"answer_batch\(\[\(images, question\)"):
        understander.answer_batch(one)


def test_a_buffer_may_be_filled_again_while_an_answer_runs(reference: Reference) -> None:
    with Understander.from_pretrained(reference.bundle) as understander:
        expected = understander.answer(features(1), "what?", params=FREE).text
    with Understander.from_pretrained(reference.bundle) as understander:
        buffer = features(1)
        stream, chat = understander.stream(buffer, "what?", params=FREE), understander.chat(buffer)
        buffer[:] = features(2)
        assert "".join(stream) == expected
        assert chat.ask("what?", params=FREE).text == expected
        # Under the digest of the first picture are its own pages.
        assert understander.answer(features(1), "what?", params=FREE).text == expected


def test_a_running_answers_image_stays_in_the_prefix_cache(reference: Reference) -> None:
    with Understander.from_pretrained(reference.bundle, page_size=4, pages=60) as understander:
        live = understander.stream(features(1), "?", params=AnswerParams(max_tokens=60, stop_ids=()))
        next(live)
        pool, cache = understander._runner.model.transformer.pool, understander._runner.model.scheduler.cache
        for other in (2, 3):
            understander.answer(features(other), "?", max_tokens=2)
        key, free = next(iter(cache._tables)), pool.free
        assert cache.evict()
        assert pool.free > free
        assert key in cache._tables
        live.close()
        assert understander.answer(features(1), "again?", max_tokens=2).cached_tokens > 16


def test_more_than_the_pool_holds_is_named(reference: Reference) -> None:
    with Understander.from_pretrained(reference.bundle, page_size=4, pages=30) as understander:
        with pytest.raises(PagesExhausted, match=r"\d+ key/value pages are needed, 30 of 30 are free.*pages=\d+") as caught:
            understander.answer(features(0), "what?", max_tokens=100)
        assert pool_is_clean(understander)
    with Understander.from_pretrained(reference.bundle, page_size=4, pages=caught.value.needed) as understander:
        assert understander.answer(features(0), "what?", max_tokens=100).token_ids
    for sizes in ({"pages": 0}, {"page_size": 0}):
        with pytest.raises(ArgumentError, match="hold nothing"):
            Understander.from_pretrained(reference.bundle, **sizes)


def test_a_tokenizer_that_does_not_match_is_refused(reference: Reference, mini_bundle: Path, tmp_path: Path) -> None:
    other = tokenizer_bundle(tmp_path / "other", (1, 2, 3, 4), 500)
    with Tokenizer(other) as tokenizer, pytest.raises(CodebookMismatchError, match=r"codes of mini_clip .* not of mini"):
        Understander.from_pretrained(reference.bundle, tokenizer=tokenizer)
    with pytest.raises(BundleNotFoundError, match="tokenizer of .* is not at .*Give tokenizer="):
        Understander.from_pretrained(reference.bundle, tokenizer=tmp_path / "nowhere")
    with pytest.raises(BundleKindError, match="holds a bundle of kind 'tokenizer', not an understander"):
        Understander.from_pretrained(mini_bundle)


def test_a_damaged_bundle_is_named(reference: Reference, tmp_path: Path) -> None:
    import json
    import shutil

    copy = Path(shutil.copytree(reference.bundle, tmp_path / "copy"))
    manifest = json.loads((copy / "bundle.json").read_text())
    for key, value, words in (
        ("stop_ids", [], "gives stop_ids"),
        ("stop_ids", [400], "names token 400 beyond its vocabulary"),
        ("context", 0, "gives context as 0"),
        ("tokenizer", None, "has no tokenizer"),
        ("template", {"opening": []}, "config.template has no"),
        ("template", manifest["config"]["template"] | {"user": [-1]}, r"gives user as \[-1\]"),
    ):
        damaged = manifest | {"config": manifest["config"] | {key: value}}
        (copy / "bundle.json").write_text(json.dumps(damaged))
        with pytest.raises(CorruptBundleError, match=words):
            Understander.from_pretrained(copy)
    (copy / "bundle.json").write_text(json.dumps(manifest))
    (copy / "tokenizer.json").unlink()
    with pytest.raises(CorruptBundleError, match=r"tokenizer\.json is missing"):
        Understander.from_pretrained(copy)


def test_a_closed_understander_says_so(reference: Reference) -> None:
    understander = Understander.from_pretrained(reference.bundle)
    understander.close()
    understander.close()
    with pytest.raises(ArgumentError, match="closed"):
        understander.answer(features(0), "what?")


def test_a_failing_step_is_raised_to_those_it_was_for(understander: Understander, monkeypatch: pytest.MonkeyPatch) -> None:
    other = understander.stream(features(0), QUESTIONS[0], params=FREE)
    next(other)
    with monkeypatch.context() as patch:
        patch.setattr(understander._runner.model.scheduler.loop, "begin", lambda turn, table: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            understander.answer(features(5), "what?")
    assert len(list(other)) > 5
    with monkeypatch.context() as patch:
        patch.setattr(understander._runner.model.scheduler.loop, "decode", lambda turns: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            understander.answer(features(0), "what?")
    assert pool_is_clean(understander)
    assert understander.answer(features(0), "what?", max_tokens=2).token_ids
