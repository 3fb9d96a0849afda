"""Measures how the graphs of an exported language model agree with PyTorch in float32."""

from __future__ import annotations

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

__all__ = ["MAX_HIDDEN_ERROR", "Agreement", "open_on_cpu"]

MAX_HIDDEN_ERROR = 1e-3
"""Largest error of hidden states that is accepted from a float32 graph; hidden states are of order one."""
MIN_COSINE = 0.5
"""Least mean cosine of hidden states that is accepted in other precisions; a lower one means that the graph is wrong."""

Float32 = NDArray[np.float32]


def open_on_cpu(bundle: Bundle[Any], name: str) -> Session:
    """Open a graph of a bundle in onnxruntime on the CPU."""
    return open_onnxruntime(bundle.graph_path(name), bundle.graph(name), SessionOptions(device="cpu"))


@dataclass(frozen=True)
class Agreement:
    """How graphs agree with PyTorch over one random sequence.

    Args:
        hidden_error: largest difference of hidden states.
        hidden_cosine: mean cosine similarity of hidden states.
        same_code: share of positions whose likeliest code or token is the same.
        overlap: mean probability mass that both distributions have in common.
    """

    hidden_error: float
    hidden_cosine: float
    same_code: float
    overlap: float

    @classmethod
    def of(cls, found: Tensor, expected: Tensor, found_logits: Tensor, expected_logits: Tensor) -> Agreement:
        """Compare hidden states [Q, H] and logits [Q, K] of a graph with those of PyTorch."""
        error = (found - expected).abs().max()
        cosine = F.cosine_similarity(found, expected, dim=-1).mean()
        same = (found_logits.argmax(dim=-1) == expected_logits.argmax(dim=-1)).float().mean()
        overlap = torch.minimum(found_logits.softmax(dim=-1), expected_logits.softmax(dim=-1)).sum(dim=-1).mean()
        return cls(*(float(value) for value in (error, cosine, same, overlap)))

    def require(self, precision: ExportPrecision) -> None:
        """Check that the agreement is good enough for graphs in this precision.

        Raises:
            ParityError: it is not.
        """
        if precision == FULL_PRECISION:
            good, accepted = self.hidden_error <= MAX_HIDDEN_ERROR, f"by at most {MAX_HIDDEN_ERROR:.0e}"
        else:
            good, accepted = self.hidden_cosine >= MIN_COSINE, f"with a cosine of at least {MIN_COSINE}"
        if not good:
            raise ParityError(
                f"The exported transformer differs from PyTorch by {self.hidden_error:.1e}, cosine {self.hidden_cosine:.3f} "
                f"({accepted} is accepted in {precision.name}).",
                "Export in fp32 or with --weights int8 if this was fp16 or int4; else with the pinned versions of torch and "
                "onnxruntime.",
            )
