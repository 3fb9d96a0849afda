"""Sampling in a graph against its NumPy twin. PyTorch's topk orders equal values as it likes, so nothing may rest on that."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tokenflow_export.language_model import sample_graph
from tokenflow_sdk.model.sampling import sample

CODES, WINDOW = 40, 9


def run(logits: np.ndarray, top_k: list[int], top_p: list[float], noise: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Indices [R, Q] and certainties [R] of logits [R, Q, K]."""
    settings = torch.tensor(top_k, dtype=torch.int32), torch.tensor(top_p)
    ranks = torch.arange(WINDOW, dtype=torch.int32)
    found, certain = sample_graph.sample(torch.tensor(logits), *settings, torch.tensor(noise), ranks)
    assert found.dtype == certain.dtype == torch.int32
    return found.numpy(), certain.numpy()


@pytest.mark.parametrize("ties", [1, 2, 5, WINDOW - 1, WINDOW, WINDOW + 1, CODES])
@pytest.mark.parametrize("values", ["random", "zeros"])
def test_greedy_rows_take_the_first_of_the_largest_or_say_that_they_cannot_know(ties: int, values: str) -> None:
    """Ties at all places, of which the window holds all or not; the row beside it is drawn as ever."""
    rng = np.random.default_rng(ties)
    for _ in range(20):
        logits = rng.standard_normal((2, 3, CODES), np.float32) if values == "random" else np.zeros((2, 3, CODES), np.float32)
        places = [rng.choice(CODES, ties, replace=False) for _ in range(3)]
        for query, tied in enumerate(places):
            logits[0, query, tied] = 7
        logits[1] = rng.standard_normal((3, CODES), np.float32)
        noise = rng.random((2, 3), np.float32)
        found, certain = run(logits, [1, 5], [0.0, 0.8], noise)
        assert certain.tolist() == [int(ties < WINDOW), 1]
        if ties < WINDOW:
            np.testing.assert_array_equal(found[0], logits[0].argmax(axis=-1))
        np.testing.assert_array_equal(found[1], sample(logits[1], 5, 0.8, noise[1]))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_rows_with_logits_that_are_not_finite_are_not_certain(value: float) -> None:
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((3, 2, CODES), np.float32)
    noise = rng.random((3, 2), np.float32)
    expected, certain = run(logits, [5, 5, 1], [0.8, 0.8, 0.0], noise)
    assert certain.tolist() == [1, 1, 1]
    for row in range(3):
        for place in (0, 17, CODES - 1):
            spoilt = logits.copy()
            spoilt[row, 1, place] = value
            found, certain = run(spoilt, [5, 5, 1], [0.8, 0.8, 0.0], noise)
            assert certain.tolist() == [int(other != row) for other in range(3)]
            assert ((found >= 0) & (found < CODES)).all()
            others = [other for other in range(3) if other != row]
            np.testing.assert_array_equal(found[others], expected[others])
