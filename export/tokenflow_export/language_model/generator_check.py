"""Compares the graphs of an exported generator with PyTorch in float32."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from tokenflow_export.checkpoints.hf_directory import HfDirectory
from tokenflow_export.language_model.agreement import Agreement, Float32, open_on_cpu, require_every_row
from tokenflow_export.language_model.paged_graph import hidden_by_layer
from tokenflow_export.models.config import TransformerConfig
from tokenflow_export.tracing.weight_quantization import ExportPrecision, round_columns
from tokenflow_sdk.backends.session import Session
from tokenflow_sdk.bundle.bundle import Bundle
from tokenflow_sdk.bundle.model_config import GeneratorConfig, pages_for
from tokenflow_sdk.model.transformer import PagedTransformer
from tokenflow_sdk.parity.generator import (
    GeneratorInputs,
    GeneratorReference,
    embed_inputs,
    likeliest_codes,
    likeliest_feeds,
    run_inputs,
)

__all__ = ["compare"]


def compare(
    bundle: Bundle[GeneratorConfig],
    directory: HfDirectory,
    model: TransformerConfig,
    head: Tensor,
    text: Tensor,
    codebook: Float32,
    precision: ExportPrecision,
) -> tuple[Agreement, GeneratorReference]:
    """Run a random prompt and a scale of random codes through the graphs and through PyTorch.

    The graphs take two steps over pages: the prompt, which is causal, and the scale, which is bidirectional. PyTorch computes
    both at once, with a mask.

    Args:
        bundle: its graphs have been written.
        directory: the checkpoint.
        model: sizes of its transformer.
        head: float32 [K, H], the rows of image codes.
        text: [text_size, H], the embeddings of text as they were written.
        codebook: float32 [K, C], the tokenizer's.
        precision: of the graphs.

    Returns:
        The agreement, and the reference for engines.
    """
    inputs = GeneratorInputs.random(bundle.config)
    with ExitStack() as stack:
        embedding = {name: stack.enter_context(open_on_cpu(bundle, name)) for name in ("embed_text", "embed_image")}
        require_every_row(partial(_embed_text, embedding["embed_text"]), text)
        prompt, scale = (np.array(x, np.float32) for x in embed_inputs(embedding, codebook, inputs))
    config, count, total = bundle.config, prompt.shape[1], prompt.shape[1] + scale.shape[1]
    mask = torch.ones(total, total, dtype=torch.bool).tril()
    mask[count:, count:] = True
    x = torch.from_numpy(np.concatenate([prompt, scale], axis=1))
    positions = torch.arange(total, dtype=torch.int32)[None]
    expected = hidden_by_layer(directory, model, x, positions, mask[None])[0]
    with open_on_cpu(bundle, "transformer") as session:
        paged = PagedTransformer.of(config, session, pages_for(total, 4), page_size=4)
        right = [run_inputs(paged, prompt, scale)]
    if precision.weights == "int8":
        right.append(hidden_by_layer(directory, model, x, positions, mask[None], round_columns)[0].numpy())
    with open_on_cpu(bundle, "sample") as session:
        likeliest = [likeliest_codes(session, hidden[None])[0] for hidden in right]
        logits = session.run(likeliest_feeds(right[0][None]), ["logits"])["logits"][0]
    found, found_logits = torch.from_numpy(right[0]), torch.from_numpy(np.array(logits))
    agreement = Agreement.of(found, expected, found_logits, F.linear(expected, head))
    return agreement, GeneratorReference(**vars(inputs), hidden=np.stack(right), likeliest=np.stack(likeliest))


def _embed_text(session: Session, ids: NDArray[np.int32]) -> Float32:
    feeds: dict[str, Any] = {"token_ids": ids[None], "starts": np.zeros((1, len(ids)), np.float32)}
    found: Float32 = session.run(feeds, ["embeddings"])["embeddings"][0]
    return found
