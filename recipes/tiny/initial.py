"""Initialises the tokenizer: the linear skips by PCA, and the convolutions beside them so that they add nothing."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tokenflow_export.models.tokenizer import TokenFlowTokenizer

__all__ = ["LATENT_NORM", "initialise"]

LATENT_NORM = 3.5
"""Mean length of a cell's pixel latent at first; more than 1, because unit codes of nine scales are added."""
_ZERO = ("q_bias", "v_bias", "in_proj_bias")
_NORMAL = ("class_embedding", "positional_embedding", "in_proj_weight", "cls_token", "pos_embed")


def initialise(model: TokenFlowTokenizer, pictures: Tensor) -> None:
    """Initialise all weights, with the pixel branch as a linear autoencoder of `pictures` [B, 3, H, W]."""
    for name, parameter in model.named_parameters():
        last = name.rsplit(".", 1)[-1]
        if last in _NORMAL:
            nn.init.normal_(parameter, std=0.02)
        elif last in _ZERO:
            nn.init.zeros_(parameter)
    components, mean, scale = _pca(pictures, model.config.pixel_encoder.stride, model.config.pixel_dim)
    encode, decode = model.encoder.skip, model.decoder.skip
    assert encode is not None and decode is not None
    assert encode.bias is not None and decode.bias is not None
    count = len(components)
    with torch.no_grad():
        for module in (model.encoder.conv_out, model.decoder.conv_out, encode, decode):
            module.weight.zero_()
            assert module.bias is not None
            module.bias.zero_()
        encode.weight[:count] = (components * scale).reshape(count, *encode.weight.shape[1:])
        encode.bias[:count] = -(components * scale) @ mean
        decode.weight[:, :count, 0, 0] = components.T / scale
        decode.bias[:] = mean
        for conv in (model.quant_conv, model.post_quant_conv):
            conv.weight.mul_(0.1)
            assert conv.bias is not None
            conv.bias.zero_()
            conv.weight[:count, :count, 0, 0] = torch.eye(count)


def _pca(pictures: Tensor, stride: int, count: int) -> tuple[Tensor, Tensor, float]:
    """Principal components [count, 3 * stride^2] of patches, their mean, and the factor to reach `LATENT_NORM`."""
    patches = nn.functional.unfold(pictures, stride, stride=stride).transpose(1, 2).flatten(0, 1)
    mean = patches.mean(0)
    centred = patches - mean
    components = torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -count:].T.flip(0)
    norm = (centred @ components.T).norm(dim=1).mean()
    return components, mean, float(LATENT_NORM / norm)
