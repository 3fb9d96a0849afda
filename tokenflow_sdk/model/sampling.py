"""How image tokens are drawn: presets, the noise, and the draw itself in NumPy (docs/model.md, section 4).

Noise is counter-based: every uniform number is a function of seed, image, scale, pass and position alone, so a request draws
the same codes whatever it is batched with.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from tokenflow_sdk.errors import ArgumentError

__all__ = ["MAX_TOP_K", "PRESETS", "Pass", "Preset", "SamplingParams", "guidance", "probabilities", "sample", "uniform"]

MAX_TOP_K = 3832
"""TensorRT sorts at most 3840 values; eight are kept for ties at the k-th."""
TIES = 8
"""Logits equal to the k-th that are kept beyond k."""

Float32 = NDArray[np.float32]


@dataclass(frozen=True)
class Pass:
    """One drawing of a scale's codes: the `top_k` best, of these the nucleus that holds `top_p` of the probability."""

    top_k: int
    top_p: float

    def __post_init__(self) -> None:
        if type(self.top_k) is not int or not 1 <= self.top_k <= MAX_TOP_K:
            raise ArgumentError(
                f"top_k={self.top_k!r} keeps no tokens to draw from.", f"Give an integer from 1 to {MAX_TOP_K}."
            )
        if not 0 <= self.top_p <= 1:
            raise ArgumentError(
                f"top_p={self.top_p!r} is no share of probability.", "Give a number from 0 (greedy) to 1 (all)."
            )


Preset = Literal["fast", "balanced", "paper"]
PRESETS: dict[str, tuple[Pass, ...]] = {
    "fast": (Pass(600, 0.6),),
    "balanced": (Pass(1200, 0.8), Pass(1, 0.0)),
    "paper": (Pass(1200, 0.8), Pass(100, 0.8), Pass(1, 0.0)),
}


@dataclass(frozen=True)
class SamplingParams:
    """How to draw a picture.

    Args:
        passes: one entry a refinement pass; the first scale always takes one.
        cfg_scale: strength of guidance at the finest scale; 0 is none.
        seed: of all noise, 0 .. 2**63 - 1.

    Raises:
        ArgumentError: a value that cannot work.
    """

    passes: tuple[Pass, ...] = PRESETS["paper"]
    cfg_scale: float = 7.5
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= len(self.passes) <= 8 or not all(isinstance(step, Pass) for step in self.passes):
            raise ArgumentError(f"passes={self.passes!r} is no list of passes.", "Give 1 to 8 Pass(top_k, top_p).")
        if not (math.isfinite(self.cfg_scale) and 0 <= self.cfg_scale <= 1000):
            raise ArgumentError(
                f"cfg_scale={self.cfg_scale!r} cannot guide.", "Give a number from 0 (no guidance); 7.5 is usual."
            )
        if type(self.seed) is not int or not 0 <= self.seed < 2**63:
            raise ArgumentError(f"seed={self.seed!r} is no seed.", "Give an integer from 0 to 2**63 - 1.")

    @classmethod
    def preset(cls, name: str, cfg_scale: float = 7.5, seed: int = 0) -> SamplingParams:
        """`fast` (1 pass), `balanced` (2) or `paper` (3).

        Raises:
            ArgumentError: no such preset, or a value that cannot work.
        """
        if name not in PRESETS:
            raise ArgumentError(f"There is no preset {name!r}.", f"Choose one of: {', '.join(PRESETS)}.")
        return cls(PRESETS[name], cfg_scale, seed)


def guidance(cfg_scale: float, scale: int, n_scales: int) -> float:
    """t of scale 0 .. n_scales - 1: logits are (1 + t) conditional - t unconditional; grows linearly to cfg_scale."""
    return cfg_scale * scale / (n_scales - 1) if n_scales > 1 else cfg_scale


def uniform(seed: int, image: int, scale: int, refinement: int, count: int) -> Float32:
    """float32 [count] in [0, 1): position i of a scale always gets the i-th number of this Philox stream."""
    stream = np.random.Generator(np.random.Philox(key=[seed, image], counter=[0, refinement, scale, 0]))
    return stream.random(count, dtype=np.float32)


def probabilities(logits: NDArray[np.floating], top_k: int, top_p: float) -> NDArray[np.float64]:
    """What `sample` draws from, written as docs/model.md says it, in section 4: [..., K] -> float64 [..., K].

    Everything below the k-th logit is dropped, ties kept; sorted ascending, tokens are dropped while the cumulative
    probability is at most 1 - p, the best never; softmax of the rest.
    """
    logits = logits.astype(np.float64)
    kth = np.sort(logits, axis=-1)[..., -min(top_k, logits.shape[-1]), None]
    kept = np.where(logits < kth, -np.inf, logits)
    weights = _softmax(kept)
    # Stable and descending, then turned round: of equal logits the first counts as the better one.
    ascending = np.argsort(-kept, axis=-1, kind="stable")[..., ::-1]
    dropped = np.cumsum(np.take_along_axis(weights, ascending, -1), axis=-1) <= 1 - top_p
    dropped[..., -1] = False
    mask = np.zeros(logits.shape, bool)
    np.put_along_axis(mask, ascending, dropped, -1)
    return _softmax(np.where(mask, -np.inf, kept))


def _softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    result: NDArray[np.float64] = weights / weights.sum(axis=-1, keepdims=True)
    return result


def sample(logits: NDArray[np.floating], top_k: int, top_p: float, noise: Float32) -> NDArray[np.int32]:
    """One code a row: logits [..., K], noise [...] in [0, 1) -> int32 [...], by inverse CDF from the likeliest down.

    The twin of the sampling graph: with the same noise it gives the same codes, but for rounding.
    """
    weights = probabilities(logits, top_k, top_p)
    order = np.argsort(-weights, axis=-1, kind="stable")
    cumulative = np.cumsum(np.take_along_axis(weights, order, -1), axis=-1)
    place = (cumulative <= noise[..., None] * cumulative[..., -1:]).sum(axis=-1)
    return np.take_along_axis(order, place[..., None], -1)[..., 0].astype(np.int32)
