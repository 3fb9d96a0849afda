"""Compares the graphs of an exported understander with PyTorch in float32."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from tokenflow_export.checkpoints.hf_directory import HfDirectory
from tokenflow_export.language_model.agreement import Agreement, Float32, open_on_cpu
from tokenflow_export.language_model.paged_graph import hidden_by_layer
from tokenflow_export.language_model.projector import projector
from tokenflow_export.models.config import TransformerConfig
from tokenflow_export.tracing.weight_quantization import ExportPrecision, round_columns
from tokenflow_sdk.bundle.bundle import Bundle
from tokenflow_sdk.bundle.model_config import UnderstanderConfig, pages_for
from tokenflow_sdk.model.transformer import PagedTransformer
from tokenflow_sdk.parity.language_model import run_pieces
from tokenflow_sdk.parity.understander import (
    UnderstanderInputs,
    UnderstanderReference,
    embed_pieces,
    greedy_feeds,
    likeliest_tokens,
)

__all__ = ["compare"]


def compare(
    bundle: Bundle[UnderstanderConfig],
    directory: HfDirectory,
    model: TransformerConfig,
    head_key: str,
    codebook: Float32,
    precision: ExportPrecision,
) -> tuple[Agreement, UnderstanderReference]:
    """Run random text, a picture, text again and single answer tokens through the graphs and through PyTorch.

    The graphs take several steps over pages; PyTorch computes the whole causal sequence at once.

    Args:
        bundle: its graphs have been written.
        directory: the checkpoint.
        model: sizes of its transformer.
        head_key: the key of the head's weight.
        codebook: float32 [K, C], the tokenizer's.
        precision: of the graphs.

    Returns:
        The agreement, and the reference for engines.
    """
    config, inputs = bundle.config, UnderstanderInputs.random(bundle.config, codebook)
    with ExitStack() as stack:
        embedding = {name: stack.enter_context(open_on_cpu(bundle, name)) for name in ("embed_text", "project")}
        pieces = [(np.array(embeddings), visible) for embeddings, visible in embed_pieces(embedding, inputs)]
    with open_on_cpu(bundle, "transformer") as session:
        hidden = run_pieces(PagedTransformer.of(config, session, pages_for(len(inputs), 4), page_size=4), pieces, len(inputs))
    with open_on_cpu(bundle, "head") as session:
        likeliest = likeliest_tokens(session, hidden, config)
        logits = session.run(greedy_feeds(hidden, config), ["logits"])["logits"]

    head = directory.tensor(head_key)
    x = _embeddings(directory, inputs)
    expected = _eager(directory, model, x)
    agreement = Agreement.of(torch.from_numpy(hidden), expected, torch.from_numpy(logits), F.linear(expected, head))
    results = [(hidden, likeliest)]
    if precision.weights == "int8":
        expected = _eager(directory, model, x, round_columns)
        chosen = F.linear(expected, round_columns(head)).argmax(dim=-1)
        results.append((expected.numpy(), chosen.numpy().astype(np.int32)))
    states, tokens = (np.stack(arrays) for arrays in zip(*results, strict=True))
    return agreement, UnderstanderReference(**vars(inputs), hidden=states, likeliest=tokens)


def _embeddings(directory: HfDirectory, inputs: UnderstanderInputs) -> Tensor:
    """The embeddings [1, Q, H] of the whole sequence, text and picture."""
    table = directory.tensor("model.embed_tokens.weight")
    before, after = (torch.from_numpy(ids).long() for ids in (inputs.before, np.concatenate([inputs.after, inputs.answer])))
    return torch.cat([table[before], projector(directory)(torch.from_numpy(inputs.features)), table[after]])[None]


def _eager(
    directory: HfDirectory, model: TransformerConfig, x: Tensor, rounded: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """Compute hidden states [Q, H] of embeddings [1, Q, H] in PyTorch, with a causal mask."""
    count = x.shape[1]
    mask = torch.ones(count, count, dtype=torch.bool).tril()[None]
    return hidden_by_layer(directory, model, x, torch.arange(count, dtype=torch.int32)[None], mask, rounded)[0]
