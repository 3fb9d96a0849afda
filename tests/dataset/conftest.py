from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from tokenflow_sdk import Codes
from tokenflow_sdk.dataset.outputs import Record, Stamp
from tokenflow_sdk.pictures.preparation import Preparation

PREPARATION = Preparation("crop", "srgb")


@pytest.fixture(params=["local", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path, memory: str) -> str:
    """An empty place, once a local directory and once one of fsspec's."""
    return str(tmp_path) if request.param == "local" else memory


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[str]:
    """An address of fsspec's file system in memory, where no other test has files."""
    yield f"memory://{tmp_path.name}"
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


@pytest.fixture
def stamp() -> Stamp:
    """Of three of the four scales of a tokenizer, 14 codes a picture, with a map of 2 x 2 x 3 features."""
    return Stamp("12" * 32, "demo", "ab" * 8, 32768, (1, 2, 3, 4), 3, PREPARATION, {"features": (3, 2, 2)})


@pytest.fixture
def records() -> Callable[[int], list[Record]]:
    """So many rows, of which every third is bad."""

    def make(count: int) -> list[Record]:
        rng = np.random.default_rng(count)
        good = [
            Record(
                f"photos/{i}.v2.jpg",
                Codes(rng.integers(0, 32768, 14), (1, 2, 3, 4), 32768, "demo", "ab" * 8, PREPARATION),
                640 + i,
                480,
                f"{i:064x}",
                extra={"features": rng.normal(size=(3, 2, 2)).astype(np.float16)},
            )
            for i in range(count)
        ]
        bad = Record("", None, sha256="ff" * 32, error="CorruptImageError: photos/x.jpg is no picture.")
        return [Record(**{**vars(bad), "key": each.key}) if i % 3 == 2 else each for i, each in enumerate(good)]

    return make
