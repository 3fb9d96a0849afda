"""Compares the keys and shapes of a checkpoint with those that its model has."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["Shapes", "key_problems"]

Shapes = Mapping[str, tuple[int, ...]]


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
