from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import DATA
from tests.support.generation_oracle import UncachedGenerator
from tests.support.mini_generator import (
    GROUPED,
    PATCH_NUMS_16,
    RELEASED_TINY,
    SMALLEST,
    export_quietly,
    generator_shapes,
    released_tiny_shapes,
    tokenizer_bundle,
    write_checkpoint,
)
from tests.support.waiting import comes_true
from tokenflow_export.checkpoints.hf_directory import HfDirectory
from tokenflow_sdk import Tokenizer
from tokenflow_sdk.bundle.bundle import Bundle
from tokenflow_sdk.bundle.model_config import TokenizerConfig
from tokenflow_sdk.errors import (
    ArgumentError,
    BundleNotFoundError,
    CodebookMismatchError,
    CorruptBundleError,
    MissingPackageError,
    PagesExhausted,
    PromptError,
    RequestTimeoutError,
)
from tokenflow_sdk.generation.generator import Generator
from tokenflow_sdk.model.sampling import Pass, SamplingParams
from tokenflow_sdk.parity.tokenizer import TokenizerReference

GREEDY = SamplingParams((Pass(1, 0.0),))
GREEDY_TWICE = SamplingParams((Pass(1, 0.0),) * 2)

# Grouped heads, and heads of another size than hidden_size / num_attention_heads.
GEOMETRIES = {
    "grouped": GROUPED,
    "wide": SMALLEST
    | {"num_attention_heads": 3, "head_dim": 10, "hidden_size": 48, "intermediate_size": 80, "rope_theta": 5000.0},
}


