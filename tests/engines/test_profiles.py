"""Optimization profiles: that they cover what callers feed, and no more than one engine needs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.fake_graphs import GENERATOR, UNDERSTANDER, understander_graphs
from tests.support.fakes import CONFIG, fake_bundle
from tokenflow_sdk.bundle.bundle import Bundle
from tokenflow_sdk.bundle.model_config import PAGE_SIZE, GeneratorConfig, UnderstanderConfig, pages_for
from tokenflow_sdk.bundle.schema import GraphEntry, TensorSpec
from tokenflow_sdk.engines.build_config import BuildConfig
from tokenflow_sdk.engines.jobs import engine_jobs
from tokenflow_sdk.engines.profiles import Profile, graph_profiles, images_at_once, pool_pages
from tokenflow_sdk.errors import ArgumentError
from tokenflow_sdk.model.transformer import PREFILL_CHUNK


def test_the_profiles_cover_every_step_of_the_loop(mini_generator: Path) -> None:
    """Prompts of any length, every scale, alone and in the largest batch: each by the smallest profile that fits."""
    bundle = with_released_scales(mini_generator)
    config = bundle.config
    build_config = BuildConfig(batch=(1, 2, 4), pages=config.default_pages())
    profiles = graph_profiles(bundle, build_config)
    transformer = profiles["transformer"]
    assert [profile.sizes["queries"][2] for profile in transformer] == [16, 100, 256]
    for profile in transformer:
        assert profile.sizes["batch"] == (1, 4, 8)
        assert profile.sizes["slots"] == (build_config.pages * config.layers,) * 3
    steps = [
        (rows, count, pages_for(config.prefix_length + start)) for rows in (2, 8) for count, start in scales_of(config)[1:]
    ]
    steps += [(1, length, 1) for length in range(3, config.prefix_length + 2)]
    taken = [
        next(i for i, p in enumerate(transformer) if holds(p, batch=rows, queries=count, table=table))
        for rows, count, table in steps
    ]
    assert taken == [(count > 16) + (count > 100) for _, count, _ in steps]
    assert [profile.sizes["batch"] for profile in profiles["sample"]] == [(1, 2, 4)] * 3


def with_released_scales(path: Path) -> Bundle[GeneratorConfig]:
    """A small generator's bundle with the scales and prompts of the released one."""
    bundle = Bundle.open(path, GeneratorConfig)
    return replace(bundle, config=replace(bundle.config, patch_nums=(1, 2, 4, 6, 8, 10, 12, 14, 16), max_prompt=120))


def scales_of(config: GeneratorConfig) -> list[tuple[int, int]]:
    """Number of codes and first code of each scale."""
    return list(zip(config.scales.counts, config.scales.starts, strict=True))


def holds(profile: Profile, **sizes: int) -> bool:
    return all(profile.sizes[dim][0] <= size <= profile.sizes[dim][2] for dim, size in sizes.items())


def test_rows_are_no_more_than_the_pool_holds(mini_generator: Path) -> None:
    """Whatever the build config asks for: rows without pages would take working memory for nothing."""
    bundle = with_released_scales(mini_generator)
    config = bundle.config
    prompt = pages_for(config.prefix_length + 1)
    three = 3 * (config.image_pages() + prompt) + prompt
    for batch, pages, most in (
        ((1, 32, 128), 0, 8),
        ((1, 1, 2), 0, 2),
        ((1, 8, 32), three, 3),
        ((1, 8, 32), three - 1, 2),
        ((1, 1, 1), 1, 1),
    ):
        build_config = BuildConfig(batch=batch, pages=pages)
        profiles = graph_profiles(bundle, build_config)
        assert images_at_once(config, build_config) == most
        assert {profile.sizes["batch"][2] for profile in profiles["transformer"]} == {2 * most}
        # One image alone is given to `sample` twice at its first code.
        assert {profile.sizes["batch"][2] for profile in profiles["sample"]} == {max(2, most)}


def test_the_profile_covers_every_step_of_an_answer(mini_understander: Path) -> None:
    """Prompts of any length in pieces, one at a time; answers of any length and setting, alone and in the largest batch."""
    bundle = Bundle.open(mini_understander, UnderstanderConfig)
    config = bundle.config
    tokens, pieces = (profile.sizes for profile in transformer_profiles(bundle, BuildConfig(batch=(1, 4, 6), pages=9)))
    assert (tokens["batch"], tokens["queries"]) == ((1, 4, 6), (1, 1, 1))
    assert (pieces["batch"], pieces["queries"]) == ((1, 1, 1), (1, PREFILL_CHUNK, PREFILL_CHUNK))
    for sizes in (tokens, pieces):
        assert sizes["slots"] == (9 * config.layers,) * 3
        assert sizes["table"] == (1, 4, 9)
    (head,) = graph_profiles(bundle, BuildConfig(batch=(1, 4, 6), pages=9))["head"]
    assert (head.sizes["seen"][2], head.sizes["window"][2]) == (config.vocabulary, config.vocabulary)
    usual = transformer_profiles(bundle, BuildConfig())[0].sizes
    assert usual["table"][2] * PAGE_SIZE == config.context
    assert usual["slots"][2] == config.default_pages()
    large = replace(bundle, config=replace(config, vocabulary=152_064, context=32_768, image_tokens=729))
    for profile in transformer_profiles(large, BuildConfig()):
        assert profile.sizes["table"][2] == large.config.default_pages()
    (head,) = graph_profiles(large, BuildConfig())["head"]
    assert (head.sizes["seen"][2], head.sizes["window"][2]) == (32_768, 3840)


