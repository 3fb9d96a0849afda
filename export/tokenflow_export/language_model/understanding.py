"""Exports a released LLaVA directory (Qwen2 or Llama keys) to an understander bundle.

The bundle holds the embeddings, the projector, the paged transformer, the head and the text tokenizer. A vision tower in the
directory is left out, because pictures are read as the tokenizer's quantized features. Weights are read one tensor at a time
and written at once, so the model need not fit in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from tokenflow_export.checkpoints.architecture import EMBEDDING, head_key, read_architecture, size, vocabulary_shapes
from tokenflow_export.checkpoints.hf_directory import HfDirectory
from tokenflow_export.language_model.agreement import Agreement
from tokenflow_export.language_model.bundle_writer import ExportJob, Source, write_bundle
from tokenflow_export.language_model.chat_template import chat_template, stop_ids
from tokenflow_export.language_model.paged_graph import transformer_shapes, transformer_spec
from tokenflow_export.language_model.pairing import require_same_tokenizer
from tokenflow_export.language_model.projector import projector, projector_shapes
from tokenflow_export.language_model.prompt_tokenizer import load_tokenizer
from tokenflow_export.language_model.tokenizer_files import require_rows
from tokenflow_export.language_model.understanding_check import compare
from tokenflow_export.language_model.understanding_graphs import EmbedTokensGraph, HeadGraph
from tokenflow_export.models.config import TransformerConfig
from tokenflow_export.tracing.onnx_export import GraphSpec, file_entry
from tokenflow_export.tracing.weight_quantization import ExportPrecision, use_matmul
from tokenflow_sdk.bundle.bundle import Bundle
from tokenflow_sdk.bundle.model_config import UnderstanderConfig
from tokenflow_sdk.bundle.schema import FileEntry
from tokenflow_sdk.errors import CheckpointError
from tokenflow_sdk.parity.language_model import LanguageModelReference
from tokenflow_sdk.parity.tokenizer import TokenizerReference
from tokenflow_sdk.pictures.preparation import Preprocess

__all__ = ["export_understanding"]


def export_understanding(job: ExportJob) -> Agreement:
    """Write an understander bundle. Its tokenizer gives the codes that the model reads.

    Returns and raises what `write_bundle` does.
    """
    job.steps.start("reading the checkpoint")
    directory, tokenizer = job.directory, job.tokenizer.config
    require_same_tokenizer(directory, job.tokenizer)
    model = read_architecture(directory, "pre", job.ignored_keys)
    text = load_tokenizer(directory.path)
    vocabulary = size(directory, "vocab_size")
    require_rows(text, vocabulary, directory.path)
    template = chat_template(text, directory.path)
    config = UnderstanderConfig(
        width=model.width,
        layers=model.layers,
        kv_heads=model.kv_heads,
        head_dim=model.head_dim,
        context=_context(directory),
        vocabulary=vocabulary,
        stop_ids=stop_ids(template, directory.config, directory.path, vocabulary),
        template=template,
        image_tokens=tokenizer.grid**2,
        code_dim=tokenizer.code_dim,
        patch_nums=tokenizer.patch_nums,
        codebook_sha256=tokenizer.codebook_sha256,
        tokenizer_variant=tokenizer.variant,
        tokenizer=job.tokenizer_path(),
        preprocess=_preprocess(directory),
    )
    return write_bundle(_UnderstanderSource(job, config, model, text, head_key(directory)))


@dataclass(frozen=True)
class _UnderstanderSource(Source[UnderstanderConfig]):
    """An understanding checkpoint. `text` is its text tokenizer, `head_key` the key of the head's weight."""

    model: TransformerConfig
    text: Any
    head_key: str

    def expected_shapes(self) -> dict[str, tuple[int, ...]]:
        width = self.model.width
        return (
            transformer_shapes(self.model)
            | projector_shapes(width, self.config.code_dim)
            | vocabulary_shapes(self.job.directory, self.head_key, self.config.vocabulary, width)
        )

    def graphs(self) -> Iterator[GraphSpec]:
        directory, precision = self.job.directory, self.job.precision
        dims = {name: torch.export.Dim(name) for name in ("batch", "queries", "seen", "window")}
        rows = {0: dims["batch"], 1: dims["queries"]}
        table = precision.cast(directory.tensor(EMBEDDING), EMBEDDING)
        ids = torch.ones(2, 3, dtype=torch.int32)
        yield GraphSpec("embed_text", EmbedTokensGraph(table), {"token_ids": (ids, rows)}, ("embeddings",))
        del table
        features = torch.zeros(2, 3, self.config.code_dim)
        yield GraphSpec("project", projector(directory), {"features": (features, rows)}, ("embeddings",))
        yield transformer_spec(directory, self.model, precision)
        yield _head_spec(directory, self.config, precision, self.head_key, dims)

    def write_assets(self, directory: Path) -> dict[str, FileEntry]:
        (directory / "tokenizer.json").write_text(self.text.to_str(), encoding="utf-8")
        return {"tokenizer": file_entry(directory / "tokenizer.json")}

    def compare(self, bundle: Bundle[UnderstanderConfig]) -> tuple[Agreement, LanguageModelReference]:
        codebook = TokenizerReference.load(self.job.tokenizer).codebook
        return compare(bundle, self.job, self.model, self.head_key, codebook)


def _context(directory: HfDirectory) -> int:
    """Tokens that the model reads: its positions, or as many as it was trained on if those are fewer."""
    positions = size(directory, "max_position_embeddings")
    trained = directory.config.get("tokenizer_model_max_length")
    return positions if trained is None else min(positions, size(directory, "tokenizer_model_max_length"))


def _preprocess(directory: HfDirectory) -> Preprocess:
    """How pictures were made square in training, from `image_aspect_ratio`."""
    value = directory.config.get("image_aspect_ratio")
    if value is None or value == "square":
        return "squash"
    if value == "pad":
        return "pad-grey"
    raise CheckpointError(
        f"{directory.path / 'config.json'} gives image_aspect_ratio as {value!r}, which the released code never trained.",
        "Give the directory of a model trained with pad or square.",
    )


def _head_spec(
    directory: HfDirectory, config: UnderstanderConfig, precision: ExportPrecision, head_key: str, dims: dict[str, Any]
) -> GraphSpec:
    """The graph of the head, to be traced. Its weight is read when the graph is saved."""
    batch = {0: dims["batch"]}
    with FakeTensorMode():
        graph = HeadGraph(config.width, config.vocabulary, precision.torch_dtype)
        use_matmul(graph)
        reals = [torch.ones(2) for _ in range(4)]
        inputs: dict[str, tuple[Tensor, dict[int, Any]]] = {
            "hidden": (torch.zeros(2, config.width), batch),
            "seen": (torch.ones(2, 4, dtype=torch.int32), batch | {1: dims["seen"]}),
            "penalty": (reals[0], batch),
            "temperature": (reals[1], batch),
            "top_k": (torch.ones(2, dtype=torch.int32), batch),
            "top_p": (reals[2], batch),
            "noise": (reals[3], batch),
            "ranks": (torch.ones(9, dtype=torch.int32), {0: dims["window"]}),
        }
    outputs = ("token_ids", "certain", "logits")
    return GraphSpec(
        "head", graph, inputs, outputs, lambda _: directory.tensor(head_key).T.contiguous().numpy(), precision.weights
    )
