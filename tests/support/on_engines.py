"""Small tokenizers on engines: what several test files share."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from tokenflow_sdk import Tokenizer
from tokenflow_sdk.engines.build_config import BuildConfig
from tokenflow_sdk.engines.cache import EngineCache

FP32 = BuildConfig(backend="tensorrt", precision="fp32", batch=(1, 2, 8))
IMAGES = np.random.default_rng(0).integers(0, 256, (5, 64, 64, 3), np.uint8)


def on_engines(bundle: Path, **options: object) -> Tokenizer:
    return Tokenizer.from_pretrained(bundle, **({"backend": "tensorrt", "build_config": FP32} | options))  # type: ignore[arg-type]


def certificate_of(record: dict) -> dict:
    """Of an engine that was compared on the GPU that is there, and on no other."""
    (certificate,) = record["certificates"].values()
    return certificate


def records() -> list[dict]:
    return [json.loads(path.read_bytes()) for path in sorted(EngineCache().directory.glob("*.json"))]
