"""Stand-in weights: a full-size checkpoint made from key names and shapes alone, to try the whole chain without a download.

Each array is drawn by a generator seeded with its key's CRC-32, scaled so that activations stay in a sane range and codes
diverse. Pictures decoded with these weights are noise, but every shape, key and number path is the real one.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from tokenflow_export.checkpoints.tokenizer import released_shapes
from tokenflow_export.models.config import TokenizerArchitecture

__all__ = ["standin_arrays", "standin_weight"]

_CLIP_MEAN_STD = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
_HALF_MEAN_STD = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def _factor(key: str, shape: tuple[int, ...]) -> float:
    """Standard deviation of a weight that is neither a norm nor a bias."""
    if "embedding_vqkd" in key or "embedding_vqgan" in key:
        return 1.0
    if "pos_1LC" in key:
        return 0.1
    if "pos" in key or "cls_token" in key:
        return 0.5
    fan_in = shape[0] if key.endswith(".proj") else math.prod(shape[1:])
    return (4.0 if key == "lm_head.weight" else 1.0) / math.sqrt(fan_in)


def standin_weight(key: str, shape: tuple[int, ...], seed: int = 0) -> NDArray[np.float32]:
    """The float32 array of one state-dict key; the same on every machine."""
    if key.endswith("codebook_used"):
        return np.zeros(shape, np.float32)
    generator = np.random.Generator(np.random.PCG64(zlib.crc32(key.encode()) + seed))
    values = generator.standard_normal(shape, dtype=np.float32)
    if key.endswith((".bias", "_bias")):
        values *= np.float32(0.02)
    elif "class_embedding" in key:
        values = generator.standard_normal(shape, dtype=np.float32)
        values *= np.float32(0.3)
    elif len(shape) == 1:
        values *= np.float32(0.1)
        values += 1
    else:
        values *= np.float32(_factor(key, shape))
    return values


def standin_arrays(config: TokenizerArchitecture, seed: int = 0) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Key and array of every tensor of a released checkpoint of `config`, one at a time."""
    shapes: Mapping[str, tuple[int, ...]] = released_shapes(config)
    mean_std = _CLIP_MEAN_STD if config.semantic_encoder.kind == "vitamin" else _HALF_MEAN_STD
    for key, shape in shapes.items():
        if key.startswith("scaling_layer."):
            yield key, np.asarray(mean_std[key.endswith("scale")], np.float32).reshape(shape)
        else:
            yield key, standin_weight(key, shape, seed)
