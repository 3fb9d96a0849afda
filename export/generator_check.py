"""How an exported generator compares with PyTorch in float32: a prompt, and then a scale of codes."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from export.agreement import Agreement, Float32, Int32, paged_hidden, run_graph
from export.config import TransformerConfig
from export.hf_directory import HfDirectory
from export.transformer import hidden_by_layer
from tokenflow_sdk.bundle import Bundle
from tokenflow_sdk.config import GeneratorConfig

__all__ = ["compare"]

_PROMPT, _BLOCK = 48, 64


def compare(bundle: Bundle[GeneratorConfig], directory: HfDirectory, model: TransformerConfig, head: Tensor) -> Agreement:
    """A causal prompt and then a bidirectional block over its pages, against eager layers over both at once.

    Args:
        bundle: with the graphs written.
        directory, model: the checkpoint.
        head: float32 [K, H].
    """
    x, positions = _embeddings(bundle)
    total = x.shape[1]
    mask = torch.ones(total, total, dtype=torch.bool).tril()
    mask[_PROMPT:, _PROMPT:] = True
    expected = hidden_by_layer(directory, model, torch.from_numpy(x), torch.from_numpy(positions), mask[None])[0]
    visible = np.concatenate([np.arange(1, _PROMPT + 1), np.full(total - _PROMPT, total - _PROMPT)]).astype(np.int32)
    found = torch.from_numpy(paged_hidden(bundle, x, positions, visible[None], (_PROMPT, total)))
    return Agreement.of(found, expected, F.linear(found, head), F.linear(expected, head))


def _embeddings(bundle: Bundle[GeneratorConfig]) -> tuple[Float32, Int32]:
    """A prompt's and a block's embeddings [1, Q, H], by the exported graphs, and their positions."""
    config, rng = bundle.config, np.random.default_rng(0)
    count = min(_BLOCK, config.n_codes)
    starts = np.zeros((1, _PROMPT), np.float32)
    starts[0, -1] = 1
    ids = rng.integers(0, config.text_size, (1, _PROMPT), np.int32)
    codebook = np.load(bundle.path / bundle.asset("codebook").name, allow_pickle=False)
    features = codebook[rng.integers(0, config.codebook_size, (1, count))].astype(np.float32)
    image = {"features": features, "level": np.ones(1, np.int32), "places": np.arange(count, dtype=np.int32)}
    text = run_graph(bundle, "embed_text", {"token_ids": ids, "starts": starts}, "embeddings")
    x = np.concatenate([text, run_graph(bundle, "embed_image", image, "embeddings")], axis=1).astype(np.float32, copy=False)
    return x, np.arange(_PROMPT + count, dtype=np.int32)[None]
