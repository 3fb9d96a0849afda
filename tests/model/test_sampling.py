from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.fake_graphs import FakeGraph, tensor
from tokenflow_sdk.errors import ArgumentError
from tokenflow_sdk.model.sampling import PRESETS, Pass, SamplingParams, guidance, probabilities, run_sampling, sample, uniform


def slow_probabilities(logits: list[float], top_k: int, top_p: float) -> list[float]:
    """The spec with lists and loops."""
    kth = sorted(logits, reverse=True)[min(top_k, len(logits)) - 1]
    kept = [i for i, x in enumerate(logits) if x >= kth]
    total = sum(np.exp(logits[i]) for i in kept)
    cumulative, alive = 0.0, set(kept)
    ascending = sorted(kept, key=lambda i: (logits[i], -i))
    for i in ascending[:-1]:
        cumulative += np.exp(logits[i]) / total
        if cumulative <= 1 - top_p:
            alive.discard(i)
    total = sum(np.exp(logits[i]) for i in alive)
    return [float(np.exp(x) / total) if i in alive else 0.0 for i, x in enumerate(logits)]


@given(
    st.lists(st.integers(-60, 60).map(lambda x: x / 10), min_size=1, max_size=30),
    st.integers(1, 40),
    st.sampled_from([0.0, 0.3, 0.6, 0.8, 0.95, 1.0]),
)
@settings(deadline=None)
def test_probabilities_are_the_specs(logits: list[float], top_k: int, top_p: float) -> None:
    found = probabilities(np.array(logits), top_k, top_p)
    assert np.abs(found - slow_probabilities(logits, top_k, top_p)).max() < 1e-9


def test_the_kth_logits_ties_stay_and_the_best_always_does() -> None:
    assert probabilities(np.array([1.0, 3.0, 2.0, 2.0, 0.0]), 2, 1.0)[[0, 4]].tolist() == [0, 0]
    assert (probabilities(np.array([1.0, 3.0, 2.0, 2.0, 0.0]), 2, 1.0)[1:4] > 0).all()
    assert probabilities(np.array([1.0, 3.0, 2.0]), 3, 0.0).tolist() == [0, 1, 0]


def chi_square(counts: np.ndarray, expected: np.ndarray) -> float:
    """Standard deviations that the statistic lies above its mean."""
    busy = expected >= 5
    observed = np.append(counts[busy], counts[~busy].sum())
    wanted = np.append(expected[busy], expected[~busy].sum())
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    freedom = len(wanted) - 1
    if freedom == 0:
        return 0.0
    return float((((observed - wanted) ** 2 / wanted).sum() - freedom) / np.sqrt(2 * freedom))


@pytest.mark.parametrize("step", {step: None for passes in PRESETS.values() for step in passes}, ids=str)
def test_drawn_frequencies_match_the_probabilities(step: Pass) -> None:
    logits = np.random.default_rng(0).normal(0, 2, 1500)
    expected = probabilities(logits, step.top_k, step.top_p)
    noise = uniform(1, 0, 3, 0, 100_000)
    counts = np.zeros(1500)
    # One row is sorted for all of its noise; many rows give the same.
    parts = [(part, sample(logits[None], step.top_k, step.top_p, part)) for part in np.split(noise, 100)]
    for _, found in parts:
        np.add.at(counts, found, 1)
    part, found = parts[0]
    np.testing.assert_array_equal(sample(np.broadcast_to(logits, (1000, 1500)), step.top_k, step.top_p, part), found)
    assert counts[expected == 0].sum() == 0
    assert abs(chi_square(counts, 100_000 * expected)) < 5


def test_noise_depends_on_its_key_alone() -> None:
    whole = uniform(7, 1, 3, 0, 64)
    assert np.array_equal(uniform(7, 1, 3, 0, 16), whole[:16])
    assert whole.dtype == np.float32
    assert (whole >= 0).all()
    assert (whole < 1).all()
    others = [uniform(8, 1, 3, 0, 64), uniform(7, 2, 3, 0, 64), uniform(7, 1, 4, 0, 64), uniform(7, 1, 3, 1, 64)]
    assert all(not np.array_equal(other, whole) for other in others)
    assert abs(uniform(0, 0, 0, 0, 100_000).mean() - 0.5) < 0.005


