"""Execution providers of onnxruntime: which of them run a graph, and settings without which they would round codes away."""

from __future__ import annotations

import importlib.util
from typing import Any

from tokenflow_sdk.backends.cuda import driver_problem
from tokenflow_sdk.backends.session import SessionOptions
from tokenflow_sdk.errors import ArgumentError, BackendError

__all__ = ["CPU", "CUDA", "OPENVINO", "TENSORRT", "Provider", "preload_cuda", "require_active", "select_providers"]

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
TENSORRT, OPENVINO = "TensorrtExecutionProvider", "OpenVINOExecutionProvider"

Provider = tuple[str, dict[str, str]]
"""Name and settings."""

_SETTINGS: dict[str, dict[str, str]] = {
    # Recent GPUs would round what float32 products read to 10 bits, recent CPUs to bfloat16's 8.
    CUDA: {"use_tf32": "0"},
    OPENVINO: {"device_type": "CPU", "precision": "FP32"},
}
_preloaded = False


def select_providers(available: list[str], options: SessionOptions) -> list[Provider]:
    """The providers that options name, or that a device means, in order.

    Args:
        available: what the installed onnxruntime was built with.
        options: `auto` means CUDA where it is built in and the driver finds a GPU, else the CPU.

    Raises:
        ArgumentError: a provider by name that is not built in.
        BackendError: device cuda, without a provider or a GPU for it.
    """
    if options.providers is not None:
        missing = [name for name in options.providers if name not in available]
        if missing or not options.providers:
            raise ArgumentError(
                f"onnxruntime has no provider {', '.join(missing) or '(none given)'} here.", f"It has: {', '.join(available)}."
            )
        names, request = options.providers, f"providers={list(options.providers)}"
    elif options.device.startswith("cuda"):
        if CUDA not in available:
            raise BackendError(
                f"device={options.device!r}, but the installed onnxruntime has no CUDA provider.",
                "Run `pip uninstall onnxruntime` and `pip install 'tokenflow-sdk[gpu]'`, or use device='cpu'.",
            )
        names, request = (CUDA, CPU), f"device={options.device!r}"
    else:
        return [_with_settings(name, options) for name in _default_providers(available, options.device)]
    problem = driver_problem() if {CUDA, TENSORRT} & set(names) else None
    if problem is not None:
        raise BackendError(f"{request}, but {problem}.", "See whether `nvidia-smi` lists the GPU, or use device='cpu'.")
    return [_with_settings(name, options) for name in names]


def _default_providers(available: list[str], device: str) -> tuple[str, ...]:
    """Where there is no GPU, CUDA is not tried: onnxruntime would print a page of errors."""
    return (CUDA, CPU) if device == "auto" and CUDA in available and driver_problem() is None else (CPU,)


def _with_settings(name: str, options: SessionOptions) -> Provider:
    settings = dict(_SETTINGS.get(name, {}))
    if name in (CUDA, TENSORRT):
        settings["device_id"] = options.device.partition(":")[2] or "0"
    return name, settings


def preload_cuda(ort: Any) -> None:
    """Let onnxruntime find CUDA and cuDNN where pip puts them (`tokenflow-sdk[gpu]`), without a toolkit on the machine."""
    global _preloaded
    # Without such packages there is nothing to find, and it would print that.
    if not _preloaded and hasattr(ort, "preload_dlls") and importlib.util.find_spec("nvidia") is not None:
        ort.preload_dlls()
        _preloaded = True


def require_active(wanted: list[Provider], used: list[str]) -> None:
    """onnxruntime leaves out a provider that does not start, and goes on with the next; nobody who asked for it wants that.

    Raises:
        BackendError: a provider did not start.
    """
    lost = [name for name, _ in wanted if name not in used]
    if lost:
        raise BackendError(
            f"onnxruntime could not start {', '.join(lost)} (driver, CUDA or cuDNN libraries missing or too old).",
            "Run `pip install 'tokenflow-sdk[gpu]'`, which brings them, see that `nvidia-smi` shows a driver for their CUDA, "
            "or use device='cpu'.",
        )
