"""What the parity checks of generators and understanders share: running sequences, references and reports."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from tokenflow_sdk.backends.session import Tensor
from tokenflow_sdk.bundle.arrays import load_reference
from tokenflow_sdk.bundle.bundle import Bundle
from tokenflow_sdk.bundle.model_config import pages_for
from tokenflow_sdk.model.kv_cache import PageTable
from tokenflow_sdk.model.transformer import PagedTransformer

__all__ = ["BatchAgreement", "LanguageModelReference", "LanguageModelReport", "Piece", "hidden_agreement", "run_pieces"]

MIN_COSINE, MIN_SAME = 0.99, 0.9
"""Tolerances of `LanguageModelReport.hidden_cosine` and `same_choice`."""

R = TypeVar("R", bound="LanguageModelReference")

Float32 = NDArray[np.float32]
Int32 = NDArray[np.int32]
Piece = tuple[Tensor, NDArray[np.int32]]
"""One step of a sequence: its embeddings, float32 [1, Q, H], and how many of its own keys each query sees, int32 [Q]."""


def run_pieces(transformer: PagedTransformer, pieces: Iterable[Piece], total: int) -> Float32:
    """Run a sequence through a transformer, one step for each piece, over the pages of the pieces before it.

    Args:
        transformer: whose pool the sequence uses and leaves.
        pieces: of the sequence, in order.
        total: tokens in all pieces.

    Returns:
        Hidden states, float32 [total, H].

    Raises:
        PagesExhausted: the pool is too small.
        BackendError: the session cannot be run.
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
    """Compare hidden states, float32 [Q, H] each.

    Returns:
        The largest absolute difference, and the least cosine of any position; NaN in either states gives NaN.
    """
    norms = np.linalg.norm(found, axis=1) * np.linalg.norm(expected, axis=1)
    return float(np.abs(found - expected).max()), float(((found * expected).sum(axis=1) / np.maximum(norms, 1e-12)).min())


@dataclass(frozen=True)
class BatchAgreement:
    """How rows of a batch agree with the same rows alone.

    Attributes:
        rows, queries: size of the batch.
        hidden_error: largest absolute difference of the hidden states.
        hidden_cosine: least cosine of the hidden states at any position.
        same_choice: fraction of positions at which the likeliest code or token is the same.
    """

    rows: int
    queries: int
    hidden_error: float
    hidden_cosine: float
    same_choice: float


@dataclass(frozen=True)
class LanguageModelReport:
    """How the results of a language model's sessions agree with its reference.

    Attributes:
        hidden_error: largest absolute difference of the hidden states.
        hidden_cosine: least cosine of the hidden states at any position.
        same_choice: fraction of positions at which the likeliest code or token is the same.
        choice: whether the model chooses codes (generator) or tokens (understander).
        batches: how rows of batches agree with the same rows alone.
    """

    hidden_error: float
    hidden_cosine: float
    same_choice: float
    choice: Literal["code", "token"]
    batches: tuple[BatchAgreement, ...] = ()

    def failures(self) -> list[str]:
        """The tolerances that are missed, in words; empty if none. NaN misses a tolerance."""
        failures = self._failures(self, "")
        for batch in self.batches:
            failures += self._failures(batch, f"in a batch of {batch.rows} rows of {batch.queries}, compared with each alone, ")
        return failures

    def _failures(self, found: LanguageModelReport | BatchAgreement, where: str) -> list[str]:
        checks = [
            (found.hidden_cosine >= MIN_COSINE, f"{where}hidden states have a cosine of {found.hidden_cosine:.4f}"),
            (
                found.same_choice >= MIN_SAME,
                f"{where}the likeliest {self.choice} is the same at only {found.same_choice:.1%} of positions",
            ),
        ]
        return [text for holds, text in checks if not holds]

    @property
    def summary(self) -> str:
        """The main figures in one line."""
        text = f"hidden states cosine {self.hidden_cosine:.5f}, likeliest {self.choice} the same at {self.same_choice:.1%}"
        if self.batches:
            least = min(batch.hidden_cosine for batch in self.batches)
            text += f"; in batches of up to {max(batch.rows for batch in self.batches)} rows cosine {least:.5f} with each alone"
        return text

    def to_json(self) -> dict[str, Any]:
        """All figures as JSON, for certificates."""
        return asdict(self)


@dataclass(frozen=True)
class LanguageModelReference(ABC):
    """The results in `reference.npz` of a language model's bundle: R alternatives, of which a session must reproduce one.

    The first is what onnxruntime computed from the exported graphs. Graphs with int8 weights have a second: onnxruntime also
    rounds the activations that those weights are multiplied with, and engines do not, so it is float32 arithmetic on the same
    weights.

    Attributes:
        hidden: hidden states at all Q positions of the inputs, float32 [R, Q, H].
        likeliest: likeliest code or token at each position, int32 [R, Q].

    Raises:
        ValueError: the shapes do not match.
    """

    layout: ClassVar[str]

    hidden: Float32
    likeliest: Int32

    def __post_init__(self) -> None:
        if self.hidden.ndim != 3 or self.likeliest.shape != self.hidden.shape[:2] or self.hidden.shape[1] != len(self):
            raise ValueError(f"hidden states {self.hidden.shape} with choices {self.likeliest.shape}")

    @abstractmethod
    def __len__(self) -> int:
        """Number of positions of the inputs, Q."""

    @classmethod
    def load(cls: type[R], bundle: Bundle[Any]) -> R:
        """Read a bundle's reference.

        Raises:
            CorruptBundleError: the bundle has no reference, or it is damaged.
        """
        return load_reference(bundle, cls)

    def compare(self, hidden: Float32, likeliest: Int32, choice: Literal["code", "token"]) -> LanguageModelReport:
        """Compare results with the alternative whose hidden states have the largest least cosine.

        Args:
            hidden: hidden states, float32 [Q, H].
            likeliest: likeliest codes or tokens, int32 [Q]; compared with those of the same alternative.
            choice: whether they are codes or tokens.
        """
        found = [
            (*hidden_agreement(hidden, states), float((likeliest == chosen).mean()))
            for states, chosen in zip(self.hidden, self.likeliest, strict=True)
        ]
        return LanguageModelReport(*max(found, key=lambda agreement: agreement[1]), choice)