def test_guidance_grows_to_its_scale() -> None:
    assert [guidance(8.0, i, 9) for i in (0, 4, 8)] == [0, 4, 8]
    assert guidance(8.0, 0, 1) == 8.0


def test_presets() -> None:
    assert SamplingParams.preset("fast").passes == (Pass(600, 0.6),)
    turbo = SamplingParams.preset("turbo", 6.0)
    assert turbo.passes == SamplingParams.preset("fast").passes
    assert [guidance(6.0, scale, 4, turbo.unguided_scales) for scale in range(4)] == [0.0, 2.0, 0.0, 0.0]
    assert SamplingParams.preset("paper", 3.0, 5) == SamplingParams(PRESETS["paper"], 3.0, 5)
    with pytest.raises(ArgumentError, match="no preset 'best'.*fast, balanced, paper"):
        SamplingParams.preset("best")


def test_numbers_of_other_libraries_are_pythons_own() -> None:
    given = SamplingParams([Pass(np.int64(5), np.float32(0.5))], np.float64(3), np.uint64(7))  # type: ignore[arg-type]
    assert given == SamplingParams((Pass(5, 0.5),), 3.0, 7)
    assert hash(given) == hash(SamplingParams((Pass(5, 0.5),), 3.0, 7))
    assert [type(value) for value in (*vars(given).values(), *vars(given.passes[0]).values())] == [
        tuple,
        float,
        int,
        int,
        int,
        float,
    ]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Pass(0, 0.5), "top_k=0 keeps no tokens"),
        (lambda: Pass(10**6, 0.5), "top_k=1000000"),
        (lambda: Pass(2.5, 0.5), "top_k=2.5"),  # type: ignore[arg-type]
        (lambda: Pass(1, -0.1), "top_p=-0.1"),
        (lambda: Pass(1, float("nan")), "top_p=nan"),
        (lambda: SamplingParams(()), "no list of passes"),
        (lambda: SamplingParams(cfg_scale=-1.0), "cfg_scale=-1.0"),
        (lambda: SamplingParams(cfg_scale=float("nan")), "cfg_scale=nan"),
        (lambda: SamplingParams(seed=-1), "seed=-1"),
        (lambda: SamplingParams(seed=1.5), "seed=1.5"),  # type: ignore[arg-type]
        (lambda: SamplingParams(seed=2**63), "is no seed"),
        (lambda: Pass("5", 0.5), "top_k='5'"),  # type: ignore[arg-type]
        (lambda: Pass(True, 0.5), "top_k=True"),
        (lambda: Pass(1, None), "top_p=None"),  # type: ignore[arg-type]
        (lambda: SamplingParams(cfg_scale="7.5"), "cfg_scale='7.5' cannot guide"),  # type: ignore[arg-type]
        (lambda: SamplingParams(cfg_scale=None), "cfg_scale=None"),  # type: ignore[arg-type]
        (lambda: SamplingParams(seed="1"), "seed='1'"),  # type: ignore[arg-type]
        (lambda: SamplingParams("fast"), "passes='fast' is no list of passes"),  # type: ignore[arg-type]
        (lambda: SamplingParams(Pass(1, 0.0)), "no list of passes"),  # type: ignore[arg-type]
        (lambda: SamplingParams.preset(["fast"]), "no preset"),  # type: ignore[arg-type]
    ],
)
def test_values_that_cannot_work_are_named(make, words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        make()


@pytest.mark.parametrize(("certain", "asked"), [([1, 1], 1), ([1, 0], 2), (None, 1)])
def test_logits_are_fetched_only_where_the_graph_is_not_certain(certain: list[int] | None, asked: int) -> None:
    """None: a graph from before graphs said so."""
    found = {"code_indices": np.asarray([3, 4], np.int32), "logits": np.ones((2, 5), np.float32)}
    outputs = [tensor("code_indices", "int32", "batch"), tensor("logits", "float32", "batch", 5)]
    if certain is not None:
        found["certain"] = np.asarray(certain, np.int32)
        outputs.insert(1, tensor("certain", "int32", "batch"))
    graph = FakeGraph([tensor("noise", "float32", "batch")], outputs, lambda feeds: found)
    codes, logits = run_sampling(graph, {"noise": np.zeros(2, np.float32)}, "code_indices")
    assert codes.tolist() == [3, 4]
    assert (logits is None) == (certain == [1, 1])
    assert len(graph.feeds) == asked
