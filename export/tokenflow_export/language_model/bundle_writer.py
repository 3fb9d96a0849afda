"""Writes the bundle of a generator or an understander."""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch

from tokenflow_export.checkpoints.hf_directory import HfDirectory
from tokenflow_export.language_model.agreement import Agreement
from tokenflow_export.model_card import checkpoint_source, write_card
from tokenflow_export.progress import ProgressSteps
from tokenflow_export.tracing.onnx_export import GraphSpec, export_graph, file_entry
from tokenflow_export.tracing.weight_quantization import FULL_PRECISION, ExportPrecision
from tokenflow_export.versions import versions
from tokenflow_sdk.atomic_directory import atomic_directory
from tokenflow_sdk.bundle.bundle import Bundle
from tokenflow_sdk.bundle.model_config import GeneratorConfig, TokenizerConfig, UnderstanderConfig
from tokenflow_sdk.bundle.schema import FileEntry
from tokenflow_sdk.parity.language_model import LanguageModelReference

__all__ = ["ExportJob", "Source", "write_bundle"]

C = TypeVar("C", GeneratorConfig, UnderstanderConfig)


@dataclass(frozen=True)
class ExportJob:
    """What to export, where to, and how.

    Args:
        directory: the released checkpoint.
        tokenizer: the bundle of the paired tokenizer.
        out: the bundle's directory; must not exist, unless `force`.
        steps: shows progress.
        force: replace `out`.
        precision: of the transformer, the token embeddings and the head.
        compress: write smaller files that give the same numbers (`tokenflow_export.tracing.compress_weights`).
        use_transformers: compare with transformers' own classes where they are installed and know the model.
        ignored_keys: keys of config.json that this exporter does not know and that the user knows to be harmless.
        license: of the weights, which is stored as provenance; None: not known.
    """

    directory: HfDirectory
    tokenizer: Bundle[TokenizerConfig]
    out: Path
    steps: ProgressSteps
    force: bool = False
    precision: ExportPrecision = FULL_PRECISION
    compress: bool = False
    use_transformers: bool = True
    ignored_keys: tuple[str, ...] = ()
    license: str | None = None

    def tokenizer_path(self) -> str:
        """Where the written bundle looks for its tokenizer, relative to itself."""
        return Path(os.path.relpath(self.tokenizer.path.resolve(), self.out.resolve())).as_posix()


@dataclass(frozen=True)
class Source(ABC, Generic[C]):
    """A job whose bundle's config has been read from the checkpoint; subclasses say what differs by model."""

    job: ExportJob
    config: C

    @abstractmethod
    def expected_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor that the checkpoint must have, by its key."""

    @abstractmethod
    def graphs(self) -> Iterator[GraphSpec]:
        """Yield the graphs to trace, one at a time, so that the weights of only one are in memory."""

    @abstractmethod
    def write_assets(self, directory: Path) -> dict[str, FileEntry]:
        """Write the other files of the bundle into `directory`, and describe each by its name in the bundle."""

    @abstractmethod
    def compare(self, bundle: Bundle[C]) -> tuple[Agreement, LanguageModelReference]:
        """Compare the written graphs with PyTorch in float32. Also returns the reference for engines."""


def write_bundle(source: Source[Any]) -> Agreement:
    """Trace the graphs, compare them with PyTorch, and only then move the bundle to its place.

    Returns:
        How the bundle compares with PyTorch in float32.

    Raises:
        ArgumentError: the precision does not fit the sizes.
        CheckpointError: keys, shapes or values are not those of a released model.
        OutputError: `out` exists or cannot be written.
        ParityError: the graphs do not reproduce PyTorch; nothing is left behind.
    """
    job, steps = source.job, source.job.steps
    expected = source.expected_shapes()
    job.directory.require(expected)
    job.precision.require_blocks({key: shape for key, shape in expected.items() if key.startswith("model.layers.")})
    needed = job.precision.bytes_of(sum(math.prod(shape) for shape in job.directory.shapes.values()))
    with atomic_directory(job.out, job.force, needed) as work, torch.inference_mode():
        graphs = {}
        for spec in source.graphs():
            steps.start(f"writing {spec.name}", total=1)
            graphs[spec.name] = export_graph(spec, work, steps.fraction, job.compress)
        assets = source.write_assets(work)
        provenance = {
            **checkpoint_source(job.directory.path),
            "tokenizer": job.tokenizer.config.variant,
            "precision": job.precision.name,
        }
        if job.license is not None:
            provenance["license"] = job.license
        if job.ignored_keys:
            provenance["ignored_keys"] = ", ".join(job.ignored_keys)
        bundle = Bundle(work, source.config, graphs, assets, {}, provenance | versions())
        steps.start("checking the graphs against PyTorch")
        agreement, reference = source.compare(bundle)
        agreement.require(job.precision)
        steps.start("finishing")
        np.savez(work / "reference.npz", allow_pickle=False, **vars(reference))
        assets["reference"] = file_entry(work / "reference.npz")
        bundle = replace(bundle, parity=asdict(agreement))
        write_card(bundle)
        bundle.write_manifest()
    return agreement
