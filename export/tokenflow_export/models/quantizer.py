"""The shared-mapping multi-scale quantizer (paper section 3.2), written the straightforward way.

Full distances, library resizes, one scale after the other: this is the reference that
`tokenflow_export.tokenizer.graphs` is checked and timed against.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenflow_export.models.config import TokenizerArchitecture

__all__ = ["SharedQuantizer"]


class SharedQuantizer(nn.Module):
    """Two codebooks of one length; an index names a row of both."""

    def __init__(self, config: TokenizerArchitecture) -> None:
        super().__init__()
        self.patch_nums = config.patch_nums
        self.semantic_dim = config.semantic_dim
        self.weights = (1.0, config.pixel_weight)
        self.embedding_vqkd = nn.Embedding(config.codebook_size, config.semantic_dim)
        self.embedding_vqgan = nn.Embedding(config.codebook_size, config.pixel_dim)

    def codebooks(self) -> tuple[Tensor, Tensor]:
        """Semantic [K, 32] and pixel [K, 8] codebook, rows of unit length."""
        return F.normalize(self.embedding_vqkd.weight, dim=-1), F.normalize(self.embedding_vqgan.weight, dim=-1)

    def distances(self, cells: Tensor) -> Tensor:
        """Squared distances [M, K] of unnormalised cells [M, 40] to every code, both halves added by their weights."""
        total = torch.zeros(())
        halves = torch.split(cells, [self.semantic_dim, cells.shape[1] - self.semantic_dim], dim=1)
        for half, codebook, weight in zip(halves, self.codebooks(), self.weights, strict=True):
            z = F.normalize(half, dim=-1)
            total = total + weight * (z.square().sum(1, keepdim=True) + codebook.square().sum(1) - 2 * z @ codebook.T)
        return total

    def lookup(self, indices: Tensor) -> Tensor:
        """Indices [B, s, s] -> both halves as a map [B, 40, s, s]."""
        rows = torch.cat([F.embedding(indices, codebook) for codebook in self.codebooks()], dim=-1)
        return rows.permute(0, 3, 1, 2)

    def encode(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """h [B, 40, g, g] -> code indices int64 [B, L], quantized feature [B, 40, g, g]."""
        residual, out, found = h, torch.zeros_like(h), []
        for side in self.patch_nums:
            cells = F.interpolate(residual, size=(side, side), mode="area").permute(0, 2, 3, 1)
            indices = self.distances(cells.reshape(-1, h.shape[1])).argmin(dim=1).view(-1, side, side)
            q = self.upsample(self.lookup(indices), h.shape[-1])
            out, residual = out + q, residual - q
            found.append(indices.flatten(1))
        return torch.cat(found, dim=1), out

    def decode(self, code_indices: Tensor) -> Tensor:
        """Code indices [B, l], l whole scales -> quantized feature [B, 40, g, g]."""
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
