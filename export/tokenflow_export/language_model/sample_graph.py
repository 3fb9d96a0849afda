"""Sampling of one code or token inside a graph. `tokenflow_sdk.model.sampling.sample` does the same in NumPy."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["sample"]


def sample(logits: Tensor, top_k: Tensor, top_p: Tensor, noise: Tensor, ranks: Tensor) -> tuple[Tensor, Tensor]:
    """Sample from the top-k and top-p of each distribution by inverse CDF (docs/model.md, section 4).

    Args:
        logits: float32 [R, Q, K].
        top_k: int32 [R].
        top_p: float32 [R]; rows with 0 are greedy: they take the first of their largest logits.
        noise: float32 [R, Q] in [0, 1).
        ranks: int32 [W], the numbers 0 .. W - 1. Only the W likeliest are sorted, so W must be at least every top_k.

    Returns:
        The indices that were sampled, int32 [R, Q]; and whether they are certain, int32 [R]: 0 for a row with logits that are
        not finite, or a greedy one with as many largest logits as the window holds, where the first may lie outside it.
    """
    values, order = logits.topk(ranks.shape[0], dim=-1)
    kth = values.gather(-1, (top_k.long() - 1)[:, None, None].expand(-1, values.shape[1], 1))
    kept = torch.where(values < kth, -1e30, values)
    weights = kept.softmax(dim=-1)
    # Sorted from the likeliest down: a token stays while those before it hold less than top_p. The first one always stays.
    before = weights.cumsum(dim=-1) - weights
    nucleus = (before < top_p[:, None, None]) | (ranks == 0)
    weights = torch.where(nucleus, weights, 0.0)
    cumulative = weights.cumsum(dim=-1)
    place = (cumulative <= noise[..., None] * cumulative[..., -1:]).sum(dim=-1, keepdim=True)
    drawn = order.gather(-1, place)[..., 0]
    # ONNX sorts equal values by their index, but TensorRT promises no order, not even for ArgMax.
    largest = values == values[..., :1]
    first = torch.where(largest, order, logits.shape[-1] - 1).amin(dim=-1)
    greedy = top_p == 0
    cut = greedy & (largest[..., -1].to(torch.int32).sum(dim=-1) > 0)
    # Every NaN and infinity reaches the sum, whose size else stays far below the bound; comparing with NaN is false.
    finite = logits.sum(dim=(1, 2)).abs() < 1e37
    return torch.where(greedy[:, None], first, drawn).to(torch.int32), (finite & ~cut).to(torch.int32)