@pytest.fixture(scope="module")
def checkpoints(mini_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """Checkpoint and bundle of a small generator by geometry, for the small CLIP tokenizer."""
    directory, made = tmp_path_factory.mktemp("generators"), {}

    def get(name: str) -> tuple[Path, Path]:
        if name not in made:
            config = GEOMETRIES[name]
            shapes = generator_shapes(config, 44, 500, (1, 2, 3, 4))
            checkpoint = write_checkpoint(directory / f"{name}_hf", config, shapes, 40, 500, shards=2)
            tokenizer = Bundle.open(mini_bundle, TokenizerConfig)
            made[name] = checkpoint, export_quietly(checkpoint, tokenizer, directory / name)
        return made[name]

    return get


@pytest.fixture(scope="module")
def bundle(checkpoints: Callable[[str], tuple[Path, Path]]) -> Path:
    return checkpoints("grouped")[1]


@pytest.fixture(scope="module")
def generator(bundle: Path) -> Iterator[Generator]:
    with Generator.from_pretrained(bundle, threads=2, pages=120, page_size=4) as generator:
        yield generator


def pool_is_clean(generator: Generator) -> bool:
    """Only the cached negative prompt's pages are held."""
    scheduler = generator._runner.model.scheduler
    pool = scheduler.loop.transformer.pool

    def clean() -> bool:
        cached = {page for prefix in list(scheduler._negative.values()) for page in prefix.table.pages}
        return pool.free == pool.pages - len(cached) and not scheduler._live and not scheduler._waiting

    return comes_true(clean)


def codes(generation) -> list[list[int]]:
    return [np.asarray(c).tolist() for c in generation.codes]


def test_the_released_codes_are_drawn(tmp_path: Path) -> None:
    """Outputs of the released code on stand-in weights: one and two passes, together and alone."""
    with np.load(DATA / "t2i_tiny_expected.npz") as arrays:
        expected = dict(arrays)
    tokenizer = tokenizer_bundle(tmp_path / "tokenizer", PATCH_NUMS_16, 32768)
    checkpoint = write_checkpoint(tmp_path / "hf", RELEASED_TINY, released_tiny_shapes(), 512, 32768)
    prompts, negative = [expected["prompt_a"], expected["prompt_b"]], expected["negative"]
    with Generator.from_pretrained(export_quietly(checkpoint, tokenizer, tmp_path / "bundle")) as generator:
        logits = []
        sample = generator._runner.model.sessions["sample"]
        plain = sample._infer

        def spying(feeds, outputs):
            found = plain(feeds, (*outputs, "logits"))
            logits.append(found[-1][0])
            return found[:-1]

        for params, key in ((GREEDY, "codes_1_pass"), (GREEDY_TWICE, "codes_2_pass")):
            together = generator.generate_batch(prompts, negative_prompt=negative, params=params)
            assert np.array_equal([each.codes[0] for each in together], expected[key])
        sample._infer = spying
        alone = generator.generate(prompts[0], negative_prompt=negative, params=GREEDY)
        assert np.array_equal(alone.codes[0], expected["codes_1_pass"][0])
        found = np.concatenate([scale[:, :64] for scale in logits])
        assert np.abs(found - expected["logits_head_1_pass"]).max() < 2e-3


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_the_cached_loop_is_the_uncached_one(geometry: str, checkpoints: Callable[[str], tuple[Path, Path]]) -> None:
    checkpoint, path = checkpoints(geometry)
    rng = np.random.default_rng(3)
    with Generator.from_pretrained(path, page_size=5) as generator:
        codebook = TokenizerReference.load(generator.tokenizer.bundle).codebook
        oracle = UncachedGenerator(HfDirectory(checkpoint), generator.config, codebook)
        once, twice, thrice = (Pass(1, 0.0),), (Pass(40, 0.9), Pass(5, 0.5)), (Pass(400, 0.8), Pass(20, 0.8), Pass(1, 0.0))
        for passes, length, count in ((once, 126, 1), (twice, 1, 1), (thrice, 4, 2)):
            prompt, negative = rng.integers(2, 40, length).tolist(), rng.integers(2, 40, 9).tolist()
            params = SamplingParams(passes, float(rng.uniform(0, 8)), int(rng.integers(1000)))
            found = generator.generate(prompt, negative_prompt=negative, params=params, n=count)
            for number in range(count):
                assert codes(found)[number] == oracle.generate(prompt, negative, params, number).tolist()


def test_without_guidance_the_negative_prompt_is_not_run(checkpoints: Callable[[str], tuple[Path, Path]]) -> None:
    """The codes are those of both rows, alone and beside pictures with guidance, for half the work."""
    checkpoint, path = checkpoints("grouped")
    passes = (Pass(400, 0.8), Pass(20, 0.8))
    plain, guided = (SamplingParams(passes, cfg_scale, 7) for cfg_scale in (0.0, 4.0))
    with Generator.from_pretrained(path) as generator:
        oracle = UncachedGenerator(
            HfDirectory(checkpoint), generator.config, TokenizerReference.load(generator.tokenizer.bundle).codebook
        )
        expected = [oracle.generate([5, 6], [7, 8], plain, number).tolist() for number in range(3)]
        transformer = generator._runner.model.scheduler.loop.transformer
        work = []
        for params in (plain, guided):
            before = transformer.token_forwards
            found = generator.generate([5, 6], negative_prompt=[7, 8], params=params, n=3)
            work.append(transformer.token_forwards - before)
            if params is plain:
                assert codes(found) == expected
        assert 2 * work[0] == work[1]
        with ThreadPoolExecutor(2) as pool:
            both = [
                pool.submit(generator.generate, [5, 6], negative_prompt=[7, 8], params=params, n=3)
                for params in (plain, guided, plain)
            ]
            assert [codes(each.result()) for each in both] == [expected, codes(found), expected]
        assert pool_is_clean(generator)


@pytest.mark.parametrize("unguided", [1, 2, 9])
def test_guidance_may_be_left_out_at_the_finest_scales(unguided: int, checkpoints: Callable[[str], tuple[Path, Path]]) -> None:
    """The codes are the oracle's; until then they are those with guidance; pages of the second row are free from then on."""
    checkpoint, path = checkpoints("grouped")
    params = SamplingParams((Pass(400, 0.8), Pass(20, 0.8)), 4.0, 7, unguided)
    with Generator.from_pretrained(path) as generator:
        oracle = UncachedGenerator(
            HfDirectory(checkpoint), generator.config, TokenizerReference.load(generator.tokenizer.bundle).codebook
        )
        transformer = generator._runner.model.scheduler.loop.transformer
        generator.generate([5], negative_prompt=[7, 8], params=params)  # the negative prompt is kept
        work, found = [], []
        for settings in (params, replace(params, unguided_scales=0)):
            before = transformer.token_forwards
            found.append(generator.generate([5, 6], negative_prompt=[7, 8], params=settings, n=2))
            work.append(transformer.token_forwards - before)
        assert codes(found[0]) == [oracle.generate([5, 6], [7, 8], params, number).tolist() for number in range(2)]
        finest = 2 * 2 * sum(generator.config.scales.counts[max(1, 4 - unguided) :])
        assert work[1] - work[0] == finest
        same = sum(generator.config.scales.counts[: max(1, 4 - unguided)])
        assert [row[:same] for row in codes(found[0])] == [row[:same] for row in codes(found[1])]
        together = generator.generate_batch([[5, 6]] * 2, negative_prompt=[7, 8], params=params)
        assert [codes(each)[0] for each in together] == [codes(found[0])[0]] * 2
        assert pool_is_clean(generator)


def test_pages_of_any_size_give_the_same_codes(bundle: Path) -> None:
    found = set()
    for page_size in (1, 3, 7, 16, 64, 200):
        with Generator.from_pretrained(bundle, page_size=page_size) as generator:
            found.add(str(codes(generator.generate([5, 6, 7], preset="paper", seed=3, n=2))))
    assert len(found) == 1


def test_the_same_request_draws_the_same_codes_in_any_company(generator: Generator) -> None:
    prompts = [[3 + i] * (1 + 7 * i) for i in range(4)]
    alone = [codes(generator.generate(prompt, preset="paper", seed=9)) for prompt in prompts]
    together = [codes(generation) for generation in generator.generate_batch(prompts, preset="paper", seed=9)]
    assert together == alone
    assert len({str(c) for c in alone}) == 4
    assert codes(generator.generate(prompts[2], preset="paper", seed=9, n=3))[0] == alone[2][0]
    assert codes(generator.generate(prompts[2], preset="paper", seed=10)) != alone[2]


def test_pictures_of_one_request_differ_and_decode(generator: Generator) -> None:
    params = SamplingParams((Pass(400, 1.0),), cfg_scale=1.0, seed=1)
    generation = generator.generate("w5 w6", n=3, params=params)
    assert len({str(c) for c in codes(generation)}) == 3
    assert [image.size for image in generation.images] == [(64, 64)] * 3
    assert generation.seed == 1
    assert len(generation.timings) == 4
    assert list(generation.timings) == sorted(generation.timings)
    assert generator.generate("w5", preset="fast").seed != generator.generate("w5", preset="fast").seed
    by_ids = generator.generate(np.array([5, 6]), n=3, params=params, negative_prompt=[7])
    assert codes(generator.generate([5, 6], n=3, params=params)) == codes(generation)
    assert (generation.prompt, generation.negative_prompt) == ("w5 w6", None)
    assert (by_ids.prompt, by_ids.negative_prompt) == ((5, 6), (7,))
    assert [each.prompt for each in generator.generate_batch(["w5", [6]], preset="fast")] == ["w5", (6,)]


def test_stream_yields_after_every_scale(generator: Generator) -> None:
    final = generator.generate([5, 6], seed=4, n=2)
    for number, step in enumerate(generator.stream([5, 6], seed=4, n=2), start=1):
        assert step.scale == number
        assert [c.n_scales for c in step.codes] == [number] * 2
        assert step.codes[1] == final.codes[1].truncate(number)
        if number == 2:
            assert [image.size for image in step.preview()] == [(64, 64)] * 2
    assert pool_is_clean(generator)


def test_a_stream_ends_with_the_generation(generator: Generator) -> None:
    whole = generator.generate([5, 6], seed=4, n=2, preset="fast")
    for read in (0, 2, 4):
        with generator.stream([5, 6], seed=4, n=2, preset="fast") as stream:
            for _ in range(read):
                next(stream)
            found = stream.result()
        assert replace(found, timings=whole.timings) == whole
        assert len(found.timings) == 4
    assert pool_is_clean(generator)


def test_a_request_that_takes_too_long_gives_its_pages_back(generator: Generator) -> None:
    for way in (
        lambda: generator.generate([5], timeout=0),
        lambda: generator.generate_batch([[5], [6]], timeout=0),
        lambda: generator.stream([5], timeout=0).result(),
    ):
        with pytest.raises(RequestTimeoutError, match="not finished within timeout=0 seconds"):
            way()
        assert pool_is_clean(generator)
    for method in (generator.generate, generator.stream):
        with pytest.raises(ArgumentError, match="timeout=-1"):
            method([5], timeout=-1)


def test_cancelled_streams_leak_no_page(generator: Generator) -> None:
    rng = np.random.default_rng(0)
    streams = []
    for i in range(200):
        stream = generator.stream([2 + i % 30] * int(rng.integers(1, 20)), preset="fast", seed=i)
        for _ in range(int(rng.integers(0, 4))):
            next(stream, None)
        streams.append(stream)
        if len(streams) > 3:
            streams.pop(int(rng.integers(4))).close()
    del streams, stream
    gc.collect()
    assert pool_is_clean(generator)


@given(st.data())
@settings(max_examples=15, deadline=None)
def test_requests_that_join_leave_and_queue_draw_what_they_draw_alone(generator: Generator, data: st.DataObject) -> None:
    presets = {3: "fast", 4: "balanced", 5: "paper"}
    wanted = {seed: codes(generator.generate([7, seed], preset=presets[seed], seed=seed, n=1 + seed % 2)) for seed in presets}
    live: dict[int, Iterator] = {}
    for _ in range(30):
        seed = data.draw(st.integers(3, 5))
        if seed not in live:
            live[seed] = generator.stream([7, seed], preset=presets[seed], seed=seed, n=1 + seed % 2)
        elif data.draw(st.integers(0, 9)) == 0:
            live.pop(seed).close()
            continue
        step = next(live[seed], None)
        if step is None:
            del live[seed]
        elif step.scale == 4:
            assert [np.asarray(c).tolist() for c in step.codes] == wanted[seed]
    for stream in live.values():
        stream.close()
    assert pool_is_clean(generator)


def test_a_newcomers_first_preview_never_waits_for_a_last_scale(generator: Generator) -> None:
    old = generator.stream([5] * 9, seed=1)
    for _ in range(3):
        next(old)
    drawn: list[int] = []
    loop = generator._runner.model.scheduler.loop
    plain = loop.sample_pass
    loop.sample_pass = lambda pictures: (drawn.append(pictures[0].scale), plain(pictures))[1]  # type: ignore[method-assign]
    try:
        newcomer = generator.stream([6], seed=2)
        next(newcomer)
        assert drawn == [0]
        next(old)
        # The old one is nearer to its end, so it goes first then.
        assert drawn == [0, 3, 3, 3]
        assert len(list(newcomer)) == 3
        assert drawn == [0, 3, 3, 3, *(scale for scale in (1, 2, 3) for _ in range(3))]
    finally:
        loop.sample_pass = plain  # type: ignore[method-assign]
        old.close()
    assert pool_is_clean(generator)


def test_when_pages_run_out_requests_queue_or_say_what_is_missing(bundle: Path) -> None:
    with Generator.from_pretrained(bundle, page_size=4, pages=45) as generator:
        alone = [codes(generator.generate([3 + i] * 5, seed=i, preset="fast", negative_prompt=[9])) for i in range(4)]
        found = generator.generate_batch([[3 + i] * 5 for i in range(4)], seed=0, preset="fast", negative_prompt=[9])
        assert codes(found[0]) == alone[0]
        with pytest.raises(
            PagesExhausted, match=r"\d+ key/value pages are needed, \d+ of 45 are free.*pages=\d+ or more"
        ) as caught:
            generator.generate([5], n=20)
        assert pool_is_clean(generator)
    with Generator.from_pretrained(bundle, page_size=4, pages=caught.value.needed) as generator:
        assert len(generator.generate([5], n=20, preset="fast").codes) == 20


def test_a_failing_step_frees_its_requests(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Generator.from_pretrained(bundle, page_size=4) as generator:
        streams = [generator.stream([5 + i], seed=1) for i in range(2)]
        next(streams[0])
        next(streams[1])
        with monkeypatch.context() as patch:
            patch.setattr(generator._runner.model.scheduler.loop, "_sample", lambda *arguments: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                next(streams[0])
        with pytest.raises(ZeroDivisionError):
            next(streams[1])
        assert pool_is_clean(generator)
        assert generator.generate([5], preset="fast").codes


def test_threads_may_share_a_generator(generator: Generator) -> None:
    expected = {i: codes(generator.generate([i, i], seed=i, preset="fast")) for i in range(3, 9)}
    found: dict[int, list] = {}
    threads = [
        threading.Thread(target=lambda i=i: found.update({i: codes(generator.generate([i, i], seed=i, preset="fast"))}))
        for i in expected
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == expected
    assert pool_is_clean(generator)


def test_pads_are_never_computed(bundle: Path) -> None:
    with Generator.from_pretrained(bundle) as generator:
        generator.generate([5] * 9, negative_prompt=[6] * 4, preset="paper")
        image_tokens = 2 * 3 * (4 + 9 + 16)
        assert generator.token_forwards == (9 + 2) + (4 + 2) + image_tokens
        generator.generate([5] * 9, negative_prompt=[6] * 4, preset="fast", n=2)
        assert generator.token_forwards == (9 + 2) * 2 + (4 + 2) + image_tokens + 2 * 2 * (4 + 9 + 16)


@pytest.mark.parametrize(
    ("request_", "error", "words"),
    [
        ({"prompt": ""}, PromptError, "prompt is empty"),
        ({"prompt": "  \n"}, PromptError, "prompt is empty"),
        ({"prompt": []}, PromptError, "no tokens"),
        ({"prompt": [-1]}, PromptError, "Token id -1 is not text"),
        ({"prompt": [45]}, PromptError, "Token id 45 is not text.*0 .. 39"),
        ({"prompt": [10**9]}, PromptError, "not text"),
        ({"prompt": "w5", "n": 0}, ArgumentError, "n=0"),
        ({"prompt": "w5", "preset": "best"}, ArgumentError, "no preset 'best'"),
        ({"prompt": "w5", "cfg_scale": -1}, ArgumentError, "cfg_scale=-1"),
        ({"prompt": "w5", "cfg_scale": float("nan")}, ArgumentError, "cfg_scale=nan"),
        ({"prompt": "w5", "seed": -1}, ArgumentError, "seed=-1"),
        ({"prompt": "w5 " * 200, "strict": True}, PromptError, "200 tokens; this model reads 127"),
        ({"prompt": "w5", "negative_prompt": ""}, PromptError, "empty"),
        ({"prompt": "w5", "negative_prompt": ""}, PromptError, "The negative prompt is empty"),
        ({"prompt": None}, PromptError, "The prompt is NoneType, neither text nor"),
        ({"prompt": b"w5"}, PromptError, "The prompt is bytes"),
        ({"prompt": ["w5"]}, PromptError, "The prompt is list.*generate_batch"),
        ({"prompt": "w\udce9"}, PromptError, "is no text"),
        ({"prompt": "w5", "n": "2"}, ArgumentError, "n='2'"),
        ({"prompt": "w5", "n": True}, ArgumentError, "n=True"),
        ({"prompt": "w5", "seed": "1"}, ArgumentError, "seed='1'"),
        ({"prompt": "w5", "cfg_scale": "7.5"}, ArgumentError, "cfg_scale='7.5'"),
        ({"prompt": "w5", "preset": ""}, ArgumentError, "no preset ''"),
        ({"prompt": "w5", "params": "fast"}, ArgumentError, "params='fast' are no settings"),
    ],
)
def test_requests_that_cannot_work_are_named(generator: Generator, request_: dict, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        generator.generate(**request_)
    with pytest.raises(error, match=words):
        generator.stream(**request_)
    assert pool_is_clean(generator)


@pytest.mark.parametrize("one", ["w5", b"w5", None, 5, [5, 6], np.array([5, 6])])
def test_one_prompt_is_not_taken_for_several(generator: Generator, one: object) -> None:
    with pytest.raises(ArgumentError, match=r"generate_batch\(\[prompt\]\)"):
        generator.generate_batch(one, preset="fast")  # type: ignore[arg-type]


def test_numbers_of_other_libraries_are_fine(generator: Generator) -> None:
    found = generator.generate("w5", n=np.int64(2), seed=np.int64(7), cfg_scale=np.float32(2), preset="fast")  # type: ignore[arg-type]
    assert codes(found) == codes(generator.generate("w5", n=2, seed=7, cfg_scale=2, preset="fast"))


def test_a_long_prompt_is_cut_with_a_warning(generator: Generator) -> None:
    with pytest.warns(UserWarning, match="200 tokens; this model reads 127"):
        cut = generator.generate("w5 " * 200, preset="fast", seed=1)
    assert codes(cut) == codes(generator.generate("w5 " * 127, preset="fast", seed=1))


def test_image_tokens_in_a_prompt_are_text(generator: Generator) -> None:
    """A prompt cannot spell control tokens: they are not in the bundle's vocabulary."""
    ids = generator._prompts.encode("w5 <img> <vq_token_3>")
    assert max(ids) < generator.config.image_token_start


def test_text_without_the_tokenizers_package_says_so(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    with Generator.from_pretrained(bundle) as generator:
        monkeypatch.setitem(sys.modules, "tokenizers", None)
        with pytest.raises(MissingPackageError, match=r"pip install 'tokenflow-sdk\[generate\]'"):
            generator.generate("w5", negative_prompt=[5])
        assert generator.generate([5], negative_prompt=[5], preset="fast").codes


def test_a_tokenizer_that_does_not_match_is_refused(bundle: Path, mini_bundles: Callable[[str], Path], tmp_path: Path) -> None:
    other = tokenizer_bundle(tmp_path / "other", (1, 2, 3, 4), 500)
    with Tokenizer(other) as tokenizer, pytest.raises(CodebookMismatchError, match=r"codes of mini_clip .* not of mini"):
        Generator.from_pretrained(bundle, tokenizer=tokenizer)
    with pytest.raises(BundleNotFoundError, match="tokenizer of .* is not at .*Give tokenizer="):
        Generator.from_pretrained(bundle, tokenizer=tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["tokenizer.json", "codebook.npy"])
def test_a_bundle_without_its_files_is_named(bundle: Path, name: str, tmp_path: Path) -> None:
    import shutil

    copy = shutil.copytree(bundle, tmp_path / "copy")
    (copy / name).unlink()
    with pytest.raises(CorruptBundleError, match=f"{name} is missing"):
        Generator.from_pretrained(copy)


def test_a_closed_generator_says_so(bundle: Path) -> None:
    generator = Generator.from_pretrained(bundle)
    generator.close()
    generator.close()
    with pytest.raises(ArgumentError, match="closed"):
        generator.generate([5])
