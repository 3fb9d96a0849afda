"""The multi-scale quantizer with a shared mapping (docs/model.md, section 2), as directly as it can be written.

It computes the distances to all codes and resizes with PyTorch. The graphs in `tokenflow_export.tokenizer.graphs` are compared
with it, in results and in time.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenflow_export.models.config import TokenizerArchitecture

__all__ = ["SharedQuantizer"]


class SharedQuantizer(nn.Module):
    """The search over a semantic and a pixel codebook. A code index names one row of both."""

    def __init__(self, config: TokenizerArchitecture) -> None:
        super().__init__()
        self.patch_nums = config.patch_nums
        self.semantic_dim = config.semantic_dim
        self.weights = (1.0, config.pixel_weight)
        self.embedding_vqkd = nn.Embedding(config.codebook_size, config.semantic_dim)
        self.embedding_vqgan = nn.Embedding(config.codebook_size, config.pixel_dim)

    def codebooks(self) -> tuple[Tensor, Tensor]:
        """The semantic codebook [K, semantic_dim] and the pixel codebook [K, pixel_dim], with rows of unit length."""
        return F.normalize(self.embedding_vqkd.weight, dim=-1), F.normalize(self.embedding_vqgan.weight, dim=-1)

    def distances(self, cells: Tensor) -> Tensor:
        """Squared distances [M, K] of cells [M, C] to all codes: the weighted sum over the two halves, each normalised."""
        total = torch.zeros(())
        halves = torch.split(cells, [self.semantic_dim, cells.shape[1] - self.semantic_dim], dim=1)
        for half, codebook, weight in zip(halves, self.codebooks(), self.weights, strict=True):
            z = F.normalize(half, dim=-1)
            total = total + weight * (z.square().sum(1, keepdim=True) + codebook.square().sum(1) - 2 * z @ codebook.T)
        return total

    def lookup(self, indices: Tensor) -> Tensor:
        """Code indices [B, s, s] -> rows of the codebooks as a map [B, C, s, s]."""
        rows = torch.cat([F.embedding(indices, codebook) for codebook in self.codebooks()], dim=-1)
        return rows.permute(0, 3, 1, 2)

    def encode(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Latent h [B, C, g, g] -> code indices int64 [B, L], quantized feature [B, C, g, g]."""
        residual, out, found = h, torch.zeros_like(h), []
        for side in self.patch_nums:
            cells = F.interpolate(residual, size=(side, side), mode="area").permute(0, 2, 3, 1)
            indices = self.distances(cells.reshape(-1, h.shape[1])).argmin(dim=1).view(-1, side, side)
            q = self.upsample(self.lookup(indices), h.shape[-1])
            out, residual = out + q, residual - q
            found.append(indices.flatten(1))
        return torch.cat(found, dim=1), out

    def decode(self, code_indices: Tensor) -> Tensor:
        """Code indices [B, l] of the coarsest scales -> quantized feature [B, C, g, g]."""
        grid, start, out = self.patch_nums[-1], 0, torch.zeros(())
        for side in self.patch_nums:
            if start == code_indices.shape[1]:
                break
            indices = code_indices[:, start : start + side * side].reshape(-1, side, side)
            out = out + self.upsample(self.lookup(indices), grid)
            start += side * side
        return out

    @staticmethod
    def upsample(x: Tensor, size: int) -> Tensor:
        return F.interpolate(x, size=(size, size), mode="bicubic", align_corners=False)
