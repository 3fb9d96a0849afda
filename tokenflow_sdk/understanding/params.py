"""`AnswerParams`, the settings of an answer, and sampling of tokens in NumPy."""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from tokenflow_sdk.errors import ArgumentError
from tokenflow_sdk.model.sampling import MAX_TOP_K, sample

__all__ = ["AnswerParams", "sample_token"]

_HOTTEST, _COLDEST = 100.0, 0.01


@dataclass(frozen=True)
class AnswerParams:
    """How to answer.

    Args:
        max_tokens: most tokens of the answer.
        temperature: 0 always takes the likeliest token; 1 draws from the model's own probabilities.
        top_p: of the likeliest tokens, those that hold this share of the probability.
        top_k: of the likeliest tokens, so many.
        repetition_penalty: divides the logits of tokens that the answer has already (multiplies negative ones); 1 is none.
        seed: of all noise, 0 .. 2**63 - 1.
        stop_ids: tokens that end the answer; None takes the model's own.

    Raises:
        ArgumentError: a value that cannot work.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 50
    repetition_penalty: float = 1.0
    seed: int = 0
    stop_ids: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if type(self.max_tokens) is not int or self.max_tokens < 1:
            raise ArgumentError(f"max_tokens={self.max_tokens!r} leaves no room for an answer.", "Give at least 1.")
        if not (self.temperature == 0 or _COLDEST <= self.temperature <= _HOTTEST):
            raise ArgumentError(
                f"temperature={self.temperature!r} cannot be drawn with.",
                f"Give 0 (always the likeliest token), or {_COLDEST} to {_HOTTEST:.0f}.",
            )
        if not 0 <= self.top_p <= 1:
            raise ArgumentError(
                f"top_p={self.top_p!r} is no share of probability.", "Give a number from 0 (greedy) to 1 (all)."
            )
        if type(self.top_k) is not int or not 1 <= self.top_k <= MAX_TOP_K:
            raise ArgumentError(
                f"top_k={self.top_k!r} keeps no tokens to draw from.", f"Give an integer from 1 to {MAX_TOP_K}."
            )
        if not (math.isfinite(self.repetition_penalty) and 0.1 <= self.repetition_penalty <= 10):
            raise ArgumentError(
                f"repetition_penalty={self.repetition_penalty!r} cannot be used.",
                "Give 1 (none) or a little more, as 1.1; 0.1 to 10 is accepted.",
            )
        if type(self.seed) is not int or not 0 <= self.seed < 2**63:
            raise ArgumentError(f"seed={self.seed!r} is no seed.", "Give an integer from 0 to 2**63 - 1.")
        if self.stop_ids is not None and not all(type(i) is int for i in self.stop_ids):
            raise ArgumentError(f"stop_ids={self.stop_ids!r} are no token ids.", "Give a tuple of integers, or None.")

    @classmethod
    def of(
        cls, max_tokens: int | None, temperature: float | None, seed: int | None, params: AnswerParams | None
    ) -> AnswerParams:
        """`params` with what else was given; without any, the defaults and a random seed.

        Raises:
            ArgumentError: a value that cannot work.
        """
        base = cls(seed=secrets.randbelow(2**63)) if params is None else params
        return replace(
            base,
            max_tokens=base.max_tokens if max_tokens is None else max_tokens,
            temperature=base.temperature if temperature is None else temperature,
            seed=base.seed if seed is None else seed,
        )

    @property
    def greedy(self) -> bool:
        """Whether nothing is left to chance."""
        return self.temperature == 0


def sample_token(logits: NDArray[np.floating], params: AnswerParams, answer: Sequence[int], noise: float) -> int:
    """Sample the next token of one row in NumPy, as the `head` graph does; the oracle of its tests.

    Args:
        logits: [V], as the model gives them.
        params: penalty, temperature, top_k, top_p.
        answer: the answer's tokens so far.
        noise: in [0, 1).
    """
    penalised = logits.astype(np.float64)
    seen = np.unique(np.asarray(answer, np.int64))
    found = penalised[seen]
    penalised[seen] = np.where(found < 0, found * params.repetition_penalty, found / params.repetition_penalty)
    if params.greedy:
        return int(penalised.argmax())
    return int(sample(penalised[None] / params.temperature, params.top_k, params.top_p, np.asarray([noise], np.float32))[0])
