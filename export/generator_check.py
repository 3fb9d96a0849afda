"""How an exported generator compares with PyTorch in float32: a prompt, and then a scale of codes."""

from __future__ import annotations

from contextlib import ExitStack

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from export.agreement import Agreement, Float32
from export.config import TransformerConfig
from export.hf_directory import HfDirectory
from export.precision import Precision, round_columns
from export.transformer import hidden_by_layer
from tokenflow_sdk.backends.base import SessionOptions
from tokenflow_sdk.backends.onnxruntime import OnnxRuntimeSession
from tokenflow_sdk.bundle import Bundle
from tokenflow_sdk.config import GeneratorConfig
from tokenflow_sdk.generator_parity import GeneratorReference, Steps, embed_steps, likeliest_codes, run_steps
from tokenflow_sdk.transformer import PagedTransformer

__all__ = ["compare"]


def compare(
    bundle: Bundle[GeneratorConfig],
    directory: HfDirectory,
    model: TransformerConfig,
    head: Tensor,
    codebook: Float32,
    precision: Precision,
) -> tuple[Agreement, GeneratorReference]:
    """A causal prompt and then a bidirectional block over its pages, against eager layers over both at once.

    Args:
        bundle: with the graphs written.
        directory, model: the checkpoint.
        head: float32 [K, H].
        codebook: float32 [K, 40].
        precision: of the graphs.

    Returns:
        How they agree, and what an engine must compute.
    """
    steps = Steps.random(bundle.config)
    with ExitStack() as stack:
        embedding = {name: stack.enter_context(_open(bundle, name)) for name in ("embed_text", "embed_image")}
        prompt, scale = (np.array(x, np.float32) for x in embed_steps(embedding, codebook, steps))
    config, count, total = bundle.config, prompt.shape[1], prompt.shape[1] + scale.shape[1]
    mask = torch.ones(total, total, dtype=torch.bool).tril()
    mask[count:, count:] = True
    x = torch.from_numpy(np.concatenate([prompt, scale], axis=1))
    positions = torch.arange(total, dtype=torch.int32)[None]
    expected = hidden_by_layer(directory, model, x, positions, mask[None])[0]
    with _open(bundle, "transformer") as session:
        paged = PagedTransformer(session, config.layers, config.kv_heads, config.head_dim, pages=-(-total // 4), page_size=4)
        right = [run_steps(paged, prompt, scale)]
    found = torch.from_numpy(right[0])
    agreement = Agreement.of(found, expected, F.linear(found, head), F.linear(expected, head))
    if precision.weights == "int8":
        right.append(hidden_by_layer(directory, model, x, positions, mask[None], round_columns)[0].numpy())
    with _open(bundle, "sample") as session:
        likeliest = [likeliest_codes(session, hidden) for hidden in right]
    return agreement, GeneratorReference(steps.token_ids, steps.code_indices, np.stack(right), np.stack(likeliest))


def _open(bundle: Bundle[GeneratorConfig], name: str) -> OnnxRuntimeSession:
    entry = bundle.graph(name)
    return OnnxRuntimeSession(bundle.path / entry.files[0].name, entry, SessionOptions(device="cpu"))
