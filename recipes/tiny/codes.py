"""Pictures as codes of the bundled tokenizer, and its codebook, for the models that are trained on its codes."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from recipes.tiny.config import TINY
from recipes.tiny.data import Pixels
from tokenflow_export.models.quantizer import SharedQuantizer
from tokenflow_sdk import Tokenizer
from tokenflow_sdk.bundle.bundle import Bundle, find_bundle
from tokenflow_sdk.bundle.model_config import TokenizerConfig
from tokenflow_sdk.parity.tokenizer import TokenizerReference

__all__ = ["codebook", "encoded", "quantizer"]


def encoded(pictures: Iterable[Pixels], tokenizer: Tokenizer) -> Tensor:
    """The codes int16 [N, L] of pictures u8 [256, 256, 3], as the runtime gives them."""
    return torch.from_numpy(np.stack([codes.indices.astype(np.int16) for codes in tokenizer.encode_iter(pictures)]))


def codebook(bundle: Path) -> Tensor:
    """The codebook of a tokenizer's bundle, float32 [K, C], with both halves of unit length."""
    reference = TokenizerReference.load(Bundle.open(find_bundle(str(bundle), "tokenizer"), TokenizerConfig))
    return torch.from_numpy(reference.codebook)


def quantizer(rows: Tensor) -> SharedQuantizer:
    """The quantizer of a codebook [K, C], which gives the quantized features of codes."""
    model = SharedQuantizer(TINY).to(rows.device).requires_grad_(False)
    halves = torch.split(rows, [TINY.semantic_dim, TINY.pixel_dim], dim=1)
    model.embedding_vqkd.weight.data, model.embedding_vqgan.weight.data = halves
    return model
