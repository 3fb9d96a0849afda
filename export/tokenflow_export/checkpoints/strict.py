"""Strict comparison of a checkpoint's keys and shapes with the ones its model has."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["Shapes", "key_problems"]

Shapes = Mapping[str, tuple[int, ...]]


def key_problems(found: Shapes, expected: Shapes) -> str:
    """The first missing, unexpected and mis-shaped keys and how many there are of each, in words; empty when all agree."""
    missing = [key for key in expected if key not in found]
    extra = [key for key in found if key not in expected]
    misshaped = [
        f"{key} {list(found[key])} instead of {list(shape)}"
        for key, shape in expected.items()
        if found.get(key, shape) != shape
    ]
    kinds = {"missing": missing, "unexpected": extra, "mis-shaped": misshaped}
    return "; ".join(f"{len(keys)} {kind} (first: {', '.join(keys[:3])})" for kind, keys in kinds.items() if keys)
