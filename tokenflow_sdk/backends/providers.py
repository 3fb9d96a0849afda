"""Choose onnxruntime's execution providers, and their options.

The options keep float32 products at full precision, because reduced precision changes codes.
"""

from __future__ import annotations

import importlib.util
from typing import Any

from tokenflow_sdk.backends.cuda import driver_problem
from tokenflow_sdk.backends.session import SessionOptions
from tokenflow_sdk.errors import ArgumentError, BackendError

__all__ = ["CPU", "CUDA", "SETTINGS", "TENSORRT", "Provider", "preload_cuda", "require_active", "select_providers"]

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
TENSORRT, _OPENVINO = "TensorrtExecutionProvider", "OpenVINOExecutionProvider"

Provider = tuple[str, dict[str, str]]
"""Name and options of an execution provider."""

SETTINGS: dict[str, dict[str, str]] = {
    # By default, recent GPUs round the inputs of float32 products to TF32. The arena would double with each extension, and
    # every convolution be tried in all ways at each new shape.
    CUDA: {"use_tf32": "0", "arena_extend_strategy": "kSameAsRequested", "cudnn_conv_algo_search": "HEURISTIC"},
}
"""Options that each provider gets, wherever it runs."""
_preloaded = False


def select_providers(available: list[str], options: SessionOptions) -> list[Provider]:
    """The execution providers to run a graph with, in order of preference.

    Args:
        available: names of the providers that the installed onnxruntime was built with.
        options: names the providers or a device. `auto` means CUDA if it is available and the driver finds a GPU, else the CPU.

    Raises:
        ArgumentError: `options` names a provider that is not available, or what only the
            backend `openvino` has.
        BackendError: `options` asks for CUDA, and the provider, the driver or the GPU is missing.
    """
    if options.providers is not None:
        if _OPENVINO in options.providers:
            raise ArgumentError(
                "onnxruntime's OpenVINO provider ended with 1.24.",
                "Use backend='openvino', which `pip install 'tokenflow-sdk[openvino]'` brings.",
            )
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
    elif options.device.startswith(("gpu", "npu")):
        raise ArgumentError(
            f"device={options.device!r} is Intel's, on which onnxruntime does not run.", "Use backend='openvino'."
        )
    else:
        return [_with_settings(name, options) for name in _default_providers(available, options.device)]
    problem = driver_problem() if {CUDA, TENSORRT} & set(names) else None
    if problem is not None:
        raise BackendError(f"{request}, but {problem}.", "See whether `nvidia-smi` lists the GPU, or use device='cpu'.")
    return [_with_settings(name, options) for name in names]


def _default_providers(available: list[str], device: str) -> tuple[str, ...]:
    """The providers of `auto` and `cpu`. CUDA is not tried without a GPU, because onnxruntime would print errors."""
    return (CUDA, CPU) if device == "auto" and CUDA in available and driver_problem() is None else (CPU,)


def _with_settings(name: str, options: SessionOptions) -> Provider:
    settings = dict(SETTINGS.get(name, {}))
    if name in (CUDA, TENSORRT):
        settings["device_id"] = options.device.partition(":")[2] or "0"
    return name, settings


def preload_cuda(ort: Any) -> None:
    """Load the CUDA and cuDNN libraries that pip installed (`tokenflow-sdk[gpu]`), so that no CUDA toolkit is needed.

    Args:
        ort: the module onnxruntime.
    """
    global _preloaded
    # Without these packages, onnxruntime would print that it found nothing.
    if not _preloaded and hasattr(ort, "preload_dlls") and importlib.util.find_spec("nvidia") is not None:
        ort.preload_dlls()
        _preloaded = True


def require_active(wanted: list[Provider], used: list[str]) -> None:
    """Check that a session uses all the providers it was asked to use; onnxruntime silently skips those that fail to start.

    Args:
        wanted: the providers requested.
        used: names of the providers that the session uses.

    Raises:
        BackendError: a requested provider did not start.
    """
    lost = [name for name, _ in wanted if name not in used]
    if lost:
        raise BackendError(
            f"onnxruntime could not start {', '.join(lost)} (driver, CUDA or cuDNN libraries missing or too old).",
            "Run `pip install 'tokenflow-sdk[gpu]'`, which brings them, see that `nvidia-smi` shows a driver for their CUDA, "
            "or use device='cpu'.",
        )
