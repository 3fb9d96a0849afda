"""Measures how the graphs of an exported language model agree with PyTorch in float32."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from tokenflow_export.tracing.weight_quantization import FULL_PRECISION, ExportPrecision
from tokenflow_sdk.backends.onnxruntime import open_onnxruntime
from tokenflow_sdk.backends.session import Session, SessionOptions
from tokenflow_sdk.bundle.bundle import Bundle
from tokenflow_sdk.errors import ParityError

__all__ = ["MAX_ERROR", "OWN_MODEL", "Agreement", "open_on_cpu", "require_every_row"]

MAX_ERROR = 1e-3
"""Largest error of hidden states, of order one, and of logits, as a share of the largest, that is accepted in float32."""
MIN_COSINE = {"fp16": 0.999, "int8": 0.98, "int4": 0.8}
"""Least mean cosine of hidden states and of logits in other precisions. Random weights of eight layers keep 1.0000, 0.997 and
0.89 of it, and trained ones more; below that the graph is wrong, or the model does not bear the precision."""
_ROWS = 2048
"""How many rows of an embedding table are compared at once."""
_MEND = (
    "Export in fp32 or with --weights int8 if this was fp16 or int4; else with the pinned versions of torch and onnxruntime."
)
OWN_MODEL = "the exporter's own PyTorch model"

Float32 = NDArray[np.float32]


def open_on_cpu(bundle: Bundle[Any], name: str) -> Session:
    """Open a graph of a bundle in onnxruntime on the CPU."""
    return open_onnxruntime(bundle.graph_path(name), bundle.graph(name), SessionOptions(device="cpu"))


def require_every_row(embed: Callable[[NDArray[np.int32]], NDArray[np.float32]], table: Tensor) -> None:
    """Check that a graph gives every row of an embedding table exactly.

    Args:
        embed: runs the graph on ids int32 [N], and gives float32 [N, H].
        table: [V, H], as it was written.

    Raises:
        ParityError: a row differs.
    """
    for start in range(0, len(table), _ROWS):
        expected = table[start : start + _ROWS].float().numpy()
        found = embed(np.arange(start, start + len(expected), dtype=np.int32))
        wrong = np.flatnonzero((found != expected).any(axis=-1))
        if len(wrong):
            raise ParityError(f"The exported graph embeds token {start + wrong[0]} as another vector than PyTorch.", _MEND)


@dataclass(frozen=True)
class Agreement:
    """How graphs agree with PyTorch in float32 over one random sequence.

    Args:
        hidden_error: largest difference of hidden states.
        hidden_cosine: mean cosine similarity of hidden states.
        logits_error: largest difference of logits, as a share of the largest logit.
        logits_cosine: mean cosine similarity of logits.
        same_code: share of positions whose likeliest code or token is the same.
        overlap: mean probability mass that both distributions have in common.
        compared_with: whose results they agree with.
    """

    hidden_error: float
    hidden_cosine: float
    logits_error: float
    logits_cosine: float
    same_code: float
    overlap: float
    compared_with: str = OWN_MODEL

    @classmethod
    def of(
        cls, found: Tensor, expected: Tensor, found_logits: Tensor, expected_logits: Tensor, compared_with: str = OWN_MODEL
    ) -> Agreement:
        """Compare hidden states [Q, H] and logits [Q, K] of a graph with those of PyTorch."""
        same = found_logits.argmax(dim=-1) == expected_logits.argmax(dim=-1)
        common = torch.minimum(found_logits.softmax(dim=-1), expected_logits.softmax(dim=-1)).sum(dim=-1)
        return cls(
            hidden_error=float((found - expected).abs().max()),
            hidden_cosine=float(F.cosine_similarity(found, expected, dim=-1).mean()),
            logits_error=float((found_logits - expected_logits).abs().max() / expected_logits.abs().max()),
            logits_cosine=float(F.cosine_similarity(found_logits, expected_logits, dim=-1).mean()),
            same_code=float(same.float().mean()),
            overlap=float(common.mean()),
            compared_with=compared_with,
        )

    def require(self, precision: ExportPrecision) -> None:
        """Check that the agreement is good enough for graphs in this precision.

        Raises:
            ParityError: it is not.
        """
        if precision == FULL_PRECISION:
            good = all(error <= MAX_ERROR for error in (self.hidden_error, self.logits_error))
            accepted = f"by at most {MAX_ERROR:.0e}"
        else:
            least = MIN_COSINE[precision.weights or precision.dtype]
            good = all(cosine >= least for cosine in (self.hidden_cosine, self.logits_cosine))
            accepted = f"with a cosine of at least {least}"
        if not good:
            raise ParityError(
                f"The exported graphs differ from {self.compared_with}: hidden states by {self.hidden_error:.1e} with a cosine "
                f"of {self.hidden_cosine:.3f}, logits by {self.logits_error:.1e} of the largest with {self.logits_cosine:.3f} "
                f"({accepted} is accepted in {precision.name}).",
                _MEND,
            )
