from __future__ import annotations

import copy
import dataclasses
import multiprocessing
import pickle
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tokenflow_sdk
from tests.conftest import ROOT
from tests.support.fakes import CONFIG, GRAPHS, FakeSession
from tokenflow_sdk import (
    Answer,
    AnswerParams,
    BuildConfig,
    Bundle,
    Codes,
    Generation,
    Generator,
    Pass,
    RuntimeOptions,
    SamplingParams,
    Scales,
    Tokenizer,
    Understander,
)
from tokenflow_sdk.bundle.bundle import find_bundle, open_bundle
from tokenflow_sdk.engines.cache import CachedEngine, EngineKey
from tokenflow_sdk.errors import ArgumentError, BundleNotFoundError, CorruptBundleError, ImageReadError, PromptError
from tokenflow_sdk.generation.results import GeneratedScale
from tokenflow_sdk.parity.certificate import Certificate
from tokenflow_sdk.parity.language_model import LanguageModelReport
from tokenflow_sdk.parity.tokenizer_report import Flip, TokenizerReport

PHOTO = ROOT / "examples" / "chelsea.jpg"


def pickled(thing: Any) -> Any:
    return pickle.loads(pickle.dumps(thing))  # noqa: S301 - what tests made


COPIES = [pickled, copy.copy, copy.deepcopy]
PARAMS = SamplingParams.preset("balanced", 3.0, 7)
CODES = Codes(np.arange(5, dtype=np.int32), (1, 2), 256, "fake", "ab" * 32)
REPORT = TokenizerReport(1, (1, 2), (1.0, 0.75), (Flip(0, 1, 2, 3, 4, 0.5),), 0.8, 0.1, 0.2, 0.9, 40.0, 0.99)
PLAIN: list[Any] = [
    Answer("yes", (1, 2), "stop", 9, 3, (0.1, 0.2), AnswerParams(seed=5)),
    AnswerParams(temperature=0.5, seed=3),
    BuildConfig("tensorrt", precision="bf16"),
    CODES,
    CODES.truncate(1),
    PARAMS,
    *PARAMS.passes,
    RuntimeOptions("cpu", threads=2, build_config=BuildConfig()),
    Scales((1, 2)),
    CONFIG,
    Certificate((), "equal", {"psnr": 40.0}),
    REPORT,
    LanguageModelReport(0.1, 0.995, 0.95, "token"),
    CachedEngine(
        EngineKey("decode", "ab", "1", "tensorrt", "10", "sm86", "fp16", "p"),
        Path("a"),
        5,
        "cd",
        {},
        {"pages": 1},
        {"kernels": 3},
    ),
]


@pytest.fixture
def tokenizer(mini_bundle: Path) -> Tokenizer:
    return Tokenizer.from_pretrained(mini_bundle, threads=1, batch_limit=2)


@pytest.mark.parametrize("duplicate", COPIES)
@pytest.mark.parametrize("thing", PLAIN, ids=lambda thing: type(thing).__name__)
def test_results_and_settings_are_equal_to_their_copies(thing: Any, duplicate: Callable[[Any], Any]) -> None:
    found = duplicate(thing)
    assert type(found) is type(thing)
    assert found == thing
    assert repr(found) == repr(thing)


def test_every_public_class_is_copied_here() -> None:
    opened = {"Bundle", "Chat", "GeneratedScale", "Generation", "Generator", "RequestStream"}
    opened |= {"TokenFlowError", "Tokenizer", "Understander", "read_codes"}
    assert {type(thing).__name__ for thing in PLAIN} | opened | {"__version__"} >= set(tokenflow_sdk.__all__)
    assert isinstance(PARAMS.passes[0], Pass)


@pytest.mark.parametrize("duplicate", COPIES)
def test_a_bundle_is_equal_to_its_copy(mini_bundle: Path, duplicate: Callable[[Any], Any]) -> None:
    bundle = open_bundle(mini_bundle)
    found = duplicate(bundle)
    assert (found, found.sha256) == (bundle, bundle.sha256)
    found.verify()


@pytest.mark.parametrize("duplicate", COPIES)
def test_a_copy_of_a_tokenizer_opens_at_its_first_use(tokenizer: Tokenizer, duplicate: Callable[[Any], Any]) -> None:
    found = duplicate(tokenizer)
    assert repr(found) == "Tokenizer(a copy that opens when it is used)"
    assert found.encode(PHOTO) == tokenizer.encode(PHOTO)
    assert (found.batch_limit, found.config, repr(found)) == (2, tokenizer.config, repr(tokenizer))
    found.close()
    tokenizer.encode(PHOTO)
    assert not hasattr(found, "misspelled")
    assert not hasattr(duplicate(tokenizer), "__array__")


@pytest.mark.parametrize("duplicate", COPIES)
def test_a_copy_of_what_is_closed_is_closed(
    tokenizer: Tokenizer, mini_generator: Path, duplicate: Callable[[Any], Any]
) -> None:
    generator = Generator.from_pretrained(mini_generator, threads=1)
    for model, use in ((generator, lambda model: model.generate("w1")), (tokenizer, lambda model: model.encode(PHOTO))):
        unused = duplicate(model)
        with unused:
            pass
        model.close()
        for closed in (unused, model, duplicate(model), duplicate(unused)):
            with pytest.raises(ArgumentError, match=rf"This {type(model).__name__} is closed.*from_pretrained"):
                use(closed)
            closed.close()


