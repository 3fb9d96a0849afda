"""Optimization profiles: that they cover what callers feed, and no more than one engine needs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.fake_graphs import GENERATOR, UNDERSTANDER, understander_graphs
from tests.support.fakes import CONFIG, fake_bundle
from tokenflow_sdk.bundle.bundle import Bundle
from tokenflow_sdk.bundle.model_config import PAGE_SIZE, GeneratorConfig, UnderstanderConfig
from tokenflow_sdk.bundle.schema import GraphEntry, TensorSpec
from tokenflow_sdk.engines.build_config import BuildConfig
from tokenflow_sdk.engines.jobs import engine_jobs
from tokenflow_sdk.engines.profiles import Profile, bundle_profiles, graph_profiles, pool_pages
from tokenflow_sdk.errors import ArgumentError
from tokenflow_sdk.model.transformer import PREFILL_CHUNK


def test_the_profile_covers_every_step_of_the_loop(mini_generator: Path) -> None:
    """Prompts of any length, every scale, alone and in the largest batch, whatever is cached."""
    bundle = Bundle.open(mini_generator, GeneratorConfig)
    config = bundle.config
    (profile,) = bundle_profiles(bundle, BuildConfig(batch=(1, 2, 4), pages=9))
    sizes = profile.sizes
    assert sizes["batch"] == (1, 4, 8)
    assert sizes["queries"][2] >= max(config.prefix_length + 1, config.patch_nums[-1] ** 2)
    assert sizes["table"][2] * PAGE_SIZE >= config.prefix_length + config.n_codes
    assert sizes["slots"] == (9 * config.layers,) * 3
    for name, entry in bundle.graphs.items():
        for spec in entry.inputs:
            assert len(Profile(sizes).shapes(spec)) == 3, name


def test_the_profile_covers_every_step_of_an_answer(mini_understander: Path) -> None:
    """Prompts of any length in pieces, one at a time; answers of any length and setting, alone and in the largest batch."""
    bundle = Bundle.open(mini_understander, UnderstanderConfig)
    config = bundle.config
    tokens, pieces = (profile.sizes for profile in bundle_profiles(bundle, BuildConfig(batch=(1, 4, 6), pages=9)))
    assert (tokens["batch"], tokens["queries"]) == ((1, 4, 6), (1, 1, 1))
    assert (pieces["batch"], pieces["queries"]) == ((1, 1, 1), (1, PREFILL_CHUNK, PREFILL_CHUNK))
    for sizes in (tokens, pieces):
        assert sizes["slots"] == (9 * config.layers,) * 3
        assert sizes["table"] == (1, 4, 9)
        assert sizes["seen"][2] == config.vocabulary
        assert sizes["window"][2] == config.vocabulary
    usual = bundle_profiles(bundle, BuildConfig())[0].sizes
    assert usual["table"][2] * PAGE_SIZE == config.context
    assert usual["slots"][2] == config.default_pages()
    large = replace(bundle, config=replace(config, vocabulary=152_064, context=32_768, image_tokens=729))
    for profile in bundle_profiles(large, BuildConfig()):
        sizes = profile.sizes
        found = (sizes["seen"][2], sizes["window"][2], sizes["table"][2])
        assert found == (32_768, 3840, large.config.default_pages())
        for name, entry in bundle.graphs.items():
            for spec in entry.inputs:
                assert len(profile.shapes(spec)) == 3, name


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
        assert len(job.profiles) == 1


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
    """A graph that does not see the dimension in which profiles differ needs one."""
    graphs = {name: GraphEntry((), graph.inputs, graph.outputs) for name, graph in understander_graphs().items()}
    bundle = replace(fake_bundle(), config=UNDERSTANDER, graphs=graphs)  # type: ignore[arg-type]
    for batch, counts in (((1, 1, 4), (2, 2, 2, 1)), ((1, 1, 1), (1, 1, 1, 1))):
        found = graph_profiles(bundle, BuildConfig(batch=batch, pages=9))
        assert list(found) == ["embed_text", "project", "transformer", "head"]
        assert tuple(map(len, found.values())) == counts
