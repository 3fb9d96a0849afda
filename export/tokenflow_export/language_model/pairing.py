"""Checks that a language model was trained with the tokenizer it is exported with."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from tokenflow_export.checkpoints.hf_directory import HfDirectory
from tokenflow_sdk.bundle.bundle import Bundle
from tokenflow_sdk.bundle.model_config import TokenizerConfig
from tokenflow_sdk.errors import CheckpointError
from tokenflow_sdk.parity.tokenizer import TokenizerReference

__all__ = ["require_same_tokenizer"]

_TOKENFLOW = ("TOKEN_FLOW", "TOKENFLOW", "LLAMAGEN_VQKD", "LLAMAGEN_VQKD_INFER")
"""What released training scripts call this tokenizer in `mm_vision_vq_type`, perhaps after `VQType.`."""
_TOLERANCE = 0.01
"""Bound on the difference of two codebooks that are one: half precision moves values of unit rows by less."""


def require_same_tokenizer(directory: HfDirectory, tokenizer: Bundle[TokenizerConfig]) -> None:
    """Compare what a directory says of its tokenizer, and the codebook if it holds its own, with the tokenizer's bundle.

    Raises:
        CheckpointError: it was trained with another tokenizer.
    """
    config, path = directory.config, directory.path / "config.json"
    kind = config.get("mm_vision_vq_type")
    if kind is not None and str(kind).rpartition(".")[2] not in _TOKENFLOW:
        raise CheckpointError(f"{path} gives mm_vision_vq_type as {kind!r}.", "Give a model that reads TokenFlow's codes.")
    projector = config.get("mm_projector_type")
    if projector not in (None, "mlp2x_gelu"):
        raise CheckpointError(
            f"{path} gives mm_projector_type as {projector!r}, which this exporter does not build.",
            "Give a model whose mm_projector_type is 'mlp2x_gelu', as the released ones have it.",
        )
    # Training scripts write -1 where they found no codebook.
    expected = {"mm_hidden_size": tokenizer.config.code_dim, "vq_codebook_size": tokenizer.config.codebook_size}
    for key, value in expected.items():
        if config.get(key) not in (None, -1, value):
            raise CheckpointError(
                f"{path} gives {key} as {config[key]!r}; with a {tokenizer.config.variant} tokenizer it is {value!r}.",
                "Give --tokenizer, the bundle of the tokenizer that this model was trained with.",
            )
    _require_same_codebook(directory, tokenizer)


def _require_same_codebook(directory: HfDirectory, tokenizer: Bundle[TokenizerConfig]) -> None:
    keys = [directory.tower_key(f"quantize.embedding_{half}.weight") for half in ("vqkd", "vqgan")]
    theirs = TokenizerReference.load(tokenizer).codebook
    start = 0
    for key in keys:
        if key is None:
            return
        table: Tensor = F.normalize(directory.tensor(key), dim=-1)
        ours = theirs[:, start : start + table.shape[1]]
        start += table.shape[1]
        if tuple(table.shape) != ours.shape or not abs(table.numpy() - ours).max() < _TOLERANCE:
            raise CheckpointError(
                f"{directory.path} holds the codebook of its tokenizer ({key}), and that of {tokenizer.path} is another.",
                "Give --tokenizer, the bundle of the tokenizer that this model was trained with.",
            )
