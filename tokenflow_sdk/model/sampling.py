"""Sampling of codes: parameters, presets, random numbers, and sampling in a graph and in NumPy (docs/model.md, section 4).

Random numbers are counter-based: each is a function of seed, image, scale, pass and position alone, so that a request gets the
same codes in any batch.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from tokenflow_sdk.arguments import integer, real, shown
from tokenflow_sdk.backends.session import Session, Tensor
from tokenflow_sdk.errors import ArgumentError

__all__ = [
    "MAX_TOP_K",
    "PRESETS",
    "Pass",
    "Preset",
    "SamplingParams",
    "checked_seed",
    "checked_top_k",
    "checked_top_p",
    "guidance",
    "probabilities",
    "random_seed",
    "run_sampling",
    "sample",
    "uniform",
]

MAX_TOP_K = 3832
"""Largest `top_k`: TensorRT sorts at most 3840 values, and `TIES` of them are reserved for ties."""
TIES = 8
"""Number of logits beyond the k-th that the sampling graph sorts, to keep those that equal the k-th."""

Float32 = NDArray[np.float32]


def checked_top_k(value: object) -> int:
    """`top_k` as an integer; ArgumentError if it is out of range."""
    return integer("top_k", value, 1, MAX_TOP_K, "keeps no tokens to draw from.", f"Give an integer from 1 to {MAX_TOP_K}.")


def checked_top_p(value: object) -> float:
    """`top_p` as a float; ArgumentError if it is out of range."""
    return real("top_p", value, 0, 1, "is no share of probability.", "Give a number from 0 (greedy) to 1 (all).")


def random_seed() -> int:
    """A seed for who gives none."""
    return secrets.randbelow(2**63)


def checked_seed(value: object) -> int:
    """`seed` as an integer; ArgumentError if it is out of range."""
    return integer("seed", value, 0, 2**63 - 1, "is no seed.", "Give an integer from 0 to 2**63 - 1.")


@dataclass(frozen=True)
class Pass:
    """Parameters of one sampling pass over a scale's codes.

    Args:
        top_k: number of likeliest codes to sample from, 1 .. 3832.
        top_p: of these, sample from the likeliest whose probabilities add up to this share (nucleus sampling), 0 .. 1;
            0 always takes the likeliest code.

    Raises:
        ArgumentError: a value is out of range.
    """

    top_k: int
    top_p: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "top_k", checked_top_k(self.top_k))
        object.__setattr__(self, "top_p", checked_top_p(self.top_p))


Preset = Literal["turbo", "fast", "balanced", "paper"]
PRESETS: dict[str, tuple[Pass, ...]] = {
    "turbo": (Pass(600, 0.6),),
    "fast": (Pass(600, 0.6),),
    "balanced": (Pass(1200, 0.8), Pass(1, 0.0)),
    "paper": (Pass(1200, 0.8), Pass(100, 0.8), Pass(1, 0.0)),
}
_UNGUIDED = {"turbo": 2}
"""Presets that leave guidance out at so many of the finest scales, where more than half of the codes are."""


@dataclass(frozen=True)
class SamplingParams:
    """Parameters of sampling an image.

    Args:
        passes: sampling passes over each scale, 1 to 8. Passes after the first see the codes of the one before (refinement).
            The first scale takes only the first pass.
        cfg_scale: strength of classifier-free guidance at the finest scale, 0 .. 1000; 0 turns it off.
        seed: seed of all random numbers, 0 .. 2**63 - 1.
        unguided_scales: how many of the finest scales are sampled without guidance, for half of their work, 0 .. 64.

    Raises:
        ArgumentError: a value is out of range.

    Example:
        >>> SamplingParams.preset("fast", seed=1)
        SamplingParams(passes=(Pass(top_k=600, top_p=0.6),), cfg_scale=7.5, seed=1, unguided_scales=0)
    """

    passes: tuple[Pass, ...] = PRESETS["paper"]
    cfg_scale: float = 7.5
    seed: int = 0
    unguided_scales: int = 0

    def __post_init__(self) -> None:
        passes = tuple(self.passes) if isinstance(self.passes, (list, tuple)) else ()
        if not 1 <= len(passes) <= 8 or not all(isinstance(step, Pass) for step in passes):
            raise ArgumentError(f"passes={shown(self.passes)} is no list of passes.", "Give 1 to 8 Pass(top_k, top_p).")
        hint = "Give a number from 0 (no guidance) to 1000; 7.5 is usual."
        object.__setattr__(self, "passes", passes)
        object.__setattr__(self, "cfg_scale", real("cfg_scale", self.cfg_scale, 0, 1000, "cannot guide.", hint))
        object.__setattr__(self, "seed", checked_seed(self.seed))
        unguided = integer("unguided_scales", self.unguided_scales, 0, 64, "is no number of scales.", "Give 0 to guide all.")
        object.__setattr__(self, "unguided_scales", unguided)

    @property
    def rows(self) -> int:
        """Rows of the transformer that an image takes at most: with guidance two, else one."""
        return 2 if self.cfg_scale else 1

    @classmethod
    def preset(cls, name: str, cfg_scale: float = 7.5, seed: int = 0) -> SamplingParams:
        """The parameters of a named preset.

        Args:
            name: `fast` (1 pass), `balanced` (2 passes) or `paper` (3 passes, as published); `turbo` is `fast` without guidance
                at the two finest scales, which gives other pictures than `fast`.
            cfg_scale, seed: as in `SamplingParams`.

        Raises:
            ArgumentError: there is no such preset, or a value is out of range.
        """
        if not isinstance(name, str) or name not in PRESETS:
            raise ArgumentError(f"There is no preset {shown(name)}.", f"Choose one of: {', '.join(PRESETS)}.")
        return cls(PRESETS[name], cfg_scale, seed, _UNGUIDED.get(name, 0))


def guidance(cfg_scale: float, scale: int, n_scales: int, unguided_scales: int = 0) -> float:
    """Guidance strength t of a scale, where logits are (1 + t) conditional - t unconditional.

    Args:
        cfg_scale: strength at the finest scale.
        scale: scale number, 0 .. n_scales - 1.
        n_scales: number of scales.
        unguided_scales: how many of the finest scales have no guidance.

    Returns:
        t, which grows linearly from 0 at the first scale to `cfg_scale` at the last; 0 where there is no guidance.

    Example:
        >>> [guidance(6.0, scale, 4) for scale in range(4)]
        [0.0, 2.0, 4.0, 6.0]
    """
    if scale >= n_scales - unguided_scales:
        return 0.0
    return cfg_scale * scale / (n_scales - 1) if n_scales > 1 else cfg_scale


def uniform(seed: int, image: int, scale: int, refinement: int, count: int) -> Float32:
    """Uniform random numbers float32 [count] in [0, 1), one for each position of a scale.

    They are the first numbers of a Philox stream of its own for every seed, image, scale and pass.

    Args:
        seed: seed of the request.
        image: number of the image in the request.
        scale: scale number; for text, number of the token.
        refinement: number of the pass, 0 for the first.
        count: how many numbers.
    """
    stream = np.random.Generator(np.random.Philox(key=[seed, image], counter=[0, refinement, scale, 0]))
    return stream.random(count, dtype=np.float32)


def run_sampling(session: Session, feeds: Mapping[str, Tensor], indices: str) -> tuple[NDArray[np.int32], Float32 | None]:
    """Run a graph that samples.

    Args:
        session: of the graph `sample` or `head`.
        feeds: its inputs; rows with a top_p of 0 are greedy.
        indices: name of the output that was sampled.

    Returns:
        The indices int32 [R, ...]; and None, or the logits float32 [R, ...] of a graph that is not certain of every row. They
        decide: a row may have logits that are not finite, and the index of a greedy one may not be the first of its
        largest logits. Graphs of older exporters are never certain.
    """
    if any(spec.name == "certain" for spec in session.outputs):
        found = session.run(feeds, [indices, "certain"])
        if found["certain"].all():
            return found[indices].astype(np.int32), None
    found = session.run(feeds, [indices, "logits"])
    return found[indices].astype(np.int32), found["logits"].astype(np.float32)


def probabilities(logits: NDArray[np.floating], top_k: int, top_p: float) -> NDArray[np.float64]:
    """The distribution that `sample` samples from: top-k, then top-p, as the released code does it (docs/model.md, section 4).

    Logits below the k-th largest are dropped; ties with it are kept. Then the least likely tokens are dropped as long as their
    probabilities add up to at most 1 - top_p, but never the likeliest token. The rest is normalized.

    Args:
        logits: float [..., K].
        top_k: as in `Pass`.
        top_p: as in `Pass`.

    Returns:
        Probabilities float64 [..., K]; dropped tokens have 0.
    """
    logits = logits.astype(np.float64)
    kth = np.sort(logits, axis=-1)[..., -min(top_k, logits.shape[-1]), None]
    kept = np.where(logits < kth, -np.inf, logits)
    weights = _softmax(kept)
    # Sorted descending with a stable sort, then reversed, so that of equal logits the first counts as the likelier one.
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
    """Sample one code per row by inverse transform sampling, with the codes ordered from the likeliest down.

    It does what the sampling graph of a bundle does; with the same noise both give the same codes, except for rounding.

    Args:
        logits: float [..., K].
        top_k: as in `Pass`.
        top_p: as in `Pass`.
        noise: float32 [...], uniform in [0, 1).

    Returns:
        Codes int32 [...].
    """
    weights = probabilities(logits, top_k, top_p)
    order = np.argsort(-weights, axis=-1, kind="stable")
    cumulative = np.cumsum(np.take_along_axis(weights, order, -1), axis=-1)
    place = (cumulative <= noise[..., None] * cumulative[..., -1:]).sum(axis=-1)
    return np.take_along_axis(order, place[..., None], -1)[..., 0].astype(np.int32)
