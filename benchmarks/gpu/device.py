"""The device that is measured: what it is, waiting for it, its memory, and what it reaches in a plain matrix product
and a plain copy.

It is opened before any session is: the CUDA libraries that come with PyTorch then serve onnxruntime as well.
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
"""In one timed stretch, so that starting and waiting do not show."""


class Device:
    """The CPU, on which this benchmark can be tried; `Gpu` is what it is for.

    Args:
        threads: of PyTorch; None leaves them to it.
    """

    on_gpu = False
    sdk = "cpu"
    """What tokenflow-sdk calls it."""

    def __init__(self, threads: int | None = None) -> None:
        self.torch = torch.device("cpu")
        if threads is not None:
            torch.set_num_threads(threads)
        self.name = machine()["cpu"] or "cpu"

    @property
    def slug(self) -> str:
        """For a file's name: `nvidia-geforce-rtx-4090`."""
        return re.sub("[^a-z0-9]+", "-", self.name.lower()).strip("-")

    def about(self) -> dict[str, Any]:
        return {"name": self.name}

    def synchronize(self) -> None:
        """Wait until it is idle."""

    def used(self) -> int | None:
        """Bytes of its memory that are taken, by whomever; None where that is not asked for."""
        return None

    def allocated(self) -> int | None:
        """Bytes that PyTorch's allocator has given away."""
        return None

    def reset_peak(self) -> None:
        """Begin to watch PyTorch's allocator."""

    def peak(self) -> int | None:
        """Most bytes that PyTorch's allocator held since."""
        return None

    def release(self) -> None:
        """Give back the memory that PyTorch keeps for later."""

    def clear(self) -> None:
        """Forget models that nobody refers to any more."""
        gc.collect()
        self.release()


class Gpu(Device):
    """An NVIDIA GPU. From its making on, PyTorch computes float32 in float32 and tries convolutions out for the fastest.

    Raises:
        BackendError: this PyTorch has no CUDA, or finds no GPU.
        ArgumentError: there is no GPU of this number.
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
    """`cpu`, with so many threads, or `cuda` or `cuda:N`.

    Raises:
        ArgumentError, BackendError: there is none of that name; see `Gpu`.
    """
    found = re.fullmatch(r"cpu|cuda(?::(\d+))?", name)
    if found is None:
        raise ArgumentError(f"There is no device {name!r}.", "Give --device cuda, cuda:N or cpu.")
    return Device(threads) if name == "cpu" else Gpu(int(found[1] or 0))


def product_rate(device: Device, dtype: str, size: int) -> float:
    """FLOP/s of a product of two square matrices of `size` rows, a multiply-add counting as two. In `float32` (without TF32) or
    `float16`, whose products PyTorch adds in float32."""
    a, b = (torch.randn(size, size, device=device.torch).to(getattr(torch, dtype)) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * size**3 / _seconds(device, lambda: torch.matmul(a, b, out=out))


def copy_rate(device: Device, size: int) -> float:
    """Bytes/s, read and written ones together, of copying a float32 matrix of `size` rows within the device."""
    a = torch.randn(size, size, device=device.torch)
    out = torch.empty_like(a)
    return 2 * a.nbytes / _seconds(device, lambda: out.copy_(a))


def _seconds(device: Device, call: Callable[[], object], stretches: int = 5) -> float:
    """Of one call: the median of some stretches of ten; one more stretch warms up."""
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
    """Of Python, the system, and what is installed of the packages that matter."""
    found = {"python": platform.python_version(), "system": platform.platform()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _driver() -> str:
    """As nvidia-smi says; all GPUs of a machine share it."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "unknown: nvidia-smi is not here"
    asked = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(asked, capture_output=True, text=True, check=False)
    lines = done.stdout.split()
    return lines[0] if done.returncode == 0 and lines else "unknown: nvidia-smi does not answer"
