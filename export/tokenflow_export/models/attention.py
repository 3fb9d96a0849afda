"""Self-attention arithmetic shared by the transformers."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

__all__ = ["attend"]


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Multi-head attention of [B, N, D] queries, keys and values, scaled by the head width; no mask."""
    batch, length, width = q.shape

    def split(t: Tensor) -> Tensor:
        return t.reshape(batch, length, heads, width // heads).transpose(1, 2)

    out = F.scaled_dot_product_attention(split(q), split(k), split(v))
    return out.transpose(1, 2).reshape(batch, length, width)
