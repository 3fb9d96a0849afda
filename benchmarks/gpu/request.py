"""The options of `benchmarks/on_gpu.py`. This module needs only the runtime, so that missing packages can be reported."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

__all__ = [
    "CPU_SIDES",
    "DTYPES",
    "GRAPHS",
    "PARTS",
    "RTX",
    "SIDES",
    "TITLES",
    "TORCH",
    "VARIANT",
    "Dtype",
    "GeneratorSizes",
    "Request",
]

Dtype = Literal["float32", "float16"]

TITLES = {
    "torch": "PyTorch eager, float32",
    "torch-fp16": "PyTorch eager, float16",
    "compile": "torch.compile, float16",
    "onnxruntime": "tokenflow-sdk, onnxruntime, float32",
    "tensorrt": "tokenflow-sdk, TensorRT, float16",
    "tensorrt-rtx": "tokenflow-sdk, TensorRT-RTX, float16",
}
"""The sides: their names in options, and their titles."""
SIDES = tuple(TITLES)
DTYPES: dict[str, Dtype] = {key: "float16" if title.endswith("float16") else "float32" for key, title in TITLES.items()}
"""The dtype of a side's products."""
RTX = "tensorrt-rtx"
"""The side that may not share a process with `tensorrt`."""
TORCH = ("torch", "torch-fp16", "compile")
CPU_SIDES = ("torch", "onnxruntime")
PARTS = ("tokenizer", "generator")
GRAPHS = ("encode", "decode")
VARIANT = "clipb_256"
"""The variant that is measured if none is named."""


@dataclass(frozen=True)
class GeneratorSizes:
    """Sizes of a generator with random weights; the defaults are those of `generator_vs_eager.py`."""

    hidden: int = 1024
    layers: int = 8
    heads: int = 16
    mlp: int = 2752


@dataclass(frozen=True)
class Request:
    """The checked options of a run. `sides` are those to measure, `threads` those of the CPU; `out` is None by default."""

    command: str
    device: str
    parts: tuple[str, ...]
    sides: tuple[str, ...]
    rounds: int
    seconds: float
    product_size: int
    threads: int | None
    out: Path | None
    variants: tuple[str, ...]
    checkpoint: Path | None
    bundle: Path | None
    graphs: tuple[str, ...]
    batches: tuple[int, ...]
    generator: Path | None
    generator_checkpoint: Path | None
    sizes: GeneratorSizes
    prompt: int
    pictures: tuple[int, ...]
