"""The VQGAN encoder and decoder of the pixel branch, as in taming-transformers, with the keys of LlamaGen."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from tokenflow_export.models.config import VqganConfig
from tokenflow_export.models.layers import attend

__all__ = ["VqganDecoder", "VqganEncoder"]


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6)


class ResidualBlock(nn.Module):
    """Norm, swish and convolution, twice, beside a shortcut, which is a 1x1 convolution if the number of channels changes."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = _norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = _norm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        out: Tensor = (x if self.nin_shortcut is None else self.nin_shortcut(x)) + h
        return out


class AttentionBlock(nn.Module):
    """Single-head self-attention over the cells of a map, with 1x1 convolutions as projections."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = _norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (conv(h).flatten(2).transpose(1, 2) for conv in (self.q, self.k, self.v))
        out = attend(q, k, v, heads=1)
        result: Tensor = x + self.proj_out(out.transpose(1, 2).reshape(x.shape))
        return result


class Downsample(nn.Module):
    """Halves the side: pads one column right and one row at the bottom with zeros, then convolves 3x3 with stride 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)))
        return out


class Upsample(nn.Module):
    """Doubles the side by nearest neighbour, then convolves 3x3."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return out


class Level(nn.Module):
    """The residual blocks of one resolution, each followed by attention if asked for, and the resize to the next resolution."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        blocks: int,
        attention: bool,
        downsample: bool = False,
        upsample: bool = False,
    ) -> None:
        super().__init__()
        self.res = nn.ModuleList(ResidualBlock(out_channels if i else in_channels, out_channels) for i in range(blocks))
        self.attn = nn.ModuleList(AttentionBlock(out_channels) for _ in range(blocks if attention else 0))
        self.downsample = Downsample(out_channels) if downsample else None
        self.upsample = Upsample(out_channels) if upsample else None

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.res):
            x = block(x)
            if self.attn:
                x = self.attn[i](x)
        for resize in (self.downsample, self.upsample):
            if resize is not None:
                x = resize(x)
        return x


def _middle(channels: int) -> nn.Sequential:
    return nn.Sequential(ResidualBlock(channels, channels), AttentionBlock(channels), ResidualBlock(channels, channels))


class VqganEncoder(nn.Module):
    """x [B, 3, H, W] in [-1, 1] -> [B, latent_channels, H / stride, W / stride]."""

    def __init__(self, config: VqganConfig) -> None:
        super().__init__()
        widths = [config.base_channels * m for m in config.multipliers]
        self.patch = config.patch
        self.conv_in = nn.Conv2d(3 * config.patch**2, config.base_channels, 3, padding=1)
        self.conv_blocks = nn.ModuleList()
        channels, last = config.base_channels, len(widths) - 1
        for i, width in enumerate(widths):
            self.conv_blocks.append(Level(channels, width, config.blocks, attention=i == last, downsample=i != last))
            channels = width
        self.mid = _middle(channels)
        self.norm_out = _norm(channels)
        self.conv_out = nn.Conv2d(channels, config.latent_channels, 3, padding=1)
        self.skip = nn.Conv2d(3, config.latent_channels, config.stride, config.stride) if config.linear_skip else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(F.pixel_unshuffle(x, self.patch) if self.patch > 1 else x)
        for level in self.conv_blocks:
            h = level(h)
        out: Tensor = self.conv_out(F.silu(self.norm_out(self.mid(h))))
        if self.skip is not None:
            out = out + self.skip(x)
        return out


class VqganDecoder(nn.Module):
    """[B, latent_channels, g, g] -> picture [B, 3, stride * g, stride * g], about in [-1, 1]."""

    def __init__(self, config: VqganConfig) -> None:
        super().__init__()
        widths = [config.base_channels * m for m in reversed(config.multipliers)]
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid = _middle(widths[0])
        self.conv_blocks = nn.ModuleList()
        channels, last = widths[0], len(widths) - 1
        for i, width in enumerate(widths):
            self.conv_blocks.append(Level(channels, width, config.blocks + 1, attention=i == 0, upsample=i != last))
            channels = width
        self.norm_out = _norm(channels)
        self.patch, self.stride = config.patch, config.stride
        self.conv_out = nn.Conv2d(channels, 3 * config.patch**2, 3, padding=1)
        self.skip = nn.Conv2d(config.latent_channels, 3 * config.stride**2, 1) if config.linear_skip else None

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid(self.conv_in(z))
        for level in self.conv_blocks:
            h = level(h)
        out: Tensor = self.conv_out(F.silu(self.norm_out(h)))
        out = F.pixel_shuffle(out, self.patch) if self.patch > 1 else out
        return out if self.skip is None else out + F.pixel_shuffle(self.skip(z), self.stride)
