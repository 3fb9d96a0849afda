"""How an exported generator compares with PyTorch in float32, before its bundle appears."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from export.config import TransformerConfig
from export.hf_directory import HfDirectory
from export.precision import FULL_PRECISION, Precision
from export.transformer import hidden_by_layer
from tokenflow_sdk.backends.base import SessionOptions
from tokenflow_sdk.backends.onnxruntime import OnnxRuntimeSession
from tokenflow_sdk.bundle import Bundle
from tokenflow_sdk.config import GeneratorConfig
from tokenflow_sdk.errors import ParityError
from tokenflow_sdk.generator_parity import GeneratorReference, Steps, embed_steps, likeliest_codes, run_steps
from tokenflow_sdk.transformer import PagedTransformer

__all__ = ["MAX_HIDDEN_ERROR", "Agreement", "compare"]

MAX_HIDDEN_ERROR = 1e-3
"""Largest difference accepted from a float32 graph; hidden states are of order one."""
MIN_COSINE = 0.5
"""Least mean cosine accepted from other precisions: below it the graph is wrong, not coarse."""

Float32 = NDArray[np.float32]


@dataclass(frozen=True)
class Agreement:
    """Over one prompt of random ids and one scale of random codes, at every position.

    `hidden_error` is the largest difference of hidden states and `hidden_cosine` their mean cosine; `same_code` is the share
    of positions whose likeliest image code is the same, and `overlap` the mean probability that both distributions share.
    """

    hidden_error: float
    hidden_cosine: float
    same_code: float
    overlap: float

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


def compare(
    bundle: Bundle[GeneratorConfig], directory: HfDirectory, model: TransformerConfig, head: Tensor, codebook: Float32
) -> tuple[Agreement, GeneratorReference]:
    """A causal prompt and then a bidirectional block over its pages, against eager layers over both at once.

    Args:
        bundle: with the graphs written.
        directory, model: the checkpoint.
        head: float32 [K, H].
        codebook: float32 [K, 40].

    Returns:
        How they agree, and what the graphs computed.
    """
    steps = Steps.random(bundle.config)
    with ExitStack() as stack:
        embedding = {name: stack.enter_context(_open(bundle, name)) for name in ("embed_text", "embed_image")}
        prompt, scale = (np.array(x, np.float32) for x in embed_steps(embedding, codebook, steps))
    config, count, total = bundle.config, prompt.shape[1], prompt.shape[1] + scale.shape[1]
    mask = torch.ones(total, total, dtype=torch.bool).tril()
    mask[count:, count:] = True
    x = torch.from_numpy(np.concatenate([prompt, scale], axis=1))
    expected = hidden_by_layer(directory, model, x, torch.arange(total, dtype=torch.int32)[None], mask[None])[0]
    with _open(bundle, "transformer") as session:
        paged = PagedTransformer(session, config.layers, config.kv_heads, config.head_dim, pages=-(-total // 4), page_size=4)
        hidden = run_steps(paged, prompt, scale)
    with _open(bundle, "sample") as session:
        likeliest = likeliest_codes(session, hidden)
    found = torch.from_numpy(hidden)
    difference = (found - expected).abs().max()
    a, b = (F.linear(states, head) for states in (expected, found))
    overlap = torch.minimum(a.softmax(dim=-1), b.softmax(dim=-1)).sum(dim=-1).mean()
    cosine = F.cosine_similarity(found, expected, dim=-1).mean()
    same = (a.argmax(dim=-1) == b.argmax(dim=-1)).float().mean()
    agreement = Agreement(*(float(value) for value in (difference, cosine, same, overlap)))
    return agreement, GeneratorReference(steps.token_ids, steps.code_indices, hidden, likeliest)


def _open(bundle: Bundle[GeneratorConfig], name: str) -> OnnxRuntimeSession:
    entry = bundle.graph(name)
    return OnnxRuntimeSession(bundle.path / entry.files[0].name, entry, SessionOptions(device="cpu"))
