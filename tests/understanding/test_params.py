from __future__ import annotations

import numpy as np
import pytest
import torch

from tokenflow_sdk.errors import ArgumentError
from tokenflow_sdk.understanding.params import AnswerParams, sample_token, within


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"max_tokens": 0}, "max_tokens=0"),
        ({"max_tokens": 2.5}, "max_tokens=2.5"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": float("inf")}, "temperature=inf"),
        ({"temperature": 1e-9}, "temperature=1e-09"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"top_p": float("nan")}, "top_p=nan"),
        ({"top_k": 0}, "top_k=0"),
        ({"top_k": 10**6}, "top_k=1000000"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0"),
        ({"repetition_penalty": float("nan")}, "repetition_penalty=nan"),
        ({"seed": -1}, "seed=-1"),
        ({"stop_ids": ("a",)}, "stop_ids"),
        ({"stop_ids": 5}, "stop_ids cannot be of type int"),
        ({"stop_ids": "5"}, "stop_ids='5' are no token ids"),
        ({"stop_ids": b"5"}, "stop_ids=b'5' are no token ids"),
        ({"stop_ids": (3, -3)}, "stop_ids=-3"),
        ({"stop_ids": (3, True)}, "stop_ids=True"),
        ({"max_tokens": "8"}, "max_tokens='8'"),
        ({"max_tokens": True}, "max_tokens=True"),
        ({"temperature": "1"}, "temperature='1'"),
        ({"temperature": True}, "temperature=True"),
        ({"temperature": None}, "temperature=None"),
        ({"top_p": None}, "top_p=None"),
        ({"top_p": "0.5"}, "top_p='0.5'"),
        ({"top_k": "5"}, "top_k='5'"),
        ({"repetition_penalty": "a"}, "repetition_penalty='a'"),
        ({"seed": 1.0}, "seed=1.0"),
    ],
)
def test_settings_that_cannot_work_are_named(values: dict, words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        AnswerParams(**values)


def test_numbers_of_other_libraries_are_pythons_own() -> None:
    given = AnswerParams(
        np.int64(8), np.float32(0.5), np.float64(0.5), np.int32(9), np.int64(1), np.uint64(3), [np.int64(5), 6]
    )  # type: ignore[arg-type]
    assert given == AnswerParams(8, 0.5, 0.5, 9, 1.0, 3, (5, 6))
    assert [type(value) for value in vars(given).values()] == [int, float, float, int, float, int, tuple]
    assert hash(given) == hash(AnswerParams(8, 0.5, 0.5, 9, 1.0, 3, (5, 6)))


def test_what_are_no_settings_is_named() -> None:
    with pytest.raises(ArgumentError, match="params=.*are no settings of an answer"):
        AnswerParams.of(None, None, None, {"max_tokens": 5})  # type: ignore[arg-type]


@pytest.mark.parametrize(("given", "room", "taken"), [(None, 300, 256), (None, 9, 9), (None, 0, 1), (50, 9, 50)])
def test_only_the_default_length_adapts_to_the_room(given: int | None, room: int, taken: int) -> None:
    assert within(AnswerParams(given), room).max_tokens == taken


def test_the_draw_is_transformers_own_distribution() -> None:
    """The same steps in the same order: penalty, temperature, top-k, top-p. Noise on a grid gives the probabilities."""
    from transformers import RepetitionPenaltyLogitsProcessor, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    rng = np.random.default_rng(0)
    logits = (rng.standard_normal(40) * 2).astype(np.float32)
    answer = [3, 3, 17, int(logits.argmax())]
    params = AnswerParams(temperature=0.8, top_p=0.9, top_k=20, repetition_penalty=1.3)
    ids, scores = torch.tensor([answer]), torch.from_numpy(logits)[None]
    steps = (
        RepetitionPenaltyLogitsProcessor(1.3),
        TemperatureLogitsWarper(0.8),
        TopKLogitsWarper(20),
        TopPLogitsWarper(0.9),
    )
    for step in steps:
        scores = step(ids, scores)
    draws = [sample_token(logits, params, answer, noise) for noise in (np.arange(2000) + 0.5) / 2000]
    shares = np.bincount(draws, minlength=40) / 2000
    assert np.abs(shares - scores[0].softmax(-1).numpy()).max() < 2e-3


def test_without_temperature_the_likeliest_is_taken() -> None:
    logits = np.array([1.0, 4.0, 3.9, -2.0], np.float32)
    assert sample_token(logits, AnswerParams(), [], 0.999) == 1
    assert sample_token(logits, AnswerParams(repetition_penalty=1.1), [1], 0.0) == 2
    # Negative logits are multiplied: the penalty never helps.
    assert sample_token(np.array([-1.0, -1.05], np.float32), AnswerParams(repetition_penalty=1.1), [0], 0.0) == 1