def test_a_copy_is_of_the_same_bundle_or_none(mini_bundle: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(mini_bundle, tmp_path / "bundle"))
    with Tokenizer.from_pretrained(path, threads=1) as tokenizer:
        content = pickle.dumps(tokenizer)
    manifest = path / "bundle.json"
    manifest.write_text(manifest.read_text() + " ")
    with pytest.raises(CorruptBundleError, match="it is another bundle"):
        pickle.loads(content).encode(PHOTO)  # noqa: S301
    shutil.rmtree(path)
    with pytest.raises(BundleNotFoundError):
        pickle.loads(content).encode(PHOTO)  # noqa: S301


def test_names_are_found_from_everywhere(mini_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").symlink_to(mini_bundle)
    (tmp_path / "mine.toml").write_text('backend = "onnxruntime"\nprecision = "fp32"\n')
    monkeypatch.chdir(tmp_path)
    with Tokenizer.from_pretrained("here", threads=1, build_config="mine.toml") as tokenizer:
        content, expected = pickle.dumps(tokenizer), tokenizer.encode(PHOTO)
    (tmp_path / "mine.toml").unlink()
    monkeypatch.chdir("/")
    assert pickle.loads(content).encode(PHOTO) == expected  # noqa: S301
    bundle = open_bundle(find_bundle("tiny", "tokenizer"))
    assert bundle.portable_name("tiny") == "tiny"
    assert bundle.portable_name("nobody/nothing") == "nobody/nothing"


def test_what_was_made_from_parts_says_so() -> None:
    tokenizer = Tokenizer(Bundle(Path(), CONFIG, GRAPHS, {}, {}, {}), open_session=FakeSession)
    for duplicate in COPIES:
        with pytest.raises(ArgumentError, match="was made from parts"):
            duplicate(tokenizer)
    tokenizer.close()
    with pytest.raises(ArgumentError, match="This Tokenizer is closed"):
        pickled(tokenizer).encode(PHOTO)


def test_threads_that_use_a_copy_at_once_get_one(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Tokenizer] = []
    both, plain = threading.Barrier(2), Tokenizer.open

    def open_both(*arguments: Any) -> Tokenizer:
        both.wait(20)
        opened.append(plain(*arguments))
        return opened[-1]

    found, used = pickled(tokenizer), []
    monkeypatch.setattr(Tokenizer, "open", open_both)
    threads = [threading.Thread(target=lambda: used.append(found.graphs)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert used[0] is used[1]
    assert sorted(each.graphs is used[0] for each in opened) == [False, True]
    assert [each._closed for each in opened if each.graphs is not used[0]] == [True]


def test_drawings_arrive_where_their_tokenizer_is_not(mini_generator: Path, mini_bundle: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(mini_bundle, tmp_path / "bundle"))
    with Generator.from_pretrained(mini_generator, tokenizer=path, threads=1) as generator:
        drawn = generator.generate("w1 w2", seed=1)
        (scale, *_) = generator.stream("w1 w2", seed=1)
    found: list[Any] = [pickled(drawn), pickled(scale)]
    assert found == [drawn, scale]
    assert {hash(each) for each in found} == {hash(drawn), hash(scale)}
    assert isinstance(found[0], Generation) and isinstance(found[1], GeneratedScale)
    assert np.array_equal(found[0].images[0], drawn.images[0])
    late = pickled(drawn)
    shutil.rmtree(path)
    assert late.codes == drawn.codes
    assert "opens when it is used" in repr(late)
    with pytest.raises(BundleNotFoundError):
        _ = late.images
    drawn.tokenizer.close()
    with pytest.raises(ArgumentError, match="closed"):
        _ = pickled(drawn).images


def test_answers_are_copied_and_chats_and_streams_say_what_to_send(mini_understander: Path) -> None:
    with Understander.from_pretrained(mini_understander, threads=1) as understander:
        answer = understander.answer(PHOTO, "what?", max_tokens=3, seed=1)
        chat, stream = understander.chat(PHOTO), understander.stream(PHOTO, "what?")
        with pickled(understander) as again:
            other = again.answer(PHOTO, "what?", max_tokens=3, seed=1)
    assert pickled(answer) == answer == dataclasses.replace(other, timings=answer.timings)
    for duplicate in COPIES:
        with pytest.raises(ArgumentError, match="Send its `turns` and the images"):
            duplicate(chat)
        with pytest.raises(ArgumentError, match=r"Send its result\(\)"):
            duplicate(stream)


def draw(generator: Generator, prompt: str) -> Generation:
    return generator.generate(prompt, seed=1)


def encode(tokenizer: Tokenizer, path: str) -> Codes:
    return tokenizer.encode(path)


def test_a_started_process_works_with_them(mini_generator: Path) -> None:
    """Models are sent there, results and errors come back."""
    with (
        Generator.from_pretrained(mini_generator, threads=1) as generator,
        ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool,
    ):
        drawn = pool.submit(draw, generator, "w1 w2").result(120)
        assert drawn.codes == draw(generator, "w1 w2").codes
        assert len(drawn.images) == 1
        assert pool.submit(encode, generator.tokenizer, str(PHOTO)).result(60) == generator.tokenizer.encode(PHOTO)
        with pytest.raises(ImageReadError) as caught:
            pool.submit(encode, generator.tokenizer, "nothing.jpg").result(60)
        assert caught.value.message.startswith("nothing.jpg") and caught.value.hint
        with pytest.raises(PromptError, match="The prompt is empty"):
            pool.submit(draw, generator, " ").result(60)
