"""Compares the keys and shapes of a checkpoint with those that its model has, and takes only plain floats for weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tokenflow_sdk.errors import CheckpointError

__all__ = ["Shapes", "as_float32", "key_problems", "require_float"]

Shapes = Mapping[str, tuple[int, ...]]

_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64, "F32", "F16", "BF16", "F64")
"""Of what a weight can be. Integers and floats of 8 bits are codes, which are no weights without their scales."""


def as_float32(tensor: Tensor, key: str, name: str) -> Tensor:
    """The weight `key` of the checkpoint `name`, as float32; without a copy if it is.

    Raises:
        CheckpointError: it is quantized, complex, sparse or without values, or has one that is not finite.
    """
    require_float(tensor.dtype, key, name)
    if tensor.layout != torch.strided or tensor.is_meta:
        kind = "without values" if tensor.is_meta else tensor.layout
        raise CheckpointError(f"{name}: {key} is {kind}, not a plain float.", "Give an unquantized checkpoint.")
    weight = tensor.detach().float()
    if not weight.isfinite().all():
        raise CheckpointError(f"{name}: {key} has values that are NaN or infinite.", "Download it again.")
    return weight


def require_float(dtype: torch.dtype | str, key: str, name: str) -> None:
    """Check what the weight `key` of the checkpoint `name` is stored in. safetensors names a dtype by a word of its own.

    Raises:
        CheckpointError: it is quantized or complex.
    """
    if dtype not in _FLOATS:
        raise CheckpointError(f"{name}: {key} is {dtype}, not a plain float.", "Give an unquantized checkpoint.")


def key_problems(found: Shapes, expected: Shapes) -> str:
    """Say how many keys are missing, unexpected and mis-shaped, and name the first of each. Empty when all agree."""
    missing = [key for key in expected if key not in found]
    extra = [key for key in found if key not in expected]
    misshaped = [
        f"{key} {list(found[key])} instead of {list(shape)}"
        for key, shape in expected.items()
        if found.get(key, shape) != shape
    ]
    kinds = {"missing": missing, "unexpected": extra, "mis-shaped": misshaped}
    return "; ".join(f"{len(keys)} {kind} (first: {', '.join(keys[:3])})" for kind, keys in kinds.items() if keys)
