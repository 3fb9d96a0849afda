"""The projector of a language model (`mm_projector`): from the quantized feature's width C to the hidden width H."""

from __future__ import annotations

import torch
from torch import nn

from tokenflow_export.checkpoints.hf_directory import HfDirectory

__all__ = ["projector", "projector_shapes"]


def projector_shapes(width: int, code_dim: int) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of the projector by its key in a released directory."""
    return {
        "model.mm_projector.0.weight": (width, code_dim),
        "model.mm_projector.0.bias": (width,),
        "model.mm_projector.2.weight": (width, width),
        "model.mm_projector.2.bias": (width,),
    }


def projector(directory: HfDirectory) -> nn.Sequential:
    """Build the projector of a checkpoint: Linear, GELU, Linear."""
    first, second = (directory.tensor(f"model.mm_projector.{i}.weight") for i in (0, 2))
    with torch.device("meta"):
        module = nn.Sequential(nn.Linear(*first.shape[::-1]), nn.GELU(), nn.Linear(*second.shape[::-1]))
    biases = {f"{i}.bias": directory.tensor(f"model.mm_projector.{i}.bias") for i in (0, 2)}
    module.load_state_dict({"0.weight": first, "2.weight": second} | biases, strict=True, assign=True)
    return module.eval().requires_grad_(False)
