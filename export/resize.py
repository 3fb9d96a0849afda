"""Resizes of fixed size as constant matrices: each is linear and separable, so one matrix a side says it all."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["map_matrix", "side_matrix"]


def side_matrix(source: int, target: int, mode: str) -> Tensor:
    """float32 [target, source]: the 1-D resize that `F.interpolate` performs along each side, `mode` area or bicubic."""
    basis = torch.eye(source, dtype=torch.float64)[None]
    if mode == "area":
        return F.adaptive_avg_pool1d(basis, target)[0].T.float().contiguous()
    # A picture constant along its width resizes along its height alone: bicubic weights sum to one.
    columns = basis[..., None].transpose(0, 1).expand(source, 1, source, source)
    resized = F.interpolate(columns, size=(target, source), mode=mode, align_corners=False)
    return resized[:, 0, :, 0].T.float().contiguous()


def map_matrix(source: int, target: int, mode: str) -> Tensor:
    """float32 [target**2, source**2]: the resize of a whole map, row-major."""
    side = side_matrix(source, target, mode).double()
    return torch.kron(side, side).float()
