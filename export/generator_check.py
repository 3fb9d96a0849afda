"""How an exported generator compares with PyTorch in float32, before its bundle appears."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from export.config import TransformerConfig
from export.hf_directory import HfDirectory
from export.precision import FULL_PRECISION, Precision
from export.transformer import hidden_by_layer
from tokenflow_sdk.backends.base import SessionOptions
from tokenflow_sdk.backends.onnxruntime import OnnxRuntimeSession
from tokenflow_sdk.bundle import Bundle
from tokenflow_sdk.config import GeneratorConfig
from tokenflow_sdk.errors import ParityError
from tokenflow_sdk.kv_cache import PageTable
from tokenflow_sdk.transformer import PagedTransformer

__all__ = ["MAX_HIDDEN_ERROR", "Agreement", "compare"]

MAX_HIDDEN_ERROR = 1e-3
"""Largest difference accepted from a float32 graph; hidden states are of order one."""
MIN_COSINE = 0.5
"""Least mean cosine accepted from other precisions: below it the graph is wrong, not coarse."""
_PROMPT, _BLOCK = 48, 64

Float32 = NDArray[np.float32]


@dataclass(frozen=True)
class Agreement:
    """Over one prompt of random ids and one scale of random codes, at every position.

    `hidden_error` is the largest difference of hidden states and `hidden_cosine` their mean cosine; `same_code` is the share
    of positions whose likeliest image code is the same, and `overlap` the mean probability that both distributions share.
    """

    hidden_error: float
    hidden_cosine: float
    same_code: float
    overlap: float

    def require(self, precision: Precision) -> None:
        """Refuse a broken graph.

        Raises:
            ParityError: the graph does not reproduce PyTorch.
        """
        if precision == FULL_PRECISION:
            good, bar = self.hidden_error <= MAX_HIDDEN_ERROR, f"by at most {MAX_HIDDEN_ERROR:.0e}"
        else:
            good, bar = self.hidden_cosine >= MIN_COSINE, f"with a cosine of at least {MIN_COSINE}"
        if not good:
            raise ParityError(
                f"The exported transformer differs from PyTorch by {self.hidden_error:.1e}, cosine {self.hidden_cosine:.3f} "
                f"({bar} is accepted in {precision.name}).",
                "Export in fp32 or with --weights int8 if this was fp16 or int4; else with the pinned versions of torch and "
                "onnxruntime.",
            )


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
    found = torch.from_numpy(_paged_hidden(bundle, x, positions))
    difference = (found - expected).abs().max()
    a, b = (F.linear(hidden, head) for hidden in (expected, found))
    overlap = torch.minimum(a.softmax(dim=-1), b.softmax(dim=-1)).sum(dim=-1).mean()
    cosine = F.cosine_similarity(found, expected, dim=-1).mean()
    same = (a.argmax(dim=-1) == b.argmax(dim=-1)).float().mean()
    return Agreement(*(float(value) for value in (difference, cosine, same, overlap)))


def _embeddings(bundle: Bundle[GeneratorConfig]) -> tuple[Float32, NDArray[np.int32]]:
    """A prompt's and a block's embeddings [1, Q, H], by the exported graphs, and their positions."""
    config, rng = bundle.config, np.random.default_rng(0)
    count = min(_BLOCK, config.n_codes)
    starts = np.zeros((1, _PROMPT), np.float32)
    starts[0, -1] = 1
    ids = rng.integers(0, config.text_size, (1, _PROMPT), np.int32)
    codebook = np.load(bundle.path / bundle.asset("codebook").name, allow_pickle=False)
    features = codebook[rng.integers(0, config.codebook_size, (1, count))].astype(np.float32)
    image = {"features": features, "level": np.ones(1, np.int32), "places": np.arange(count, dtype=np.int32)}
    feeds = {"embed_text": {"token_ids": ids, "starts": starts}, "embed_image": image}
    parts = []
    for name, values in feeds.items():
        entry = bundle.graph(name)
        with OnnxRuntimeSession(bundle.path / entry.files[0].name, entry, SessionOptions(device="cpu")) as session:
            parts.append(session.run(values)["embeddings"])
    return np.concatenate(parts, axis=1), np.arange(_PROMPT + count, dtype=np.int32)[None]


def _paged_hidden(bundle: Bundle[GeneratorConfig], x: Float32, positions: NDArray[np.int32]) -> Float32:
    config, entry, total = bundle.config, bundle.graph("transformer"), x.shape[1]
    with OnnxRuntimeSession(bundle.path / entry.files[0].name, entry, SessionOptions(device="cpu")) as session:
        pages = -(-total // 4)
        paged = PagedTransformer(session, config.layers, config.kv_heads, config.head_dim, pages=pages, page_size=4)
        table, found = PageTable(paged.pool), []
        own = np.arange(1, _PROMPT + 1), np.full(total - _PROMPT, total - _PROMPT)
        for start, stop, visible in ((0, _PROMPT, own[0]), (_PROMPT, total, own[1])):
            step = x[:, start:stop], positions[:, start:stop], visible[None].astype(np.int32)
            output = paged.step(*step, [table], [table.length], width=pages)
            paged.store(output, [table])
            found.append(output.hidden[0])
    return np.concatenate(found)
