"""The shared quantizer as it is trained: residual search with a straight-through gradient, and replacement of codes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from tokenflow_export.models.config import TokenizerArchitecture
from tokenflow_export.models.tokenizer import TokenFlowTokenizer
from tokenflow_export.tokenizer.graphs import CodebookSearch

__all__ = ["Quantized", "TrainingQuantizer"]

COMMITMENT = 0.25


@dataclass(frozen=True)
class Quantized:
    """A quantized batch.

    Args:
        features: quantized feature [B, N, C], whose gradient goes to the latent.
        loss: of codebook and commitment.
        indices: code indices [B, L].
        cells: the residual cells [M, C] that were looked up.
    """

    features: Tensor
    loss: Tensor
    indices: Tensor
    cells: Tensor


class TrainingQuantizer:
    """Searches the codebooks of a model in training (`TokenFlowTokenizer.quantize`)."""

    def __init__(self, config: TokenizerArchitecture, device: torch.device) -> None:
        self.config = config
        with torch.device("meta"):
            shell = TokenFlowTokenizer(config)
        shell.quantize.to_empty(device="cpu")
        resizes = CodebookSearch(shell).to(device)
        self.resizes = {
            side: tuple(getattr(resizes, f"{way}_{side}", None) for way in ("down", "up")) for side in config.patch_nums
        }
        self.halves = [config.semantic_dim, config.pixel_dim]

    def _unit(self, cells: Tensor) -> Tensor:
        semantic, pixel = torch.split(cells, self.halves, dim=-1)
        return torch.cat([F.normalize(semantic, dim=-1), F.normalize(pixel, dim=-1)], dim=-1)

    def __call__(self, model: TokenFlowTokenizer, latent: Tensor, scales: int | None = None) -> Quantized:
        """Quantize a latent [B, N, C] with the `scales` coarsest scales (None: all)."""
        codebook = torch.cat(model.quantize.codebooks(), dim=1)
        weight = torch.cat([codebook.new_ones(self.halves[0]), codebook.new_full((self.halves[1],), self.config.pixel_weight)])
        searched = (codebook * weight).detach().T
        residual, out = latent.detach(), torch.zeros_like(latent)
        loss, found, seen = latent.new_zeros(()), [], []
        sides = self.config.patch_nums[:scales]
        for side in sides:
            down, up = self.resizes[side]
            cells = residual if down is None else down @ residual
            indices = (self._unit(cells) @ searched).argmax(dim=-1)
            rows = F.embedding(indices, codebook)
            out = out + (rows if up is None else up @ rows)
            residual = latent.detach() - out.detach()
            loss = loss + F.mse_loss(out, latent.detach()) + COMMITMENT * F.mse_loss(latent, out.detach())
            found.append(indices)
            seen.append(cells.flatten(0, 1))
        return Quantized(latent + (out - latent).detach(), loss / len(sides), torch.cat(found, dim=1), torch.cat(seen))

    def ideal_cells(self, latent: Tensor) -> Tensor:
        """The residual cells [M, C] that a search in a perfect codebook would look up, to initialise a codebook with."""
        residual, seen = latent.detach(), []
        for side in self.config.patch_nums:
            down, up = self.resizes[side]
            cells = residual if down is None else down @ residual
            rows = self._unit(cells)
            residual = residual - (rows if up is None else up @ rows)
            seen.append(cells.flatten(0, 1))
        return torch.cat(seen)

    def set_codes(self, model: TokenFlowTokenizer, codes: Tensor, cells: Tensor) -> None:
        """Replace rows `codes` [M] of the codebooks by residual cells [M, C]."""
        semantic, pixel = torch.split(self._unit(cells), self.halves, dim=-1)
        model.quantize.embedding_vqkd.weight.data[codes] = semantic
        model.quantize.embedding_vqgan.weight.data[codes] = pixel
