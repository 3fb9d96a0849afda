"""Layers that several of the models share."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["Mlp", "attend"]


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Multi-head attention of queries, keys and values [B, N, D] without a mask; scores are scaled by the head width."""
    batch, length, width = q.shape

    def split(t: Tensor) -> Tensor:
        return t.reshape(batch, length, heads, width // heads).transpose(1, 2)

    out = F.scaled_dot_product_attention(split(q), split(k), split(v))
    return out.transpose(1, 2).reshape(batch, length, width)


class Mlp(nn.Module):
    """Linear, GELU, Linear; `approximate` is the GELU's."""

    def __init__(self, width: int, mlp_width: int, approximate: Literal["none", "tanh"] = "none") -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, mlp_width)
        self.fc2 = nn.Linear(mlp_width, width)
        self.approximate = approximate

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(x), approximate=self.approximate))
        return out
