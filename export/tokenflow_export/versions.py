"""Versions of what a bundle is made with."""

from __future__ import annotations

import platform

import onnx
import onnxruntime
import torch

from tokenflow_sdk import __version__

__all__ = ["versions"]


def versions() -> dict[str, str]:
    """Versions of the exporter and of the packages it used, for the provenance of a bundle."""
    return {
        "exporter": f"tokenflow-sdk {__version__}",
        "torch": torch.__version__,
        "onnx": onnx.__version__,
        "onnxruntime": onnxruntime.__version__,
        "python": platform.python_version(),
    }
