"""How an exported language model compares with PyTorch in float32, before its bundle appears."""

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
"""Largest difference accepted from a float32 graph; hidden states are of order one."""
MIN_COSINE = 0.5
"""Least mean cosine accepted from other precisions: below it the graph is wrong, not coarse."""

Float32 = NDArray[np.float32]


def open_on_cpu(bundle: Bundle[Any], name: str) -> Session:
    """A graph of a bundle in onnxruntime on the CPU, where it is compared with PyTorch."""
    return open_onnxruntime(bundle.graph_path(name), bundle.graph(name), SessionOptions(device="cpu"))


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

    def require(self, precision: ExportPrecision) -> None:
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
