"""What the tests of whole benchmarks share: a card that is not there, and looking at what was written."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu.device import Device
from tests.support.fake_cuda import FakeCuda
from tests.support.fake_gpu import FakeTensorRTRTX

Words = list[str]


class CardThatIsNot(Device):
    """A GPU for everything but PyTorch, whose tensors stay on the CPU. `cached` is what its allocator keeps of the GPU."""

    on_gpu, sdk = True, "cuda:0"

    def __init__(self, cuda: FakeCuda) -> None:
        super().__init__()
        self._cuda, self.cached = cuda, 0
        self.name = "NVIDIA Test Card"

    def about(self) -> dict[str, Any]:
        return {"name": self.name, "architecture": "sm89", "memory_bytes": self._cuda.memory, "driver": "1.2", "cuda": "13.0"}

    def used(self) -> int:
        return self._cuda.used() + self.cached

    def allocated(self) -> int:
        return 321

    def peak(self) -> int:
        return 4321

    def release(self) -> None:
        self.cached = 0


def written(words: Words) -> tuple[dict[str, Any], str]:
    out = Path(words[words.index("--out") + 1])
    return json.loads(out.with_suffix(".json").read_text()), out.with_suffix(".md").read_text()


def by_side(rows: list[dict[str, Any]], **place: object) -> dict[str, dict[str, Any]]:
    return {row["side"]: row for row in rows if all(row[key] == value for key, value in place.items())}


def check_figures(row: dict[str, Any], pictures: int) -> None:
    assert row["calls"] == 2
    assert 0 < row["median_s"] <= row["p95_s"]
    assert row["pictures_per_s"] == pytest.approx(pictures / row["median_s"])


def check_wrong(row: dict[str, Any], why: str) -> None:
    assert why in row["wrong"]
    assert not row.keys() & {"median_s", "pictures_per_s", "flop_per_s"}


def install_rtx(monkeypatch: pytest.MonkeyPatch, cuda: FakeCuda) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", FakeTensorRTRTX(cuda))


def check_drawn(generator: dict[str, Any]) -> None:
    assert (generator["codes"], generator["prompt"]) == (30, 8)
    assert generator["parity"]["onnxruntime"]["failures"] == []
    for preset in ("fast", "paper"):
        one, two = (by_side(generator["rows"], preset=preset, pictures=n) for n in (1, 2))
        for side in ("torch", "onnxruntime"):
            check_figures(one[side], 1)
            assert one[side]["equal_codes"] == 1.0
        check_figures(two["onnxruntime"], 2)
        assert two["torch"]["why"] == "The PyTorch side draws one picture at a time."
