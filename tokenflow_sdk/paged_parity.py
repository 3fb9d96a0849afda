"""What comparing a language model's engines with its bundle's reference has in common, whichever model it is."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from tokenflow_sdk.backends.base import Tensor
from tokenflow_sdk.kv_cache import PageTable
from tokenflow_sdk.transformer import PagedTransformer

__all__ = ["Piece", "hidden_agreement", "missed_bars", "nearest_agreement", "run_pieces"]

MIN_COSINE, MIN_SAME = 0.99, 0.9

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
    width = -(-total // transformer.pool.page_size)
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


def nearest_agreement(hidden: Float32, likeliest: Int32, results: Float32, choices: Int32) -> tuple[float, float, float]:
    """How states [Q, H] and the likeliest code or token after each [Q] agree with the nearest of R results that are right.

    Args:
        hidden, likeliest: what was found.
        results, choices: what is right, [R, Q, H] and [R, Q].

    Returns:
        The largest difference of hidden states, their least cosine, and the share of positions with the same choice.
    """
    found = [
        (*hidden_agreement(hidden, states), float((likeliest == chosen).mean()))
        for states, chosen in zip(results, choices, strict=True)
    ]
    return max(found, key=lambda agreement: agreement[1])


def missed_bars(cosine: float, same: float, choice: str) -> list[str]:
    """Which bars are missed, in words; empty when all hold. A figure that is not a number misses its own.

    Args:
        cosine: the least one of hidden states.
        same: share of positions whose likeliest `choice` is the same.
        choice: `code` or `token`.
    """
    checks = [
        (cosine >= MIN_COSINE, f"hidden states have a cosine of {cosine:.4f}"),
        (same >= MIN_SAME, f"the likeliest {choice} is the same at only {same:.1%} of positions"),
    ]
    return [text for holds, text in checks if not holds]
