"""Sizes of tokenizers and transformers, and the four released tokenizers (docs/model.md, section 1)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

__all__ = [
    "STANDARD",
    "VARIANTS",
    "SemanticDecoderConfig",
    "SemanticEncoderConfig",
    "TokenizerArchitecture",
    "TransformerConfig",
    "VqganConfig",
]


@dataclass(frozen=True)
class SemanticEncoderConfig:
    """Sizes of the semantic encoder (`encoder_vqkd`), a ViT.

    `position_grid` is the side of the released position table (0: no positions). `stem_widths` and `stem_depths` are those of
    the MBConv stages before the transformer of ViTamin. `unused_layers` come after the layer whose output is used: a released
    checkpoint has their weights, but they are neither built nor exported. The same is true of a projection to
    `projection_width`.
    """

    kind: Literal["clip", "vitamin", "siglip"]
    width: int
    layers: int
    heads: int
    mlp_width: int
    patch_size: int
    position_grid: int
    stem_widths: tuple[int, ...] = ()
    stem_depths: tuple[int, ...] = ()
    unused_layers: int = 0
    projection_width: int = 0


@dataclass(frozen=True)
class VqganConfig:
    """Sizes of a VQGAN encoder or decoder.

    Each level has `blocks` residual blocks (one more in a decoder) and `base_channels * multipliers[i]` channels. The finest
    level reads or writes patches of `patch` x `patch` pixels as channels (1 in the released tokenizers). With `linear_skip`, a
    linear map between the pixels of a cell and its latent is added to the output.
    """

    base_channels: int
    blocks: int
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    latent_channels: int = 256
    patch: int = 1
    linear_skip: bool = False

    @property
    def stride(self) -> int:
        """The side of a latent cell in pixels."""
        return int(self.patch * 2 ** (len(self.multipliers) - 1))


STANDARD = VqganConfig(base_channels=128, blocks=2)
"""The encoder and decoder of the released tokenizers, except for the larger decoder of `clipb_256`."""


@dataclass(frozen=True)
class SemanticDecoderConfig:
    """Sizes of the semantic decoder (`decoder_vqkd`, `decode_task_layer`), a small ViT."""

    width: int
    out_width: int
    mlp_width: int
    position_grid: int
    layers: int = 3
    heads: int = 12


@dataclass(frozen=True)
class TokenizerArchitecture:
    """Sizes of a whole tokenizer. `image_size` and `pixel_input_size` are in pixels, `grid` and `patch_nums` in cells.

    `pixel_weight` is the weight of the pixel distance in the codebook search; the weight of the semantic distance is 1.
    """

    variant: str
    image_size: int
    patch_nums: tuple[int, ...]
    semantic_encoder: SemanticEncoderConfig
    semantic_decoder: SemanticDecoderConfig
    pixel_encoder: VqganConfig = STANDARD
    pixel_decoder: VqganConfig = STANDARD
    preprocess: Literal["crop", "squash"] = "crop"
    codebook_size: int = 32768
    semantic_dim: int = 32
    pixel_dim: int = 8
    pixel_weight: float = 1.0

    @property
    def grid(self) -> int:
        """The side of the finest scale, and of the output of both encoders."""
        return self.patch_nums[-1]

    @property
    def pixel_input_size(self) -> int:
        """The side of the picture that the pixel encoder reads; in `siglip_384` it is 432 = 27 x 16, not 384."""
        return self.grid * self.pixel_encoder.stride

    @property
    def code_dim(self) -> int:
        return self.semantic_dim + self.pixel_dim

    @property
    def n_codes(self) -> int:
        return sum(side * side for side in self.patch_nums)

    @property
    def normalized_input(self) -> bool:
        """Whether the semantic encoder reads pixels normalised by mean and std (ViTamin, SigLIP), or x in [-1, 1] (CLIP)."""
        return self.semantic_encoder.kind != "clip"


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes of a language model's transformer.

    `norm_placement` is `pre` in Llama and Qwen2, and `output` in the TokenFlow text-to-image model.
    """

    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    norm_eps: float
    rope_theta: float
    norm_placement: Literal["output", "pre"]
    qk_norm: bool
    qkv_bias: bool


_CLIP = SemanticEncoderConfig(
    kind="clip", width=768, layers=12, heads=12, mlp_width=3072, patch_size=16, position_grid=14, projection_width=512
)
_VITAMIN = SemanticEncoderConfig(
    kind="vitamin",
    width=1152,
    layers=32,
    heads=16,
    mlp_width=2304,
    patch_size=16,
    position_grid=0,
    stem_widths=(192, 384),
    stem_depths=(2, 4),
)
_SIGLIP = SemanticEncoderConfig(
    kind="siglip", width=1152, layers=26, heads=16, mlp_width=4304, patch_size=14, position_grid=27, unused_layers=1
)
_CLIP_DECODER = SemanticDecoderConfig(width=768, out_width=512, mlp_width=3072, position_grid=14)
_VITAMIN_DECODER = SemanticDecoderConfig(width=1152, out_width=1152, mlp_width=4608, position_grid=16)
_SIGLIP_DECODER = replace(_VITAMIN_DECODER, position_grid=27)
_ENHANCED = VqganConfig(base_channels=256, blocks=4)
_PATCH_NUMS_14 = (1, 2, 4, 6, 8, 10, 12, 14)
_PATCH_NUMS_16 = (*_PATCH_NUMS_14, 16)
_PATCH_NUMS_27 = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 17, 22, 27)

VARIANTS: dict[str, TokenizerArchitecture] = {
    config.variant: config
    for config in (
        TokenizerArchitecture("clipb_224", 224, _PATCH_NUMS_14, _CLIP, _CLIP_DECODER),
        TokenizerArchitecture("clipb_256", 256, _PATCH_NUMS_16, _CLIP, _CLIP_DECODER, pixel_decoder=_ENHANCED),
        TokenizerArchitecture("vitamin_256", 256, _PATCH_NUMS_16, _VITAMIN, _VITAMIN_DECODER),
        TokenizerArchitecture("siglip_384", 384, _PATCH_NUMS_27, _SIGLIP, _SIGLIP_DECODER, preprocess="squash"),
    )
}
