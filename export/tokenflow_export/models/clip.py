"""The semantic encoder of `clipb_*`: OpenAI CLIP's visual tower without its projection `proj`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tokenflow_export.models.config import SemanticEncoderConfig
from tokenflow_export.models.layers import attend

__all__ = ["ClipEncoder"]


class PackedAttention(nn.Module):
    """Self-attention with the parameters of nn.MultiheadAttention: queries, keys and values in one `in_proj`."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = nn.functional.linear(x, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        out: Tensor = self.out_proj(attend(q, k, v, self.heads))
        return out


class QuickGelu(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class Block(nn.Module):
    def __init__(self, width: int, heads: int, mlp_width: int) -> None:
        super().__init__()
        self.attn = PackedAttention(width, heads)
        self.ln_1 = nn.LayerNorm(width, eps=1e-5)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, mlp_width), "c_proj": nn.Linear(mlp_width, width)})
        self.act = QuickGelu()
        self.ln_2 = nn.LayerNorm(width, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        out: Tensor = x + self.mlp["c_proj"](self.act(self.mlp["c_fc"](self.ln_2(x))))
        return out


class Transformer(nn.Module):
    def __init__(self, config: SemanticEncoderConfig) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(Block(config.width, config.heads, config.mlp_width) for _ in range(config.layers))


class ClipEncoder(nn.Module):
    """x [B, 3, H, W] in [-1, 1], without CLIP's mean and std -> patch features [B, N, width].

    `positional_embedding` is the table for this grid; a released table of another grid is resized when it is loaded.
    """

    def __init__(self, config: SemanticEncoderConfig, grid: int) -> None:
        super().__init__()
        width = config.width
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.positional_embedding = nn.Parameter(torch.empty(grid * grid + 1, width))
        self.conv1 = nn.Conv2d(3, width, config.patch_size, stride=config.patch_size, bias=False)
        self.ln_pre = nn.LayerNorm(width, eps=1e-5)
        self.transformer = Transformer(config)
        self.ln_post = nn.LayerNorm(width, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        tokens: Tensor = self.conv1(x).flatten(2).transpose(1, 2)
        first = self.class_embedding.expand(tokens.shape[0], 1, -1)
        tokens = self.ln_pre(torch.cat([first, tokens], dim=1) + self.positional_embedding)
        for block in self.transformer.resblocks:
            tokens = block(tokens)
        out: Tensor = self.ln_post(tokens[:, 1:])
        return out
