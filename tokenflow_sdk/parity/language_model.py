"""Comparing a language model's sessions with its bundle's reference: what both kinds share."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from tokenflow_sdk.backends.session import Tensor
from tokenflow_sdk.bundle.bundle import Bundle, load_reference
from tokenflow_sdk.bundle.model_config import pages_for
from tokenflow_sdk.model.kv_cache import PageTable
from tokenflow_sdk.model.transformer import PagedTransformer

__all__ = ["LanguageModelReference", "LanguageModelReport", "Piece", "hidden_agreement", "run_pieces"]

MIN_COSINE, MIN_SAME = 0.99, 0.9

R = TypeVar("R", bound="LanguageModelReference")

Float32 = NDArray[np.float32]
Int32 = NDArray[np.int32]
Piece = tuple[Tensor, NDArray[np.int32]]
"""Embeddings [1, Q, H], and how many of the step's own keys each query sees, int32 [Q]."""


def run_pieces(transformer: PagedTransformer, pieces: Iterable[Piece], total: int) -> Float32:
    """Hidden states [Q, H] of a sequence of `total` tokens, run piece by piece over its pages.

    Raises:
        PagesExhausted: the pool is too small for it.
    """
    table, found = PageTable(transformer.pool), []
    width = pages_for(total, transformer.pool.page_size)
    try:
        for embeddings, visible in pieces:
            positions = np.arange(table.length, table.length + len(visible), dtype=np.int32)[None]
            output = transformer.step(embeddings, positions, visible[None], [table], [table.length], width)
            found.append(np.array(output.hidden, np.float32)[0])
            transformer.store(output, [table])
    finally:
        table.release()
    return np.concatenate(found)


def hidden_agreement(found: Float32, expected: Float32) -> tuple[float, float]:
    """The largest difference of hidden states [Q, H], and their least cosine."""
    norms = np.linalg.norm(found, axis=1) * np.linalg.norm(expected, axis=1)
    return float(np.abs(found - expected).max()), float(((found * expected).sum(axis=1) / np.maximum(norms, 1e-12)).min())


@dataclass(frozen=True)
class LanguageModelReport:
    """How a language model's sessions agree with its reference.

    `hidden_error` is the largest difference of hidden states, `hidden_cosine` their least cosine, `same_choice` the share of
    positions whose likeliest code or token (`choice`) is the same.
    """

    hidden_error: float
    hidden_cosine: float
    same_choice: float
    choice: Literal["code", "token"]

    def failures(self) -> list[str]:
        """Which tolerances are missed, in words; empty when all hold. A figure that is not a number misses its own."""
        checks = [
            (self.hidden_cosine >= MIN_COSINE, f"hidden states have a cosine of {self.hidden_cosine:.4f}"),
            (
                self.same_choice >= MIN_SAME,
                f"the likeliest {self.choice} is the same at only {self.same_choice:.1%} of positions",
            ),
        ]
        return [text for holds, text in checks if not holds]

    @property
    def summary(self) -> str:
        """One line for people."""
        return f"hidden states cosine {self.hidden_cosine:.5f}, likeliest {self.choice} the same at {self.same_choice:.1%}"

    def to_json(self) -> dict[str, Any]:
        """For certificates."""
        return asdict(self)


@dataclass(frozen=True)
class LanguageModelReference:
    """What `reference.npz` of a bundle holds beside its inputs: R results of which each is right.

    The first is what the graphs gave at export. Graphs with int8 weights round what a product reads as well, which engines do
    not: the second is float32 arithmetic on the same weights.

    hidden: float32 [R, Q, H], Q the positions of all inputs; likeliest: the likeliest code or token of each, int32 [R, Q].
    """

    hidden: Float32
    likeliest: Int32

    def __post_init__(self) -> None:
        if self.hidden.ndim != 3 or self.likeliest.shape != self.hidden.shape[:2]:
            raise ValueError(f"hidden states {self.hidden.shape} with choices {self.likeliest.shape}")

    @classmethod
    def load(cls: type[R], bundle: Bundle[Any]) -> R:
        """Raises:
        CorruptBundleError: the bundle has none, or it is damaged.
        """
        return load_reference(bundle, cls)

    def compare(self, hidden: Float32, likeliest: Int32, choice: Literal["code", "token"]) -> LanguageModelReport:
        """How hidden states [Q, H] and choices [Q] agree with the nearest of the results.

        A result is whole: hidden states of one and choices of another are no agreement.
        """
        found = [
            (*hidden_agreement(hidden, states), float((likeliest == chosen).mean()))
            for states, chosen in zip(self.hidden, self.likeliest, strict=True)
        ]
        return LanguageModelReport(*max(found, key=lambda agreement: agreement[1]), choice)
