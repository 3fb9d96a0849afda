"""The whole tokenizer: two encoders, the shared quantizer, two decoders (docs/model.md, sections 2 and 3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenflow_export.models.clip import ClipEncoder
from tokenflow_export.models.config import TokenizerArchitecture
from tokenflow_export.models.quantizer import SharedQuantizer
from tokenflow_export.models.semantic_decoder import SemanticDecoder
from tokenflow_export.models.siglip import SiglipEncoder
from tokenflow_export.models.vitamin import VitaminEncoder
from tokenflow_export.models.vqgan import VqganDecoder, VqganEncoder

__all__ = ["TokenFlowTokenizer", "to_pixels", "to_unit_range"]


def to_unit_range(images: Tensor) -> Tensor:
    """u8 [B, H, W, 3] -> float32 [B, 3, H, W] in [-1, 1]. It casts first, because engines do nothing else with u8."""
    return images.float().permute(0, 3, 1, 2) / 127.5 - 1


def to_pixels(y: Tensor) -> Tensor:
    """Decoder output y [B, 3, H, W] -> u8 [B, H, W, 3]: clamp(127.5 y + 128, 0, 255), truncated."""
    return (127.5 * y + 128).clamp(0, 255).permute(0, 2, 3, 1).to(torch.uint8)


class ScalingLayer(nn.Module):
    """Maps [-1, 1] to [0, 1] (clamped) and normalises with the buffers `shift` (mean) and `scale` (std)."""

    shift: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.empty(1, 3, 1, 1))
        self.register_buffer("scale", torch.empty(1, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (((x + 1) / 2).clamp(0, 1) - self.shift) / self.scale


def _task_layer(width: int, out_width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, out_width))


class TokenFlowTokenizer(nn.Module):
    """A tokenizer under the released state-dict keys.

    Its position tables have its own grid; `checkpoints.tokenizer.load_model` resizes released tables of another grid.
    """

    def __init__(self, config: TokenizerArchitecture) -> None:
        super().__init__()
        self.config = config
        semantic, decoder = config.semantic_encoder, config.semantic_decoder
        self.encoder = VqganEncoder(config.pixel_encoder)
        self.decoder = VqganDecoder(config.pixel_decoder)
        self.quantize = SharedQuantizer(config)
        self.quant_conv = nn.Conv2d(config.pixel_encoder.latent_channels, config.pixel_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.pixel_dim, config.pixel_decoder.latent_channels, 1)
        self.encoder_vqkd: nn.Module
        if semantic.kind == "clip":
            self.encoder_vqkd = ClipEncoder(semantic, config.grid)
        elif semantic.kind == "vitamin":
            self.encoder_vqkd = VitaminEncoder(semantic)
        else:
            self.encoder_vqkd = SiglipEncoder(semantic)
        self.scaling_layer = ScalingLayer() if config.normalized_input else nn.Identity()
        self.decoder_vqkd = SemanticDecoder(decoder, config.semantic_dim, config.grid)
        self.encode_task_layer = _task_layer(semantic.width, config.semantic_dim)
        self.decode_task_layer = _task_layer(decoder.width, decoder.out_width)

    def semantic_branch(self, x: Tensor) -> Tensor:
        """x [B, 3, H, W] -> semantic latent [B, N, semantic_dim]."""
        out: Tensor = self.encode_task_layer(self.encoder_vqkd(self.scaling_layer(x)))
        return out

    def pixel_branch(self, x: Tensor) -> Tensor:
        """x [B, 3, H, W] -> pixel latent [B, pixel_dim, g, g]."""
        out: Tensor = self.quant_conv(self.encoder(self._resized(x, self.config.pixel_input_size)))
        return out

    def latent(self, x: Tensor) -> Tensor:
        """x [B, 3, H, W] in [-1, 1] -> latent [B, C, g, g], which the quantizer reads."""
        grid = self.config.grid
        semantic = self.semantic_branch(x).transpose(1, 2).reshape(x.shape[0], -1, grid, grid)
        return torch.cat([semantic, self.pixel_branch(x)], dim=1)

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Pictures u8 [B, H, W, 3] -> code indices int64 [B, L], quantized feature [B, C, g, g]."""
        return self.quantize.encode(self.latent(to_unit_range(images)))

    def decode(self, code_indices: Tensor) -> Tensor:
        """Code indices [B, l] of the coarsest scales -> pictures u8 [B, H, W, 3]."""
        pixel = self.quantize.decode(code_indices)[:, self.config.semantic_dim :]
        return to_pixels(self._resized(self.decoder(self.post_quant_conv(pixel)), self.config.image_size))

    def semantic(self, code_indices: Tensor) -> Tensor:
        """Code indices [B, l] of the coarsest scales -> semantic features [B, g * g, out_width]."""
        half = self.quantize.decode(code_indices)[:, : self.config.semantic_dim]
        features: Tensor = self.decode_task_layer(self.decoder_vqkd(half))
        return features

    @staticmethod
    def _resized(x: Tensor, size: int) -> Tensor:
        if x.shape[-1] == size:
            return x
        return F.interpolate(x, size=(size, size), mode="bicubic", align_corners=False)
