"""How an exported language model compares with PyTorch in float32, before its bundle appears."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from export.precision import FULL_PRECISION, Precision
from tokenflow_sdk.backends.base import Array, SessionOptions
from tokenflow_sdk.backends.onnxruntime import OnnxRuntimeSession
from tokenflow_sdk.bundle import Bundle
from tokenflow_sdk.errors import ParityError
from tokenflow_sdk.kv_cache import PageTable
from tokenflow_sdk.transformer import PagedTransformer

__all__ = ["MAX_HIDDEN_ERROR", "Agreement", "paged_hidden", "run_graph"]

MAX_HIDDEN_ERROR = 1e-3
"""Largest difference accepted from a float32 graph; hidden states are of order one."""
MIN_COSINE = 0.5
"""Least mean cosine accepted from other precisions: below it the graph is wrong, not coarse."""

Float32 = NDArray[np.float32]
Int32 = NDArray[np.int32]


@dataclass(frozen=True)
class Agreement:
    """Over one random sequence, at every position.

    `hidden_error` is the largest difference of hidden states and `hidden_cosine` their mean cosine; `same_code` is the share
    of positions whose likeliest code or token is the same, and `overlap` the mean probability that both distributions share.
    """

    hidden_error: float
    hidden_cosine: float
    same_code: float
    overlap: float

    @classmethod
    def of(cls, found: Tensor, expected: Tensor, found_logits: Tensor, expected_logits: Tensor) -> Agreement:
        """Hidden states [Q, H] and logits [Q, K] of both sides."""
        error = (found - expected).abs().max()
        cosine = F.cosine_similarity(found, expected, dim=-1).mean()
        same = (found_logits.argmax(dim=-1) == expected_logits.argmax(dim=-1)).float().mean()
        overlap = torch.minimum(found_logits.softmax(dim=-1), expected_logits.softmax(dim=-1)).sum(dim=-1).mean()
        return cls(*(float(value) for value in (error, cosine, same, overlap)))

    def require(self, precision: Precision) -> None:
        """Refuse a broken graph.

        Raises:
            ParityError: the graph does not reproduce PyTorch.
        """
        if precision == FULL_PRECISION:
            good, bar = self.hidden_error <= MAX_HIDDEN_ERROR, f"by at most {MAX_HIDDEN_ERROR:.0e}"
        else:
            good, bar = self.hidden_cosine >= MIN_COSINE, f"with a cosine of at least {MIN_COSINE}"
        if not good:
            raise ParityError(
                f"The exported transformer differs from PyTorch by {self.hidden_error:.1e}, cosine {self.hidden_cosine:.3f} "
                f"({bar} is accepted in {precision.name}).",
                "Export in fp32 or with --weights int8 if this was fp16 or int4; else with the pinned versions of torch and "
                "onnxruntime.",
            )


def run_graph(bundle: Bundle[Any], name: str, feeds: dict[str, Array], output: str) -> Array:
    """One output of one graph on the CPU."""
    entry = bundle.graph(name)
    with OnnxRuntimeSession(bundle.path / entry.files[0].name, entry, SessionOptions(device="cpu")) as session:
        return session.run(feeds, [output])[output]


def paged_hidden(bundle: Bundle[Any], x: Float32, positions: Int32, visible: Int32, ends: Sequence[int]) -> Float32:
    """Hidden states float32 [Q, H] of embeddings [1, Q, H], run in steps over pages.

    Args:
        bundle: with the graphs written.
        x: embeddings float32 [1, Q, H].
        positions: int32 [1, Q].
        visible: int32 [1, Q], how many of its own step's keys each query sees.
        ends: where each step ends; the last is Q.
    """
    config, entry = bundle.config, bundle.graph("transformer")
    with OnnxRuntimeSession(bundle.path / entry.files[0].name, entry, SessionOptions(device="cpu")) as session:
        pages = -(-x.shape[1] // 4)
        paged = PagedTransformer(session, config.layers, config.kv_heads, config.head_dim, pages=pages, page_size=4)
        table, found = PageTable(paged.pool), []
        for stop in ends:
            step = (array[:, table.length : stop] for array in (x, positions, visible))
            output = paged.step(*step, [table], [table.length], width=pages)
            paged.store(output, [table])
            found.append(output.hidden[0])
    return np.concatenate(found)
