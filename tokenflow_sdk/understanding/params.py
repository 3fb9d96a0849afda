"""`AnswerParams`, the settings of an answer, and sampling of tokens in NumPy."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from tokenflow_sdk.arguments import integer, items, real, shown
from tokenflow_sdk.errors import ArgumentError
from tokenflow_sdk.model.sampling import checked_seed, checked_top_k, checked_top_p, random_seed, sample

__all__ = ["DEFAULT_MAX_TOKENS", "AnswerParams", "sample_token", "within"]

DEFAULT_MAX_TOKENS = 256
_HOTTEST, _COLDEST = 100.0, 0.01


@dataclass(frozen=True)
class AnswerParams:
    """How to answer.

    Args:
        max_tokens: most tokens of the answer; None takes 256, or as many as the model still reads after the question.
        temperature: 0 always takes the likeliest token; 1 draws from the model's own probabilities.
        top_p: of the likeliest tokens, those that hold this share of the probability.
        top_k: of the likeliest tokens, so many.
        repetition_penalty: divides the logits of tokens that the answer has already (multiplies negative ones); 1 is none.
        seed: of all noise, 0 .. 2**63 - 1.
        stop_ids: tokens that end the answer; None takes the model's own.

    Raises:
        ArgumentError: a value that cannot work.
    """

    max_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 50
    repetition_penalty: float = 1.0
    seed: int = 0
    stop_ids: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        penalty_hint = "Give 1 (none) or a little more, as 1.1; 0.1 to 10 is accepted."
        values = {
            "max_tokens": self.max_tokens
            if self.max_tokens is None
            else integer("max_tokens", self.max_tokens, 1, None, "leaves no room for an answer.", "Give at least 1."),
            "temperature": _checked_temperature(self.temperature),
            "top_p": checked_top_p(self.top_p),
            "top_k": checked_top_k(self.top_k),
            "repetition_penalty": real("repetition_penalty", self.repetition_penalty, 0.1, 10, "cannot be used.", penalty_hint),
            "seed": checked_seed(self.seed),
            "stop_ids": None if self.stop_ids is None else _checked_stop_ids(self.stop_ids),
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @classmethod
    def of(
        cls, max_tokens: int | None, temperature: float | None, seed: int | None, params: AnswerParams | None
    ) -> AnswerParams:
        """`params` with what else was given; without any, the defaults and a random seed.

        Raises:
            ArgumentError: a value that cannot work.
        """
        base = cls(seed=random_seed()) if params is None else params
        if not isinstance(base, AnswerParams):
            raise ArgumentError(f"params={shown(params)} are no settings of an answer.", "Give AnswerParams(...).")
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


def _checked_temperature(value: object) -> float:
    problem, hint = "cannot be drawn with.", f"Give 0 (always the likeliest token), or {_COLDEST} to {_HOTTEST:.0f}."
    found = real("temperature", value, 0, _HOTTEST, problem, hint)
    return found and real("temperature", value, _COLDEST, _HOTTEST, problem, hint)


def _checked_stop_ids(ids: Iterable[object]) -> tuple[int, ...]:
    problem, hint = "ends no answer: it is no token id.", "Give a tuple of integers from 0 on, or None for the model's own."
    if isinstance(ids, (str, bytes, bytearray)):
        raise ArgumentError(f"stop_ids={shown(ids)} are no token ids.", hint)
    return tuple(integer("stop_ids", i, 0, None, problem, hint) for i in items("stop_ids", ids, hint))


def within(params: AnswerParams, room: int) -> AnswerParams:
    """Settings with as many tokens as a model reads after a question if `max_tokens` was not given."""
    return params if params.max_tokens is not None else replace(params, max_tokens=max(1, min(DEFAULT_MAX_TOKENS, room)))


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