def transformer_profiles(bundle: Bundle[UnderstanderConfig], build_config: BuildConfig) -> tuple[Profile, ...]:
    return graph_profiles(bundle, build_config)["transformer"]


def test_an_engine_has_no_more_profiles_than_it_needs(machine, mini_understander: Path, mini_generator: Path) -> None:
    bundle = Bundle.open(mini_understander, UnderstanderConfig)
    jobs = {job.key.graph: job for job in engine_jobs(bundle, BuildConfig("tensorrt"), machine[1])}
    assert {name: len(job.profiles) for name, job in jobs.items()} == {
        "embed_text": 2,
        "project": 2,
        "transformer": 2,
        "head": 1,
    }
    (head,) = jobs["head"].profiles
    assert head.sizes["batch"] == BuildConfig().batch
    assert set(head.sizes) == {"batch", "seen", "window"}
    for job in engine_jobs(Bundle.open(mini_generator, GeneratorConfig), BuildConfig("tensorrt"), machine[1]):
        assert len(job.profiles) == len({profile.canonical for profile in job.profiles}) <= 3


def test_profiles_contain_each_other() -> None:
    wide, narrow = Profile({"batch": (1, 2, 8), "queries": (1, 1, 9)}), Profile({"batch": (1, 8, 8), "queries": (2, 2, 2)})
    assert narrow.within(wide)
    assert narrow.within(narrow)
    assert not wide.within(narrow)
    assert not Profile({"batch": (1, 1, 9), "queries": (1, 1, 1)}).within(wide)


def test_a_profile_must_be_whole_and_ordered() -> None:
    with pytest.raises(ArgumentError, match="batch cannot go from 4 over 2 to 8"):
        Profile({"batch": (4, 2, 8)})
    with pytest.raises(ArgumentError, match="says nothing about 'queries'"):
        Profile({"batch": (1, 2, 4)}).shapes(TensorSpec("x", "float32", ("batch", "queries")))


@pytest.mark.parametrize("sizes", [(0, 1, 2), (2, 1, 3), (1, 3, 2), (-1, 1, 1)])
def test_sizes_ascend_from_1(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(ArgumentError, match=f"batch cannot go from {sizes[0]} over {sizes[1]} to {sizes[2]}"):
        Profile({"batch": sizes})
    assert Profile({"batch": (3, 3, 3)}).sizes["batch"] == (3, 3, 3)


def test_shapes_are_least_usual_and_largest() -> None:
    profile = Profile({"batch": (1, 2, 8), "queries": (1, 16, 64)})
    spec = TensorSpec("x", "float32", ("batch", "queries", 40))
    assert profile.shapes(spec) == ((1, 1, 40), (2, 16, 40), (8, 64, 40))
    assert profile.shapes(TensorSpec("x", "float32", (3,))) == ((3,), (3,), (3,))


def test_a_graph_takes_what_concerns_it() -> None:
    profile = Profile({"batch": (1, 2, 8), "queries": (1, 16, 64), "slots": (9, 9, 9)})
    inputs = (TensorSpec("x", "float32", ("batch", 3)), TensorSpec("y", "int32", ("slots", "batch")))
    entry = GraphEntry((), inputs, (TensorSpec("z", "float32", ("batch", "queries")),))
    assert profile.of(entry) == Profile({"batch": (1, 2, 8), "slots": (9, 9, 9)})


def test_the_same_sizes_have_the_same_text() -> None:
    """Keys of engines are made of it, so the order in which dimensions were met must not matter."""
    one, same = Profile({"a": (1, 2, 3), "b": (4, 5, 6)}), Profile({"b": (4, 5, 6), "a": (1, 2, 3)})
    assert one.canonical == same.canonical
    assert json.loads(one.canonical) == {"a": [1, 2, 3], "b": [4, 5, 6]}
    others = [{"a": (1, 2, 3)}, {"a": (1, 2, 3), "b": (4, 5, 7)}, {"a": (1, 3, 3), "b": (4, 5, 6)}, {"c": (1, 2, 3)}]
    assert len({one.canonical, *(Profile(sizes).canonical for sizes in others)}) == 5


def test_a_pool_is_as_large_as_asked_for_or_as_the_model_says() -> None:
    for config in (GENERATOR, UNDERSTANDER):
        assert pool_pages(config, BuildConfig()) == config.default_pages()
        assert pool_pages(config, BuildConfig(pages=7)) == 7
    assert pool_pages(CONFIG, BuildConfig(pages=7)) == 0


def test_a_tokenizer_varies_in_its_batch_alone() -> None:
    profiles = graph_profiles(fake_bundle(), BuildConfig(batch=(1, 3, 5)))
    assert profiles == {name: (Profile({"batch": (1, 3, 5)}),) for name in ("encode", "decode", "features")}


def test_a_profile_that_another_contains_is_left_out() -> None:
    """A graph that does not see the dimension in which profiles differ needs one; one for single tokens is never left out."""
    graphs = {name: GraphEntry((), graph.inputs, graph.outputs) for name, graph in understander_graphs().items()}
    bundle = replace(fake_bundle(), config=UNDERSTANDER, graphs=graphs)  # type: ignore[arg-type]
    for batch, counts in (((1, 1, 4), (2, 2, 2, 1)), ((1, 1, 1), (2, 2, 2, 1))):
        found = graph_profiles(bundle, BuildConfig(batch=batch, pages=9))
        assert list(found) == ["embed_text", "project", "transformer", "head"]
        assert tuple(map(len, found.values())) == counts
