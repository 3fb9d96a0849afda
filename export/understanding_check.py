"""How an exported understanding model compares with PyTorch in float32: text, a picture, and text again."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional as F

from export.agreement import Agreement, paged_hidden, run_graph
from export.config import TransformerConfig
from export.hf_directory import HfDirectory
from export.projector import projector
from export.transformer import hidden_by_layer
from tokenflow_sdk.bundle import Bundle
from tokenflow_sdk.config import UnderstanderConfig

__all__ = ["compare"]

_TEXT, _IMAGE = 24, 64


def compare(bundle: Bundle[UnderstanderConfig], directory: HfDirectory, model: TransformerConfig, head_key: str) -> Agreement:
    """A causal sequence in three steps over pages, embedded and scored by the graphs, against eager layers over it at once.

    Args:
        bundle: with the graphs written.
        directory, model: the checkpoint.
        head_key: where the head's weight is.
    """
    config, rng = bundle.config, np.random.default_rng(0)
    ids = rng.integers(0, config.vocabulary, (1, 2 * _TEXT), np.int32)
    features = rng.standard_normal((1, min(_IMAGE, config.image_tokens), config.code_dim), np.float32)
    text = run_graph(bundle, "embed_text", {"token_ids": ids}, "embeddings")
    image = run_graph(bundle, "project", {"features": features}, "embeddings")
    x = np.concatenate([text[:, :_TEXT], image, text[:, _TEXT:]], axis=1).astype(np.float32, copy=False)
    positions = np.arange(x.shape[1], dtype=np.int32)[None]
    lengths = (_TEXT, image.shape[1], _TEXT)
    visible = np.concatenate([np.arange(1, length + 1) for length in lengths])
    found = paged_hidden(bundle, x, positions, visible[None].astype(np.int32), tuple(np.cumsum(lengths)))

    table = directory.tensor("model.embed_tokens.weight")
    rows = table[torch.from_numpy(ids[0]).long()]
    del table
    eager = torch.cat([rows[:_TEXT], projector(directory)(torch.from_numpy(features[0])), rows[_TEXT:]])[None]
    mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()[None]
    expected = hidden_by_layer(directory, model, eager, torch.from_numpy(positions), mask)[0]
    logits = F.linear(expected, directory.tensor(head_key))
    return Agreement.of(torch.from_numpy(found), expected, torch.from_numpy(_logits(bundle, found)), logits)


def _logits(bundle: Bundle[UnderstanderConfig], hidden: np.ndarray) -> np.ndarray:
    rows = len(hidden)
    ones = np.ones(rows, np.float32)
    feeds = {
        "hidden": hidden,
        "seen": np.zeros((rows, 1), np.int32),
        "penalty": ones,
        "temperature": ones,
        "top_k": np.ones(rows, np.int32),
        "top_p": ones,
        "noise": np.zeros(rows, np.float32),
        "ranks": np.arange(1, dtype=np.int32),
    }
    return run_graph(bundle, "head", feeds, "logits")
