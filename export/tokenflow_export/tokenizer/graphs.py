"""The graphs of a tokenizer: each module computes a function of the PyTorch model in a form that engines run fast.

- Pictures go in and out as u8.
- A resize of fixed size is a product with a constant matrix (`tokenflow_sdk.pictures.resize`).
- Both halves of a cell have unit length, so the nearest code is the one with the largest inner product with the codebook, whose
  pixel half is multiplied by `pixel_weight`. That takes one product and one ArgMax for each scale, lowest index first.
- In the decoders the codes of all scales are resized and added by one product, with the resize matrices side by side.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from tokenflow_export.models.tokenizer import TokenFlowTokenizer, to_pixels, to_unit_range
from tokenflow_export.tracing.resizes import map_matrix
from tokenflow_sdk.pictures.resize import area_matrix, bicubic_matrix

__all__ = ["DecodeGraph", "EncodeGraph", "FeaturesGraph", "SemanticGraph"]


def _constant(matrix: NDArray[np.float64]) -> Tensor:
    return torch.from_numpy(matrix.astype(np.float32))


def _of_map(side: NDArray[np.float64]) -> Tensor:
    """The resize matrix of a row-major map, from that of one side. `tracing.compress_weights` recognises such matrices."""
    return torch.from_numpy(map_matrix(side))


class SeparableResize(nn.Module):
    """Bicubic resize of maps from side `source` to side `target`: [B, channels, s, s] -> [B, channels, t, t]."""

    def __init__(self, source: int, target: int) -> None:
        super().__init__()
        self.matrix: Tensor | None
        self.register_buffer("matrix", _constant(bicubic_matrix(source, target)) if source != target else None)

    def forward(self, x: Tensor) -> Tensor:
        return x if self.matrix is None else self.matrix @ x @ self.matrix.T


class CodebookSearch(nn.Module):
    """Latent [B, g * g, C] -> code indices int32 [B, L], quantized feature [B, g * g, C] (docs/model.md, section 2)."""

    codebook: Tensor
    codebook_t: Tensor

    def __init__(self, model: TokenFlowTokenizer) -> None:
        super().__init__()
        config = model.config
        self.patch_nums = config.patch_nums
        self.halves = [config.semantic_dim, config.pixel_dim]
        semantic, pixel = model.quantize.codebooks()
        self.register_buffer("codebook", torch.cat([semantic, pixel], dim=1))
        self.register_buffer("codebook_t", torch.cat([semantic, config.pixel_weight * pixel], dim=1).T.contiguous())
        for side in config.patch_nums:
            if side != config.grid:
                self.register_buffer(f"down_{side}", _of_map(area_matrix(config.grid, side)))
                self.register_buffer(f"up_{side}", _of_map(bicubic_matrix(side, config.grid)))

    def forward(self, residual: Tensor) -> tuple[Tensor, Tensor]:
        found: list[Tensor] = []
        out: Tensor | None = None
        for side in self.patch_nums:
            down, up = getattr(self, f"down_{side}", None), getattr(self, f"up_{side}", None)
            cells = residual if down is None else down @ residual
            semantic, pixel = cells.split(self.halves, dim=-1)
            unit = torch.cat([F.normalize(semantic, dim=-1), F.normalize(pixel, dim=-1)], dim=-1)
            indices = (unit @ self.codebook_t).argmax(dim=-1)
            rows = F.embedding(indices, self.codebook)
            q = rows if up is None else up @ rows
            out = q if out is None else out + q
            residual = residual - q
            found.append(indices)
        assert out is not None
        return torch.cat(found, dim=1).to(torch.int32), out


class EncodeGraph(nn.Module):
    """images u8 [B, H, W, 3] -> code_indices int32 [B, L], features and latent float32 [B, C, g, g].

    The latent, which the codebook search reads, is an output so that engines can be compared teacher-forced. It costs nothing
    when it is not asked for.
    """

    def __init__(self, model: TokenFlowTokenizer) -> None:
        super().__init__()
        self.config = model.config
        self.scaling_layer, self.encoder_vqkd = model.scaling_layer, model.encoder_vqkd
        self.encode_task_layer = model.encode_task_layer
        self.resize = SeparableResize(model.config.image_size, model.config.pixel_input_size)
        self.encoder, self.quant_conv = model.encoder, model.quant_conv
        self.search = CodebookSearch(model)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = to_unit_range(images)
        semantic = self.encode_task_layer(self.encoder_vqkd(self.scaling_layer(x)))
        pixel = self.quant_conv(self.encoder(self.resize(x))).flatten(2).transpose(1, 2)
        latent = torch.cat([semantic, pixel], dim=-1)
        code_indices, features = self.search(latent)
        return code_indices, self._as_map(features), self._as_map(latent)

    def _as_map(self, cells: Tensor) -> Tensor:
        return cells.transpose(1, 2).reshape(-1, self.config.code_dim, self.config.grid, self.config.grid)


class CodeSum(nn.Module):
    """code_indices int32 [B, L] -> quantized feature [B, g * g, stop - start]: columns `start` to `stop` of the codebook.

    The codes of each scale are resized to the finest scale and added. An index of -1 adds nothing.
    """

    codebook: Tensor
    up: Tensor

    def __init__(self, model: TokenFlowTokenizer, start: int, stop: int) -> None:
        super().__init__()
        config = model.config
        codebook = torch.cat(model.quantize.codebooks(), dim=1)[:, start:stop]
        self.absent = config.codebook_size
        self.register_buffer("codebook", torch.cat([codebook, torch.zeros(1, stop - start)]))
        self.register_buffer("up", torch.cat([_of_map(bicubic_matrix(s, config.grid)) for s in config.patch_nums], dim=1))

    def forward(self, code_indices: Tensor) -> Tensor:
        rows = torch.where(code_indices < 0, self.absent, code_indices)
        return self.up @ F.embedding(rows, self.codebook)


class FeaturesGraph(nn.Module):
    """code_indices int32 [B, L] -> features float32 [B, g * g, C], which the projector of a language model reads."""

    def __init__(self, model: TokenFlowTokenizer) -> None:
        super().__init__()
        self.sum = CodeSum(model, 0, model.config.code_dim)

    def forward(self, code_indices: Tensor) -> Tensor:
        features: Tensor = self.sum(code_indices)
        return features


class DecodeGraph(nn.Module):
    """code_indices int32 [B, L] -> images u8 [B, H, W, 3]."""

    def __init__(self, model: TokenFlowTokenizer) -> None:
        super().__init__()
        self.grid, self.pixel_dim = model.config.grid, model.config.pixel_dim
        self.sum = CodeSum(model, model.config.semantic_dim, model.config.code_dim)
        self.post_quant_conv, self.decoder = model.post_quant_conv, model.decoder
        self.resize = SeparableResize(model.config.pixel_input_size, model.config.image_size)

    def forward(self, code_indices: Tensor) -> Tensor:
        pixel = self.sum(code_indices).transpose(1, 2).reshape(-1, self.pixel_dim, self.grid, self.grid)
        return to_pixels(self.resize(self.decoder(self.post_quant_conv(pixel))))


class SemanticGraph(nn.Module):
    """code_indices int32 [B, L] -> semantic features float32 [B, g * g, out_width]."""

    def __init__(self, model: TokenFlowTokenizer) -> None:
        super().__init__()
        self.grid, self.semantic_dim = model.config.grid, model.config.semantic_dim
        self.sum = CodeSum(model, 0, model.config.semantic_dim)
        self.decoder_vqkd, self.decode_task_layer = model.decoder_vqkd, model.decode_task_layer

    def forward(self, code_indices: Tensor) -> Tensor:
        half = self.sum(code_indices).transpose(1, 2).reshape(-1, self.semantic_dim, self.grid, self.grid)
        features: Tensor = self.decode_task_layer(self.decoder_vqkd(half))
        return features
