from __future__ import annotations

import subprocess
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from benchmarks.gpu import device as devices
from benchmarks.gpu.device import Device, Gpu, copy_rate, open_device, product_rate, versions
from tests.benchmarks.test_timing import Clock
from tokenflow_sdk.errors import ArgumentError, BackendError

GIB = 2**30


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """PyTorch's view of a card that is not there: every function that is replaced must exist."""
    seen = SimpleNamespace(waits=0, resets=0, emptied=0, current=None)
    replaced = {
        "is_available": lambda: True,
        "device_count": lambda: 2,
        "set_device": lambda index: setattr(seen, "current", index),
        "get_device_name": lambda index: f"NVIDIA Test Card {index}",
        "get_device_capability": lambda index: (8, 9),
        "mem_get_info": lambda index: (5 * GIB, 8 * GIB),
        "synchronize": lambda index: setattr(seen, "waits", seen.waits + 1),
        "reset_peak_memory_stats": lambda index: setattr(seen, "resets", seen.resets + 1),
        "memory_allocated": lambda index: 23,
        "max_memory_allocated": lambda index: 123,
        "empty_cache": lambda: setattr(seen, "emptied", seen.emptied + 1),
    }
    for name, function in replaced.items():
        monkeypatch.setattr(torch.cuda, name, function)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    backends = torch.backends
    before = backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32, backends.cudnn.benchmark
    backends.cuda.matmul.allow_tf32 = True
    yield seen
    backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32, backends.cudnn.benchmark = before


def test_a_card(card: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "_driver", lambda: "580.1")
    gpu = open_device("cuda:1")
    assert isinstance(gpu, Gpu)
    assert (gpu.name, gpu.slug, gpu.sdk, card.current) == ("NVIDIA Test Card 1", "nvidia-test-card-1", "cuda:1", 1)
    assert gpu.torch == torch.device("cuda", 1)
    assert gpu.used() == 3 * GIB
    gpu.synchronize()
    gpu.reset_peak()
    assert (gpu.allocated(), gpu.peak()) == (23, 123)
    gpu.clear()
    assert (card.waits, card.resets, card.emptied) == (1, 1, 1)
    about = gpu.about()
    assert about | {"cudnn": None} == {
        "name": "NVIDIA Test Card 1",
        "architecture": "sm89",
        "memory_bytes": 8 * GIB,
        "driver": "580.1",
        "cuda": "13.0",
        "cudnn": None,
    }


def test_float32_is_float32(card: SimpleNamespace) -> None:
    Gpu()
    assert not torch.backends.cuda.matmul.allow_tf32
    assert not torch.backends.cudnn.allow_tf32
    # What torch.compile reads.
    assert torch.backends.cuda.matmul.fp32_precision != "tf32"
    assert torch.backends.cudnn.conv.fp32_precision != "tf32"


def test_a_card_that_is_not_there(card: SimpleNamespace) -> None:
    with pytest.raises(ArgumentError, match="no GPU 2 here, only 2"):
        open_device("cuda:2")


def test_no_card(card: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BackendError, match=r"no usable NVIDIA GPU.*nvidia-smi.*CUDA 13\.0"):
        open_device("cuda")


def test_no_cuda_in_pytorch(card: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(BackendError, match=r"built without CUDA.*make bench-gpu"):
        open_device("cuda")


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", ""])
def test_no_such_device(name: str) -> None:
    with pytest.raises(ArgumentError, match="--device cuda, cuda:N or cpu"):
        open_device(name)


def test_a_cpu_has_no_memory_to_ask_for() -> None:
    cpu = open_device("cpu")
    assert not cpu.on_gpu
    assert (cpu.used(), cpu.allocated(), cpu.peak(), cpu.sdk) == (None, None, None, "cpu")


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_rate_of_a_product(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stretch of ten products of 2 x 24^3 operations, each taking as long as the clock says: waiting included."""
    clock = Clock()
    monkeypatch.setattr(devices, "perf_counter", lambda: clock.now)
    monkeypatch.setattr(Device, "synchronize", lambda self: clock.synchronize())
    assert product_rate(Device(), dtype, 24) == 10 * 2 * 24**3 / 0.25


def test_the_rate_of_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every number of four bytes is read and written."""
    clock = Clock()
    monkeypatch.setattr(devices, "perf_counter", lambda: clock.now)
    monkeypatch.setattr(Device, "synchronize", lambda self: clock.synchronize())
    assert copy_rate(Device(), 24) == 10 * 2 * 4 * 24**2 / 0.25


def test_versions_name_what_is_installed() -> None:
    found = versions()
    assert found["torch"] == torch.__version__
    assert {"python", "system", "numpy"} <= set(found)
    assert all(found.values())


@pytest.mark.parametrize(
    ("tool", "done", "expected"),
    [
        ("/bin/nvidia-smi", (0, "580.65.06\n580.65.06\n"), "580.65.06"),
        ("/bin/nvidia-smi", (9, "NVIDIA-SMI has failed"), "unknown: nvidia-smi does not answer"),
        (None, None, "unknown: nvidia-smi is not here"),
    ],
)
def test_the_driver(tool, done, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices.shutil, "which", lambda name: tool)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=done[0], stdout=done[1]))
    assert devices._driver() == expected
