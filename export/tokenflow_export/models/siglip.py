"""The semantic encoder of `siglip_384`: the vision tower of SigLIP-so400m/14 up to the layer before the last.

The last layer, `post_layernorm` and the pooling head are never used, so they are not built. Keys are those of transformers
4.43.
"""

from __future__ import annotations

from torch import Tensor, nn

from tokenflow_export.models.config import SemanticEncoderConfig
from tokenflow_export.models.layers import Mlp, attend

__all__ = ["SiglipEncoder"]


class SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out_proj(attend(self.q_proj(x), self.k_proj(x), self.v_proj(x), self.heads))
        return out


class Layer(nn.Module):
    def __init__(self, config: SemanticEncoderConfig) -> None:
        super().__init__()
        self.self_attn = SelfAttention(config.width, config.heads)
        self.layer_norm1 = nn.LayerNorm(config.width, eps=1e-6)
        self.mlp = Mlp(config.width, config.mlp_width, approximate="tanh")
        self.layer_norm2 = nn.LayerNorm(config.width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        out: Tensor = x + self.mlp(self.layer_norm2(x))
        return out


class Embeddings(nn.Module):
    def __init__(self, config: SemanticEncoderConfig) -> None:
        super().__init__()
        self.patch_embedding = nn.Conv2d(3, config.width, config.patch_size, stride=config.patch_size)
        self.position_embedding = nn.Embedding(config.position_grid**2, config.width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embedding(x)
        return x.flatten(2).transpose(1, 2) + self.position_embedding.weight


class LayerStack(nn.Module):
    def __init__(self, config: SemanticEncoderConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))


class VisionModel(nn.Module):
    def __init__(self, config: SemanticEncoderConfig) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = LayerStack(config)


class SiglipEncoder(nn.Module):
    """x [B, 3, H, W], normalised by mean and std 0.5 of [0, 1] -> patch features [B, N, width]."""

    def __init__(self, config: SemanticEncoderConfig) -> None:
        super().__init__()
        self.vision_model = VisionModel(config)

    def forward(self, x: Tensor) -> Tensor:
        tokens: Tensor = self.vision_model.embeddings(x)
        for layer in self.vision_model.encoder.layers:
            tokens = layer(tokens)
        return tokens
