"""The transformer of the language models (docs/model.md, sections 4 and 5): Llama's layers, with options for the others.

It computes a whole sequence with a mask; a layer can also attend to cached keys and values.
`tokenflow_export.language_model.paged_graph` makes the paged graph from the same layers.

Weights may be float16. Matrix products, keys and values then are too, and all else is float32 as in half-precision engines: the
residual stream, in which some models have values beyond float16's largest, norms, RoPE and softmax.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenflow_export.models.config import TransformerConfig

__all__ = ["KeysValues", "RmsNorm", "Transformer", "apply_rope", "rope_angles", "score_bias"]

KeysValues = tuple[Tensor, Tensor]
"""Keys and values of T tokens, each [B, kv_heads, T, D]."""


class RmsNorm(nn.Module):
    """x / rms(x) * weight over the last axis, float32 for x of any dtype."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, dtype=torch.float32))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps) * self.weight


def rope_angles(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines [..., head_dim / 2] of integer positions [...]."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
    inverse = 1.0 / theta**exponents
    angles = positions[..., None].float() * inverse
    return angles.cos(), angles.sin()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs (i, i + head_dim / 2) of x [B, Q, heads, head_dim] by angles [B, Q, head_dim / 2]; float32."""
    a, b = x.float().chunk(2, dim=-1)
    cos, sin = cos[..., None, :], sin[..., None, :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def score_bias(mask: Tensor) -> Tensor:
    """The bias that attention adds to scores [B, kv_heads, groups, Q, T]: 0 where mask [B, Q, T] is true, else -1e30.

    It is finite, so that a padding query that sees no key gives numbers instead of NaN.
    """
    return (~mask)[:, None, None].float() * -1e30


class QkNorm(nn.Module):
    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.query_norm = RmsNorm(head_dim, 1e-6)
        self.key_norm = RmsNorm(head_dim, 1e-6)


class Attention(nn.Module):
    """Attention with RoPE and grouped key/value heads; optionally q/k norms over the head dimension before RoPE."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        heads, kv_heads, bias = config.heads * config.head_dim, config.kv_heads * config.head_dim, config.qkv_bias
        self.q_proj = nn.Linear(config.width, heads, bias=bias)
        self.k_proj = nn.Linear(config.width, kv_heads, bias=bias)
        self.v_proj = nn.Linear(config.width, kv_heads, bias=bias)
        self.o_proj = nn.Linear(heads, config.width, bias=False)
        self.qknorm = QkNorm(config.head_dim) if config.qk_norm else None

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, Q, H] -> queries [B, Q, heads, D], keys and values [B, Q, kv_heads, D]; RoPE is applied to queries and keys."""
        batch, length, _ = x.shape
        dtype = self.q_proj.weight.dtype
        x = x.to(dtype)
        q, k, v = (p(x).reshape(batch, length, -1, self.config.head_dim) for p in (self.q_proj, self.k_proj, self.v_proj))
        if self.qknorm is not None:
            q, k = self.qknorm.query_norm(q), self.qknorm.key_norm(k)
        return apply_rope(q, cos, sin).to(dtype), apply_rope(k, cos, sin).to(dtype), v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, past: KeysValues | None, bias: Tensor) -> Tensor:
        """Attend from q [B, Q, heads, D] to the past, followed by k, v [B, Q, kv_heads, D]; `bias` is a `score_bias`."""
        batch, length, heads, dim = q.shape
        groups = heads // self.config.kv_heads
        # Queries that share a key/value head are rows of one product: [B, kv_heads, groups * Q, D].
        q = q.reshape(batch, length, self.config.kv_heads, groups, dim).permute(0, 2, 3, 1, 4)
        q = q.reshape(batch, self.config.kv_heads, groups * length, dim) * dim**-0.5
        keys, values = k.transpose(1, 2), v.transpose(1, 2)
        if past is not None:
            keys, values = torch.cat([past[0], keys], dim=2), torch.cat([past[1], values], dim=2)
        scores = (q @ keys.transpose(-1, -2)).reshape(batch, self.config.kv_heads, groups, length, -1).float()
        weights = (scores + bias).softmax(dim=-1).to(q.dtype)
        out = weights.reshape(batch, self.config.kv_heads, groups * length, -1) @ values
        out = out.reshape(batch, self.config.kv_heads, groups, length, dim).permute(0, 3, 1, 2, 4)
        result: Tensor = self.o_proj(out.reshape(batch, length, heads * dim))
        return result


class Mlp(nn.Module):
    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.width, config.mlp_width, bias=False)
        self.up_proj = nn.Linear(config.width, config.mlp_width, bias=False)
        self.down_proj = nn.Linear(config.mlp_width, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.gate_proj.weight.dtype)
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Layer(nn.Module):
    """A transformer layer, which normalises the input of each sublayer (`pre`) or its output (`output`)."""

    def __init__(self, config: TransformerConfig, attention: type[Attention] = Attention) -> None:
        super().__init__()
        self.config = config
        self.self_attn = attention(config)
        self.mlp = Mlp(config)
        self.input_layernorm = RmsNorm(config.width, config.norm_eps)
        self.post_attention_layernorm = RmsNorm(config.width, config.norm_eps)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, past: KeysValues | None, bias: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, Q, H], after the past -> x, keys and values [B, Q, kv_heads, D]; `bias` is a `score_bias`."""
        norm_input = self.config.norm_placement == "pre"
        q, k, v = self.self_attn.project(self.input_layernorm(x) if norm_input else x, cos, sin)
        attended = self.self_attn.attend(q, k, v, past, bias)
        if norm_input:
            x = x + attended.float()
            return x + self.mlp(self.post_attention_layernorm(x)).float(), k, v
        x = x + self.input_layernorm(attended)
        return x + self.post_attention_layernorm(self.mlp(x)), k, v


class Transformer(nn.Module):
    """The layers and the final norm; embeddings and head are elsewhere."""

    def __init__(self, config: TransformerConfig, attention: type[Attention] = Attention) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(Layer(config, attention) for _ in range(config.layers))
        self.norm = RmsNorm(config.width, config.norm_eps)

    def forward(self, x: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        """A whole sequence: x [B, Q, H], positions [B, Q], mask [B, Q, Q], true where a query sees a key -> [B, Q, H]."""
        cos, sin = rope_angles(positions, self.config.head_dim, self.config.rope_theta)
        bias = score_bias(mask)
        for layer in self.layers:
            x, _, _ = layer(x, cos, sin, None, bias)
        out: Tensor = self.norm(x)
        return out
