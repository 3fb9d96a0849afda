from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import codecs, run
from tests.benchmarks.card import CardThatIsNot, Words
from tests.support.fake_cuda import FakeCuda
from tests.support.fake_gpu import FakeTensorRT
from tests.support.mini import MINI, mini_state


@pytest.fixture
def words(mini_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Words:
    """Options that measure a small tokenizer: checkpoint and bundle, few and short calls."""
    torch.save(mini_state("clip"), tmp_path / "mini.pt")
    monkeypatch.setattr(codecs, "recognise", lambda shapes, variant: MINI["clip"])
    quick = ["--rounds", "2", "--seconds", "0.02", "--matmul", "32", "--threads", "1", "--batches", "2,1"]
    return ["--checkpoint", str(tmp_path / "mini.pt"), "--bundle", str(mini_bundle), *quick, "--out", str(tmp_path / "made")]


@pytest.fixture
def drawing(mini_generator: Path) -> Words:
    """Options that measure a small generator."""
    files = ["--generator", str(mini_generator), "--generator-checkpoint", str(mini_generator.parent / "hf")]
    return [*files, "--prompt", "8", "--pictures", "1,2"]


@pytest.fixture
def machine(machine: tuple[FakeCuda, FakeTensorRT], monkeypatch: pytest.MonkeyPatch) -> tuple[FakeCuda, FakeTensorRT]:
    """A card with TensorRT, without TensorRT-RTX and without onnxruntime for GPUs."""
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    monkeypatch.setattr(run, "open_device", lambda name, threads: CardThatIsNot(machine[0]))
    return machine
