"""Compares the graphs of an exported understander with PyTorch in float32, by transformers where it is installed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from tokenflow_export.checkpoints.architecture import EMBEDDING
from tokenflow_export.checkpoints.hf_directory import HfDirectory
from tokenflow_export.language_model.agreement import OWN_MODEL, Agreement, Float32, open_on_cpu, require_every_row
from tokenflow_export.language_model.bundle_writer import ExportJob
from tokenflow_export.language_model.paged_graph import hidden_by_layer
from tokenflow_export.language_model.projector import projector
from tokenflow_export.language_model.transformers_model import installed_version, run_transformers
from tokenflow_export.models.config import TransformerConfig
from tokenflow_export.tracing.weight_quantization import round_columns
from tokenflow_sdk.backends.session import Session
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
    bundle: Bundle[UnderstanderConfig], job: ExportJob, model: TransformerConfig, head_key: str, codebook: Float32
) -> tuple[Agreement, UnderstanderReference]:
    """Run random text, a picture, text again and single answer tokens through the graphs and through PyTorch.

    The graphs take several steps over pages; PyTorch computes the whole causal sequence at once, by transformers' own classes
    where they are installed.

    Args:
        bundle: its graphs have been written.
        job: the checkpoint, and the precision of the graphs.
        model: sizes of its transformer.
        head_key: the key of the head's weight.
        codebook: float32 [K, C], the tokenizer's.

    Returns:
        The agreement, and the reference for engines.
    """
    config, inputs, directory = bundle.config, UnderstanderInputs.random(bundle.config, codebook), job.directory
    table = job.precision.cast(directory.tensor(EMBEDDING), EMBEDDING)
    with ExitStack() as stack:
        embedding = {name: stack.enter_context(open_on_cpu(bundle, name)) for name in ("embed_text", "project")}
        require_every_row(partial(_embed_text, embedding["embed_text"]), table)
        pieces = [(np.array(embeddings), visible) for embeddings, visible in embed_pieces(embedding, inputs)]
    del table
    with open_on_cpu(bundle, "transformer") as session:
        hidden = run_pieces(PagedTransformer.of(config, session, pages_for(len(inputs), 4), page_size=4), pieces, len(inputs))
    with open_on_cpu(bundle, "head") as session:
        likeliest = likeliest_tokens(session, hidden, config)
        logits = session.run(greedy_feeds(hidden, config), ["logits"])["logits"]

    expected, expected_logits, whose = _expected(job, model, head_key, inputs)
    agreement = Agreement.of(torch.from_numpy(hidden), expected, torch.from_numpy(logits), expected_logits, whose)
    results = [(hidden, likeliest)]
    if job.precision.weights == "int8":
        rounded = _eager(directory, model, _embeddings(directory, inputs), round_columns)
        chosen = F.linear(rounded, round_columns(directory.tensor(head_key))).argmax(dim=-1)
        results.append((rounded.numpy(), chosen.numpy().astype(np.int32)))
    states, tokens = (np.stack(arrays) for arrays in zip(*results, strict=True))
    return agreement, UnderstanderReference(**vars(inputs), hidden=states, likeliest=tokens)


def _embed_text(session: Session, ids: NDArray[np.int32]) -> Float32:
    found: Float32 = session.run({"token_ids": ids[None]}, ["embeddings"])["embeddings"][0]
    return found


def _expected(
    job: ExportJob, model: TransformerConfig, head_key: str, inputs: UnderstanderInputs
) -> tuple[Tensor, Tensor, str]:
    """Hidden states [Q, H] and logits [Q, V] in float32, and who computed them."""
    directory, version = job.directory, installed_version() if job.use_transformers else None
    if version is None:
        hidden = _eager(directory, model, _embeddings(directory, inputs))
        return hidden, F.linear(hidden, directory.tensor(head_key)), OWN_MODEL
    hidden, logits = run_transformers(directory, _text(inputs), partial(_place_picture, directory, inputs))
    return hidden, logits, version


def _text(inputs: UnderstanderInputs) -> Tensor:
    return torch.from_numpy(np.concatenate([inputs.before, inputs.after, inputs.answer])).long()


def _place_picture(directory: HfDirectory, inputs: UnderstanderInputs, text: Tensor) -> Tensor:
    """The embeddings [Q, H] of the whole sequence from those of its text."""
    count = len(inputs.before)
    return torch.cat([text[:count], projector(directory)(torch.from_numpy(inputs.features)), text[count:]])


def _embeddings(directory: HfDirectory, inputs: UnderstanderInputs) -> Tensor:
    """The embeddings [1, Q, H] of the whole sequence, text and picture."""
    return _place_picture(directory, inputs, directory.tensor(EMBEDDING)[_text(inputs)])[None]


def _eager(
    directory: HfDirectory, model: TransformerConfig, x: Tensor, rounded: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """Compute hidden states [Q, H] of embeddings [1, Q, H] in PyTorch, with a causal mask."""
    count = x.shape[1]
    mask = torch.ones(count, count, dtype=torch.bool).tril()[None]
    return hidden_by_layer(directory, model, x, torch.arange(count, dtype=torch.int32)[None], mask, rounded)[0]
