"""The optimizers of the trainings: Muon for matrices and kernels, AdamW for all other weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["KernelMuon", "Optimizers", "transformer_optimizers"]


class Optimizers:
    """Several optimizers as one, each of other weights."""

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        self.parts = parts

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for part in self.parts for group in part.param_groups]

    def zero_grad(self, set_to_none: bool = True) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none)

    def step(self) -> None:
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for part, kept in zip(self.parts, state["parts"], strict=True):
            part.load_state_dict(kept)


class KernelMuon(torch.optim.Muon):
    """Muon for the kernels [O, I, H, W] of convolutions, each as a matrix [O, H * W * I], because it takes matrices only.

    The matrices share the kernels' memory, which must be channels-last.
    """

    def __init__(self, kernels: Sequence[nn.Parameter], rate: float) -> None:
        self.kernels = kernels
        self.matrices = [nn.Parameter(_matrix(kernel.detach())) for kernel in kernels]
        super().__init__(self.matrices, lr=rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")

    def zero_grad(self, set_to_none: bool = True) -> None:
        for kernel in self.kernels:
            kernel.grad = None

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for kernel, matrix in zip(self.kernels, self.matrices, strict=True):
            assert kernel.grad is not None
            matrix.grad = _matrix(kernel.grad.contiguous(memory_format=torch.channels_last))
        super().step()  # type: ignore[no-untyped-call]


def _matrix(kernel: Tensor) -> Tensor:
    """A kernel in channels-last memory as a matrix, without a copy."""
    return kernel.permute(0, 2, 3, 1).view(len(kernel), -1)


def transformer_optimizers(transformer: nn.Module, others: Iterable[nn.Module], rate: float) -> Optimizers:
    """Muon for the matrices of a transformer, from which it learns more in a step, and AdamW for all other weights."""
    matrices = [weight for weight in transformer.parameters() if weight.ndim == 2]
    rest = [weight for weight in transformer.parameters() if weight.ndim != 2]
    rest += [weight for module in others for weight in module.parameters()]
    return Optimizers(
        [
            torch.optim.Muon(matrices, lr=rate, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.98), weight_decay=0.1, fused=True),
        ]
    )
