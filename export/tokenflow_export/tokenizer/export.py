"""Exports a tokenizer to a bundle: traces its graphs, compares them with PyTorch, and moves the bundle to its place.

`bundle.json` is written last, after the comparison, so that a directory left behind by a killed export cannot be opened.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tokenflow_export.model_card import write_card
from tokenflow_export.models.tokenizer import TokenFlowTokenizer, to_unit_range
from tokenflow_export.progress import ProgressSteps
from tokenflow_export.tokenizer.graphs import DecodeGraph, EncodeGraph, FeaturesGraph, SemanticGraph
from tokenflow_export.tokenizer.reference_images import reference_pictures
from tokenflow_export.tracing.onnx_export import GraphSpec, export_graph, file_entry
from tokenflow_export.versions import versions
from tokenflow_sdk import Tokenizer
from tokenflow_sdk.atomic_directory import atomic_directory
from tokenflow_sdk.bundle.bundle import Bundle
from tokenflow_sdk.bundle.model_config import TokenizerConfig
from tokenflow_sdk.parity.tokenizer import TokenizerReference, check_tokenizer
from tokenflow_sdk.parity.tokenizer_report import TokenizerReport
from tokenflow_sdk.pictures.images import preprocess

__all__ = ["export_tokenizer"]

REFERENCE_FILE = "reference.npz"


def export_tokenizer(
    model: TokenFlowTokenizer,
    out: Path,
    source: dict[str, Any],
    steps: ProgressSteps,
    force: bool = False,
    compress: bool = False,
    images: Sequence[Path] = (),
) -> TokenizerReport:
    """Write the bundle of `model` to the directory `out`.

    Args:
        model: in float32, from `tokenflow_export.checkpoints.tokenizer.load_model`.
        out: must not exist, unless `force`.
        source: where the weights came from, which is stored as provenance.
        steps: shows progress.
        force: replace `out`.
        compress: write smaller files that give the same numbers (`tokenflow_export.tracing.compress_weights`).
        images: pictures to compare too; they are not stored in the bundle.

    Returns:
        How the bundle compares with PyTorch.

    Raises:
        OutputError: `out` exists or cannot be written.
        ParityError: the exported graphs do not reproduce PyTorch; nothing is left behind.
        ImageError: one of `images` cannot be used.
    """
    size, mode = model.config.image_size, model.config.preprocess
    pictures = np.stack([*reference_pictures(size), *(preprocess(path, size, mode) for path in images)])
    with atomic_directory(out, force, needed=sum(p.numel() * 4 for p in model.parameters())) as staging:
        compared = _reference(model, pictures, steps)
        reference = _without(compared, len(images))
        graphs = {}
        for spec in _graph_specs(model):
            steps.start(f"tracing {spec.name}")
            graphs[spec.name] = export_graph(spec, staging, compress=compress, patch_nums=model.config.patch_nums)
        steps.start("writing the reference vectors")
        (np.savez_compressed if compress else np.savez)(staging / REFERENCE_FILE, **vars(reference))
        bundle = Bundle(
            path=staging,
            config=_runtime_config(model),
            graphs=graphs,
            assets={"reference": file_entry(staging / REFERENCE_FILE)},
            parity={},
            provenance=source | versions(),
        )
        steps.start("checking the graphs against PyTorch", total=1.0)
        with Tokenizer(bundle) as tokenizer:
            report = check_tokenizer(tokenizer.graphs, compared, steps.fraction)
        report.require(f"The export of {model.config.variant}")
        steps.start("finishing")
        bundle = replace(bundle, parity=report.to_json())
        write_card(bundle)
        bundle.write_manifest()
    return report


def _graph_specs(model: TokenFlowTokenizer) -> Iterator[GraphSpec]:
    config = model.config
    images = torch.zeros(2, config.image_size, config.image_size, 3, dtype=torch.uint8)
    codes = torch.zeros(2, config.n_codes, dtype=torch.int32)
    batch = {0: torch.export.Dim("batch", min=1, max=4096)}
    outputs = ("code_indices", "features", "latent")
    yield GraphSpec("encode", EncodeGraph(model), {"images": (images, batch)}, outputs)
    yield GraphSpec("decode", DecodeGraph(model), {"code_indices": (codes, batch)}, ("images",))
    yield GraphSpec("semantic", SemanticGraph(model), {"code_indices": (codes, batch)}, ("features",))
    yield GraphSpec("features", FeaturesGraph(model), {"code_indices": (codes, batch)}, ("features",))


def _runtime_config(model: TokenFlowTokenizer) -> TokenizerConfig:
    config, quantize = model.config, model.quantize
    digest = hashlib.sha256()
    for table in (quantize.embedding_vqkd, quantize.embedding_vqgan):
        digest.update(table.weight.detach().numpy().astype("<f4").tobytes())
    return TokenizerConfig(
        variant=config.variant,
        image_size=config.image_size,
        patch_nums=config.patch_nums,
        codebook_size=config.codebook_size,
        semantic_dim=config.semantic_dim,
        pixel_dim=config.pixel_dim,
        pixel_weight=config.pixel_weight,
        semantic_width=config.semantic_decoder.out_width,
        codebook_sha256=digest.hexdigest(),
        preprocess=config.preprocess,
    )


def _without(reference: TokenizerReference, count: int) -> TokenizerReference:
    """The reference without its last `count` images."""
    arrays = {name: array if name == "codebook" else array[: len(array) - count] for name, array in vars(reference).items()}
    return TokenizerReference(**arrays)


@torch.inference_mode()
def _reference(model: TokenFlowTokenizer, pictures: NDArray[np.uint8], steps: ProgressSteps) -> TokenizerReference:
    steps.start("computing the reference in PyTorch", total=1.0)
    rows: list[dict[str, np.ndarray]] = []
    for i, picture in enumerate(pictures):
        images = torch.from_numpy(picture)[None]
        latent = model.latent(to_unit_range(images))
        codes, features = model.quantize.encode(latent)
        row = {"latent": latent, "code_indices": codes.int(), "features": features}
        row |= {"decoded": model.decode(codes), "semantic": model.semantic(codes)}
        rows.append({name: value[0].numpy() for name, value in row.items()})
        steps.fraction((i + 1) / len(pictures))
    stacked = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    return TokenizerReference(images=pictures, codebook=torch.cat(model.quantize.codebooks(), dim=1).numpy(), **stacked)
