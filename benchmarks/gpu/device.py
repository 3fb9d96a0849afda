"""The device that is measured: its name, waiting for it, its memory, and its rates for a matrix product and a copy.

It is opened before any session, so that onnxruntime uses the CUDA libraries that come with PyTorch.
"""

from __future__ import annotations

import gc
import importlib.metadata
import platform
import re
import shutil
import subprocess
from collections.abc import Callable
from statistics import median
from time import perf_counter
from typing import Any

import torch

from benchmarks.common import machine
from tokenflow_sdk.errors import ArgumentError, BackendError

__all__ = ["Device", "Gpu", "copy_rate", "open_device", "product_rate", "versions"]

_PACKAGES = ("tokenflow-sdk", "torch", "onnxruntime-gpu", "onnxruntime", "tensorrt", "tensorrt-rtx", "cuda-bindings", "numpy")
_REPEATS = 10
"""Calls that are timed together, so that the overhead of starting and waiting is small."""


class Device:
    """The CPU, on which the benchmark can be tried out; `Gpu` is the device that it is meant for.

    Args:
        threads: of PyTorch; None keeps its default.
    """

    on_gpu = False
    sdk = "cpu"
    """The name of the device in tokenflow-sdk."""

    def __init__(self, threads: int | None = None) -> None:
        self.torch = torch.device("cpu")
        if threads is not None:
            torch.set_num_threads(threads)
        self.name = machine()["cpu"] or "cpu"

    @property
    def slug(self) -> str:
        """The name for files: `nvidia-geforce-rtx-4090`."""
        return re.sub("[^a-z0-9]+", "-", self.name.lower()).strip("-")

    def about(self) -> dict[str, Any]:
        return {"name": self.name}

    def synchronize(self) -> None:
        """Wait until the device is idle."""

    def used(self) -> int | None:
        """The bytes of device memory that are in use by any process; None if this is not measured."""
        return None

    def allocated(self) -> int | None:
        """The bytes that PyTorch's allocator has allocated; None if this is not measured."""
        return None

    def reset_peak(self) -> None:
        """Start measuring the peak of PyTorch's allocator."""

    def peak(self) -> int | None:
        """The most bytes that PyTorch's allocator had allocated since `reset_peak`; None if this is not measured."""
        return None

    def release(self) -> None:
        """Free the memory that PyTorch has cached."""

    def clear(self) -> None:
        """Free models that are no longer used."""
        gc.collect()
        self.release()


class Gpu(Device):
    """An NVIDIA GPU. Creating it turns TF32 off in PyTorch, and cuDNN's search for the fastest convolutions on.

    Raises:
        BackendError: this PyTorch has no CUDA, or finds no GPU.
        ArgumentError: there is no GPU with this number.
    """

    on_gpu = True

    def __init__(self, index: int = 0) -> None:
        if torch.version.cuda is None:
            raise BackendError(
                f"This PyTorch ({torch.__version__}) was built without CUDA.",
                "Run `make bench-gpu`, which installs what is needed into .venv-gpu; --device cpu tries this out without.",
            )
        if not torch.cuda.is_available():
            raise BackendError(
                "PyTorch finds no usable NVIDIA GPU here.",
                f"`nvidia-smi` must list one, with a driver for CUDA {torch.version.cuda}; --device cpu tries this out.",
            )
        if index >= torch.cuda.device_count():
            raise ArgumentError(f"There is no GPU {index} here, only {torch.cuda.device_count()}.", "Give --device cuda:0.")
        self.index, self.sdk, self.torch = index, f"cuda:{index}", torch.device("cuda", index)
        torch.cuda.set_device(index)
        self.name = torch.cuda.get_device_name(index)
        # The newer names of these settings break torch.compile in some releases.
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cudnn.benchmark = True

    def about(self) -> dict[str, Any]:
        major, minor = torch.cuda.get_device_capability(self.index)
        return {
            "name": self.name,
            "architecture": f"sm{major}{minor}",
            "memory_bytes": torch.cuda.mem_get_info(self.index)[1],
            "driver": _driver(),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
        }

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.index)

    def used(self) -> int | None:
        free, total = torch.cuda.mem_get_info(self.index)
        return total - free

    def allocated(self) -> int | None:
        return torch.cuda.memory_allocated(self.index)

    def reset_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.index)

    def peak(self) -> int | None:
        return torch.cuda.max_memory_allocated(self.index)

    def release(self) -> None:
        torch.cuda.empty_cache()


def open_device(name: str, threads: int | None = None) -> Device:
    """Open the device `cpu`, with so many threads, or `cuda` or `cuda:N`.

    Raises:
        ArgumentError, BackendError: there is no such device; see `Gpu`.
    """
    found = re.fullmatch(r"cpu|cuda(?::(\d+))?", name)
    if found is None:
        raise ArgumentError(f"There is no device {name!r}.", "Give --device cuda, cuda:N or cpu.")
    return Device(threads) if name == "cpu" else Gpu(int(found[1] or 0))


def product_rate(device: Device, dtype: str, size: int) -> float:
    """Measure the FLOP/s of the product of two square matrices of `size` rows; a multiply-add counts as two.

    `dtype` is `float32` (without TF32) or `float16`, whose products PyTorch adds in float32.
    """
    a, b = (torch.randn(size, size, device=device.torch).to(getattr(torch, dtype)) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * size**3 / _seconds(device, lambda: torch.matmul(a, b, out=out))


def copy_rate(device: Device, size: int) -> float:
    """Measure the bytes per second, read plus written, of copying a square float32 matrix of `size` rows in device memory."""
    a = torch.randn(size, size, device=device.torch)
    out = torch.empty_like(a)
    return 2 * a.nbytes / _seconds(device, lambda: out.copy_(a))


def _seconds(device: Device, call: Callable[[], object], stretches: int = 5) -> float:
    """The seconds of one call: the median of several stretches of `_REPEATS` calls, after one to warm up."""
    seconds = []
    for number in range(stretches + 1):
        device.synchronize()
        began = perf_counter()
        for _ in range(_REPEATS):
            call()
        device.synchronize()
        seconds += [perf_counter() - began] if number else []
    return median(seconds) / _REPEATS


def versions() -> dict[str, str]:
    """The versions of Python, the system, and the packages of interest that are installed."""
    found = {"python": platform.python_version(), "system": platform.platform()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _driver() -> str:
    """The version of the driver from nvidia-smi. All GPUs of a machine share it."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "unknown: nvidia-smi is not here"
    asked = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(asked, capture_output=True, text=True, check=False)
    lines = done.stdout.split()
    return lines[0] if done.returncode == 0 and lines else "unknown: nvidia-smi does not answer"
