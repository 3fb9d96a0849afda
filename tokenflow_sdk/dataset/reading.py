"""Reads codes back from what `tokenflow tokenize` wrote."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from tokenflow_sdk.pictures.codes import Codes

__all__ = ["code_shards", "read_codes"]


def code_shards(path: str) -> list[str]:
    """The files of a job's output, in order: those of shards that are done."""
    raise NotImplementedError


def read_codes(
    path: str, *, errors: Literal["skip", "raise", "yield"] = "skip", rank: int = 0, world_size: int = 1
) -> Iterator[tuple[str, Codes | Any]]:
    """Keys and codes of a job's output, or of one of its files."""
    raise NotImplementedError
