"""Sizes of the bundled tokenizer, which is the released architecture made small."""

from __future__ import annotations

from tokenflow_export.models.config import SemanticDecoderConfig, SemanticEncoderConfig, TokenizerArchitecture, VqganConfig

__all__ = ["TINY"]

TINY = TokenizerArchitecture(
    variant="tiny",
    image_size=256,
    patch_nums=(1, 2, 4, 6, 8, 10, 12, 14, 16),
    semantic_encoder=SemanticEncoderConfig(
        kind="clip", width=128, layers=4, heads=4, mlp_width=512, patch_size=16, position_grid=16, projection_width=128
    ),
    pixel_encoder=VqganConfig(base_channels=32, blocks=1, multipliers=(1, 2, 4), latent_channels=64, patch=4, linear_skip=True),
    pixel_decoder=VqganConfig(base_channels=32, blocks=1, multipliers=(2, 4, 4), latent_channels=64, patch=4, linear_skip=True),
    semantic_decoder=SemanticDecoderConfig(width=128, out_width=112, mlp_width=512, position_grid=16, layers=2, heads=4),
    codebook_size=4096,
    semantic_dim=16,
    pixel_dim=12,
    pixel_weight=3.0,
)
"""The bundled tokenizer: 5 million weights in all. Its semantic features have the teacher's width of 112."""
