"""The semantic decoder (`decoder_vqkd`): a small ViT like BEiT's over the semantic half of the quantized feature."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tokenflow_export.models.config import SemanticDecoderConfig
from tokenflow_export.models.layers import Mlp, attend

__all__ = ["SemanticDecoder"]


class Attention(nn.Module):
    """Self-attention whose queries and values have biases, `q_bias` and `v_bias`, and whose keys have none."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_bias = nn.Parameter(torch.empty(width))
        self.v_bias = nn.Parameter(torch.empty(width))
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        out: Tensor = self.proj(attend(q + self.q_bias, k, v + self.v_bias, self.heads))
        return out


class Block(nn.Module):
    def __init__(self, config: SemanticDecoderConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, eps=1e-6)
        self.attn = Attention(config.width, config.heads)
        self.norm2 = nn.LayerNorm(config.width, eps=1e-6)
        self.mlp = Mlp(config.width, config.mlp_width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class PatchEmbed(nn.Module):
    def __init__(self, in_channels: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(x)
        return x.flatten(2).transpose(1, 2)


class SemanticDecoder(nn.Module):
    """Semantic half [B, semantic_dim, g, g] -> patch features [B, g * g, width], which `decode_task_layer` reads."""

    def __init__(self, config: SemanticDecoderConfig, in_channels: int, grid: int) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.empty(1, 1, config.width))
        self.pos_embed = nn.Parameter(torch.empty(1, grid * grid + 1, config.width))
        self.patch_embed = PatchEmbed(in_channels, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.fc_norm = nn.LayerNorm(config.width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        tokens: Tensor = self.patch_embed(x)
        tokens = torch.cat([self.cls_token.expand(tokens.shape[0], -1, -1), tokens], dim=1) + self.pos_embed
        for block in self.blocks:
            tokens = block(tokens)
        out: Tensor = self.fc_norm(tokens[:, 1:])
        return out
