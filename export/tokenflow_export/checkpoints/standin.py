"""Stand-in weights: random weights under the released keys and shapes, to try everything without a download.

The random numbers of a tensor are seeded with the CRC-32 of its key. They are scaled so that activations stay in a normal range
and the codes differ from each other. Pictures decoded with these weights are noise.
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
    """The standard deviation of a weight that is neither a norm's nor a bias."""
    if "embedding_vqkd" in key or "embedding_vqgan" in key:
        return 1.0
    if "pos_1LC" in key:
        return 0.1
    if "pos" in key or "cls_token" in key:
        return 0.5
    fan_in = shape[0] if key.endswith(".proj") else math.prod(shape[1:])
    return (4.0 if key == "lm_head.weight" else 1.0) / math.sqrt(fan_in)


def standin_weight(key: str, shape: tuple[int, ...], seed: int = 0) -> NDArray[np.float32]:
    """The stand-in weight float32 of one state-dict key; the same on every machine."""
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
    """Yield the key and the stand-in weight of every tensor that a released checkpoint of `config` has."""
    shapes: Mapping[str, tuple[int, ...]] = released_shapes(config)
    mean_std = _CLIP_MEAN_STD if config.semantic_encoder.kind == "vitamin" else _HALF_MEAN_STD
    for key, shape in shapes.items():
        if key.startswith("scaling_layer."):
            yield key, np.asarray(mean_std[key.endswith("scale")], np.float32).reshape(shape)
        else:
            yield key, standin_weight(key, shape, seed)
