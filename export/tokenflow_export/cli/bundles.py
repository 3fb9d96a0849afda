"""`tokenflow export tokenizer`, `generator` and `understanding`: a released checkpoint to a bundle."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from time import perf_counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenflow_export.language_model.agreement import Agreement
    from tokenflow_export.language_model.bundle_writer import ExportJob

__all__ = ["generator", "tokenizer", "understanding"]


def tokenizer(arguments: argparse.Namespace) -> None:
    """Export a tokenizer."""
    from tokenflow_export.checkpoints.tokenizer import load_model, read_state_dict, recognise, resolve
    from tokenflow_export.model_card import checkpoint_source
    from tokenflow_export.progress import ProgressSteps
    from tokenflow_export.tokenizer.export import export_tokenizer
    from tokenflow_sdk.atomic_directory import checked_target
    from tokenflow_sdk.files import file_sha256
    from tokenflow_sdk.pictures.images import pictures_in

    began = perf_counter()
    checked_target(arguments.out, arguments.force)  # before half a minute of reading
    images = pictures_in(arguments.images) if arguments.images else []
    with ProgressSteps() as steps:
        steps.start("reading the checkpoint")
        path = resolve(arguments.checkpoint)
        state = read_state_dict(path)
        config = recognise({key: tuple(value.shape) for key, value in state.items()}, arguments.variant, path.name)
        model = load_model(state, config, path.name)
        del state
        source = checkpoint_source(path) | {"checkpoint_sha256": file_sha256(path)}
        if arguments.license is not None:
            source["license"] = arguments.license
        report = export_tokenizer(model, arguments.out, source, steps, arguments.force, images=images)
    agreement = " ".join(f"{side}:{share:.2%}" for side, share in zip(report.patch_nums, report.agreement, strict=True))
    print(f"{config.variant} -> {arguments.out} in {perf_counter() - began:.0f} s, checked on {report.pictures} pictures:")
    print(f"  teacher-forced code agreement by scale  {agreement}")
    print(f"  flips {len(report.flips)}, equal codes {report.equal_codes:.2%}, decode PSNR {report.decode_psnr:.1f} dB")
    print(f"  largest error: features {report.features_error:.1e}, semantic features {report.semantic_error:.1e}")


def generator(arguments: argparse.Namespace) -> None:
    """Export a generator."""
    from tokenflow_export.language_model.generator import export_generator

    _language_model(arguments, export_generator, "code")


def understanding(arguments: argparse.Namespace) -> None:
    """Export an understander."""
    from tokenflow_export.language_model.understanding import export_understanding

    _language_model(arguments, export_understanding, "token")


def _language_model(arguments: argparse.Namespace, export: Callable[[ExportJob], Agreement], choice: str) -> None:
    from tokenflow_export.checkpoints.hf_directory import HfDirectory
    from tokenflow_export.language_model.agreement import OWN_MODEL
    from tokenflow_export.language_model.bundle_writer import ExportJob
    from tokenflow_export.progress import ProgressSteps
    from tokenflow_export.tracing.weight_quantization import ExportPrecision
    from tokenflow_sdk.bundle.bundle import Bundle
    from tokenflow_sdk.bundle.model_config import TokenizerConfig

    began = perf_counter()
    tokenizer = Bundle.open(arguments.tokenizer, TokenizerConfig)
    precision = ExportPrecision(arguments.dtype, arguments.weights)
    with ProgressSteps() as steps:
        directory = HfDirectory(arguments.checkpoint)
        job = ExportJob(
            directory,
            tokenizer,
            arguments.out,
            steps,
            arguments.force,
            precision,
            use_transformers=not getattr(arguments, "without_transformers", False),
            ignored_keys=tuple(arguments.ignore_key),
            license=arguments.license,
        )
        found = export(job)
    print(f"{arguments.checkpoint} -> {arguments.out} in {perf_counter() - began:.0f} s, {precision.name}")
    print(f"  hidden states differ from {found.compared_with} by {found.hidden_error:.1e}, cosine {found.hidden_cosine:.5f}")
    if choice == "token" and job.use_transformers and found.compared_with == OWN_MODEL:
        print("  transformers is not installed: with `pip install transformers` the check would not rest on the exporter alone")
    print(f"  likeliest {choice} the same at {found.same_code:.1%} of positions, probabilities overlap by {found.overlap:.1%}")
