"""The semantic encoder of `vitamin_256`: ViTamin-XL (arXiv 2404.02132), under the keys of timm 1.0.9.

Two MBConv stages and a strided convolution reduce the picture to 1/16 of its side. A transformer follows, without positions,
class token and final norm.
"""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional as F

from tokenflow_export.models.config import SemanticEncoderConfig
from tokenflow_export.models.layers import attend

__all__ = ["VitaminEncoder"]


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of a map [B, channels, H, W]."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x.permute(0, 2, 3, 1))
        return x.permute(0, 3, 1, 2)


class Stem(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, channels, 3, stride=2, padding=1)
        self.norm1 = ChannelNorm(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv2(F.gelu(self.norm1(self.conv1(x))))
        return out


class DownsampleShortcut(nn.Module):
    """3x3 average pool of stride 2 that does not count padding, then a 1x1 convolution if the number of channels changes."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.pool = nn.AvgPool2d(3, stride=2, padding=1, count_include_pad=False)
        self.expand = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.expand(self.pool(x))
        return out


class MbConv(nn.Module):
    """Inverted bottleneck with a norm before it and four times the output's channels inside."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        middle = 4 * out_channels
        self.shortcut = DownsampleShortcut(in_channels, out_channels) if stride == 2 else nn.Identity()
        self.pre_norm = ChannelNorm(in_channels)
        self.conv1_1x1 = nn.Conv2d(in_channels, middle, 1)
        self.conv2_kxk = nn.Conv2d(middle, middle, 3, stride=stride, padding=1, groups=middle)
        self.conv3_1x1 = nn.Conv2d(middle, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = F.gelu(self.conv1_1x1(self.pre_norm(x)))
        out: Tensor = self.conv3_1x1(F.gelu(self.conv2_kxk(h))) + self.shortcut(x)
        return out


class Pool(nn.Module):
    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(in_channels)
        self.proj = nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.proj(self.norm(x))
        return out


class Backbone(nn.Module):
    def __init__(self, config: SemanticEncoderConfig) -> None:
        super().__init__()
        widths = config.stem_widths
        self.stem = Stem(widths[0])
        steps = zip(pairwise((widths[0], *widths)), config.stem_depths, strict=True)
        self.stages = nn.ModuleList(
            nn.Sequential(*(MbConv(before if i == 0 else after, after, 2 if i == 0 else 1) for i in range(depth)))
            for (before, after), depth in steps
        )
        self.pool = Pool(widths[-1], config.width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        out: Tensor = self.pool(x)
        return out


class PatchEmbed(nn.Module):
    def __init__(self, config: SemanticEncoderConfig) -> None:
        super().__init__()
        self.backbone = Backbone(config)

    def forward(self, x: Tensor) -> Tensor:
        x = self.backbone(x)
        return x.flatten(2).transpose(1, 2)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        out: Tensor = self.proj(attend(q, k, v, self.heads))
        return out


class GegluMlp(nn.Module):
    """w2(gelu(w0 n) * w1 n) with n = norm(x). This norm comes in addition to the block's `norm2`."""

    def __init__(self, width: int, mlp_width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.w0 = nn.Linear(width, mlp_width)
        self.w1 = nn.Linear(width, mlp_width)
        self.w2 = nn.Linear(mlp_width, width)

    def forward(self, x: Tensor) -> Tensor:
        n = self.norm(x)
        out: Tensor = self.w2(F.gelu(self.w0(n)) * self.w1(n))
        return out


class Block(nn.Module):
    def __init__(self, config: SemanticEncoderConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, eps=1e-6)
        self.attn = Attention(config.width, config.heads)
        self.norm2 = nn.LayerNorm(config.width, eps=1e-6)
        self.mlp = GegluMlp(config.width, config.mlp_width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class VitaminEncoder(nn.Module):
    """x [B, 3, H, W], normalised by CLIP's mean and std of [0, 1] -> patch features [B, N, width]."""

    def __init__(self, config: SemanticEncoderConfig) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))

    def forward(self, x: Tensor) -> Tensor:
        tokens: Tensor = self.patch_embed(x)
        for block in self.blocks:
            tokens = block(tokens)
        return tokens
