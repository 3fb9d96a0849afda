"""Exports a released text-to-image directory to a generator bundle.

The bundle holds the paged transformer, the embeddings of text and images, the sampling of codes, and the prompt tokenizer.
Of the head only the rows of image codes are exported, and of the embedding table only the rows of text tokens. Weights are read
one tensor at a time and written at once, so the model need not fit in memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokenflow_export.checkpoints.architecture import EMBEDDING, HEAD, head_key, read_architecture, vocabulary_shapes
from tokenflow_export.checkpoints.hf_directory import HfDirectory
from tokenflow_export.language_model.agreement import Agreement
from tokenflow_export.language_model.bundle_writer import ExportJob, Source, write_bundle
from tokenflow_export.language_model.generator_check import compare
from tokenflow_export.language_model.generator_graphs import EmbedImageGraph, EmbedTextGraph, SampleGraph
from tokenflow_export.language_model.paged_graph import transformer_shapes, transformer_spec
from tokenflow_export.language_model.pairing import require_same_tokenizer
from tokenflow_export.language_model.projector import projector, projector_shapes
from tokenflow_export.language_model.prompt_tokenizer import prompt_tokenizer
from tokenflow_export.models.config import TransformerConfig
from tokenflow_export.tracing.onnx_export import GraphSpec, file_entry
from tokenflow_export.tracing.weight_quantization import ExportPrecision
from tokenflow_sdk.bundle.bundle import Bundle
from tokenflow_sdk.bundle.model_config import GeneratorConfig
from tokenflow_sdk.bundle.schema import FileEntry
from tokenflow_sdk.parity.language_model import LanguageModelReference
from tokenflow_sdk.parity.tokenizer import TokenizerReference

__all__ = ["NEGATIVE_PROMPT", "export_generator"]

NEGATIVE_PROMPT = (
    "lowres, bad anatomy, bad hands, text, error, missing fingers, extra digit, fewer digits, cropped, worst quality, "
    "low quality, normal quality, jpeg artifacts, signature, watermark, username, blurry."
)
CFG_SCALE = 7.5
"""The guidance that the released model was published with."""
MAX_PROMPT = 128


def export_generator(
    job: ExportJob, negative_prompt: str = NEGATIVE_PROMPT, preset: str = "paper", cfg_scale: float = CFG_SCALE
) -> Agreement:
    """Write a generator bundle. Returns and raises what `write_bundle` does.

    Args:
        job: what to export; its tokenizer decodes the model's codes.
        negative_prompt: for requests that give none.
        preset: of sampling, for requests that give none.
        cfg_scale: strength of guidance, for requests that give none.
    """
    job.steps.start("reading the checkpoint")
    directory, tokenizer = job.directory, job.tokenizer.config
    require_same_tokenizer(directory, job.tokenizer)
    model = read_architecture(directory, "output", job.ignored_keys)
    rows, _ = directory.shapes[EMBEDDING]
    prompts = prompt_tokenizer(directory.path, tokenizer.codebook_size, rows, directory.config)
    config = GeneratorConfig(
        width=model.width,
        layers=model.layers,
        kv_heads=model.kv_heads,
        head_dim=model.head_dim,
        text_size=rows - tokenizer.codebook_size,
        image_token_start=prompts.image_token_start,
        bos_id=prompts.bos_id,
        image_start_ids=prompts.image_start_ids,
        max_prompt=MAX_PROMPT,
        negative_prompt=negative_prompt,
        preset=preset,
        cfg_scale=cfg_scale,
        patch_nums=tokenizer.patch_nums,
        codebook_size=tokenizer.codebook_size,
        codebook_sha256=tokenizer.codebook_sha256,
        tokenizer_variant=tokenizer.variant,
        tokenizer=job.tokenizer_path(),
    )
    codebook = TokenizerReference.load(job.tokenizer).codebook
    return write_bundle(_GeneratorSource(job, config, model, head_key(directory), prompts.content, codebook))


@dataclass(frozen=True)
class _GeneratorSource(Source[GeneratorConfig]):
    """A text-to-image checkpoint.

    `head_key` is the key of the head's weight, `text` the content of tokenizer.json, `codebook` is float32 [K, C].
    """

    model: TransformerConfig
    head_key: str
    text: dict[str, Any]
    codebook: NDArray[np.float32]

    def expected_shapes(self) -> dict[str, tuple[int, ...]]:
        config, width = self.config, self.model.width
        vocabulary = config.text_size + config.codebook_size
        return (
            transformer_shapes(self.model)
            | projector_shapes(width, self.codebook.shape[1])
            | vocabulary_shapes(self.job.directory, self.head_key, vocabulary, width)
            | {
                "model.lvl_embed.weight": (len(config.scales) + 1, width),
                "model.pos_1LC": (config.n_codes, width),
            }
        )

    def graphs(self) -> Iterator[GraphSpec]:
        dims = {name: torch.export.Dim(name) for name in ("batch", "queries", "window")}
        directory, precision = self.job.directory, self.job.precision
        yield _embed_text_spec(directory, self.config, precision, dims)
        yield _embed_image_spec(directory, dims)
        yield transformer_spec(directory, self.model, precision)
        yield _sample_spec(self._image_head(), precision, dims)

    def write_assets(self, directory: Path) -> dict[str, FileEntry]:
        np.save(directory / "codebook.npy", self.codebook)
        (directory / "tokenizer.json").write_text(json.dumps(self.text), encoding="utf-8")
        return {"codebook": file_entry(directory / "codebook.npy"), "tokenizer": file_entry(directory / "tokenizer.json")}

    def compare(self, bundle: Bundle[GeneratorConfig]) -> tuple[Agreement, LanguageModelReference]:
        directory, precision = self.job.directory, self.job.precision
        text = _text_table(directory, self.config, precision)
        return compare(bundle, directory, self.model, self._image_head(), text, self.codebook, precision)

    def _image_head(self) -> Tensor:
        """The rows of the head that give the logits of image codes, float32 [K, H]."""
        start = self.config.image_token_start
        return self.job.directory.tensor(self.head_key)[start : start + self.config.codebook_size].clone()


def _zeros(*shape: int) -> Tensor:
    return torch.zeros(*shape)


def _counts(*shape: int) -> Tensor:
    return torch.ones(*shape, dtype=torch.int32)


def _embed_text_spec(
    directory: HfDirectory, config: GeneratorConfig, precision: ExportPrecision, dims: Mapping[str, Any]
) -> GraphSpec:
    rows = {0: dims["batch"], 1: dims["queries"]}
    return GraphSpec(
        "embed_text",
        EmbedTextGraph(_text_table(directory, config, precision), directory.tensor("model.pos_1LC")[0]),
        {"token_ids": (_counts(2, 3), rows), "starts": (_zeros(2, 3), rows)},
        ("embeddings",),
    )


def _embed_image_spec(directory: HfDirectory, dims: Mapping[str, Any]) -> GraphSpec:
    code_dim = directory.shapes["model.mm_projector.0.weight"][1]
    levels, positions = directory.tensor("model.lvl_embed.weight"), directory.tensor("model.pos_1LC")
    return GraphSpec(
        "embed_image",
        EmbedImageGraph(projector(directory), levels, positions),
        {
            "features": (_zeros(2, 3, code_dim), {0: dims["batch"], 1: dims["queries"]}),
            "level": (_counts(1), {}),
            "places": (_counts(3), {0: dims["queries"]}),
        },
        ("embeddings",),
    )


def _sample_spec(head: Tensor, precision: ExportPrecision, dims: Mapping[str, Any]) -> GraphSpec:
    rows, batch = {0: dims["batch"], 1: dims["queries"]}, {0: dims["batch"]}
    head = precision.cast(head, HEAD)
    return GraphSpec(
        "sample",
        SampleGraph(head),
        {
            "conditional": (_zeros(2, 3, head.shape[1]), rows),
            "unconditional": (_zeros(2, 3, head.shape[1]), rows),
            "guidance": (_zeros(2), batch),
            "top_k": (_counts(2), batch),
            "top_p": (_zeros(2), batch),
            "noise": (_zeros(2, 3), rows),
            "ranks": (_counts(9), {0: dims["window"]}),
        },
        ("code_indices", "certain", "logits"),
    )


def _text_table(directory: HfDirectory, config: GeneratorConfig, precision: ExportPrecision) -> Tensor:
    """The embeddings of text tokens with the level embedding of text, [text_size, H] in the dtype of the arithmetic."""
    start, stop = config.image_token_start, config.image_token_start + config.codebook_size
    table = directory.tensor(EMBEDDING)
    return precision.cast(torch.cat([table[:start], table[stop:]]) + directory.tensor("model.lvl_embed.weight")[0], EMBEDDING)
