"""`tokenflow export precision-search`, `calibrate` and `inspect`: what engines in fewer bits cost, and what they need."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from tokenflow_sdk.errors import ArgumentError
from tokenflow_sdk.pictures.images import pictures_in

if TYPE_CHECKING:
    from tokenflow_export.progress import ProgressSteps

__all__ = ["calibrate", "inspect", "precision_search"]


def precision_search(arguments: argparse.Namespace) -> None:
    """Find the nodes that must stay in float32, and print what half precision costs."""
    from tokenflow_export.progress import ProgressSteps
    from tokenflow_sdk.bundle.bundle import bundle_kind

    if arguments.crops < 1 or not 0 < arguments.agreement <= 1:
        raise ArgumentError(
            f"--crops {arguments.crops} and --agreement {arguments.agreement} measure nothing.", "Give 1 or more, and 0 to 1."
        )
    if arguments.decoded is not None and not 1 <= arguments.decoded <= arguments.crops:
        raise ArgumentError(f"--decoded {arguments.decoded} is not of the {arguments.crops} crops.", "Give 1 to --crops.")
    search = _search_generator if bundle_kind(arguments.bundle) == "generator" else _search_tokenizer
    with ProgressSteps() as steps:
        lines = search(arguments, steps)
    print("\n".join(lines))


def _search_generator(arguments: argparse.Namespace, steps: ProgressSteps) -> list[str]:
    from tokenflow_export.precision.generator_search import search_generator
    from tokenflow_sdk.bundle.bundle import Bundle
    from tokenflow_sdk.bundle.model_config import GeneratorConfig

    if arguments.images is not None:
        raise ArgumentError("A generator is measured on the steps that its bundle carries.", "Leave --images out.")
    bundle = Bundle.open(arguments.bundle, GeneratorConfig)
    bundle.verify()
    found = search_generator(bundle, arguments.precision, steps)
    return [f"{bundle.path} in {arguments.precision}, {found.positions} positions:", *found.lines()]


def _search_tokenizer(arguments: argparse.Namespace, steps: ProgressSteps) -> list[str]:
    from tokenflow_export.precision.search import crops
    from tokenflow_export.precision.tokenizer_search import search_tokenizer
    from tokenflow_sdk.bundle.bundle import Bundle
    from tokenflow_sdk.bundle.model_config import TokenizerConfig

    bundle = Bundle.open(arguments.bundle, TokenizerConfig)
    bundle.verify()
    if arguments.images is None:
        raise ArgumentError("A tokenizer is measured on photos.", "Give a directory of them as --images.")
    photos = pictures_in(arguments.images)
    images = crops(photos, arguments.crops, bundle.config.image_size)
    found = search_tokenizer(bundle, images, arguments.agreement, arguments.precision, steps, arguments.decoded)
    title = f"{bundle.path} in {arguments.precision} against fp32, {found.pictures} crops of {len(photos)} photos:"
    return [title, *found.lines(bundle.config.patch_nums)]


def calibrate(arguments: argparse.Namespace) -> None:
    """Find the ranges for a decoder in 8 bits, and print what they cost."""
    from tokenflow_export.precision.calibrate import calibrate
    from tokenflow_export.precision.search import crops
    from tokenflow_export.progress import ProgressSteps
    from tokenflow_sdk.bundle.bundle import Bundle
    from tokenflow_sdk.bundle.model_config import TokenizerConfig

    bundle = Bundle.open(arguments.bundle, TokenizerConfig)
    bundle.verify()
    if arguments.crops < 1:
        raise ArgumentError(f"--crops {arguments.crops} measures nothing.", "Give 1 or more.")
    photos = pictures_in(arguments.images)
    held_out = pictures_in(arguments.held_out) if arguments.held_out else photos[::4]
    used = [photo for photo in photos if photo not in held_out]
    if not used:
        raise ArgumentError(f"{arguments.images} holds one picture only.", "Give several, or others as --held-out.")
    with ProgressSteps() as steps:
        # Photos that are alike often lie side by side in a directory, so crops are taken from all over it.
        images, others = (
            crops(paths[:: max(1, len(paths) // arguments.crops)], arguments.crops, bundle.config.image_size)
            for paths in (used, held_out)
        )
        found = calibrate(bundle, images, others, steps)
    print(
        f"{bundle.path}, ranges from {len(images)} crops of {len(used)} photos, "
        f"measured on {len(others)} crops of {len(held_out)} others "
        f"(the tokenizer itself: {found['int8'].own_psnr:.1f} dB):"
    )
    for dtype, cost in found.items():
        print(
            f"  {dtype:>4}  {cost.mean_psnr:.1f} dB, {cost.least_psnr:.1f} at least; "
            f"SSIM {cost.mean_ssim:.4f}, {cost.least_ssim:.4f} at least; "
            f"{cost.convolutions} convolutions, {cost.kept} kept in half; quantile {cost.quantile:g}"
        )


def inspect(arguments: argparse.Namespace) -> None:
    """Print the tensors that differ most from float32."""
    from tokenflow_export.precision.inspect_layers import inspect_graph
    from tokenflow_sdk.bundle.bundle import Bundle
    from tokenflow_sdk.bundle.model_config import TokenizerConfig
    from tokenflow_sdk.parity.tokenizer import TokenizerReference

    bundle = Bundle.open(arguments.bundle, TokenizerConfig)
    reference = TokenizerReference.load(bundle)
    feed = bundle.graph(arguments.graph).inputs[0].name
    feeds = {feed: (reference.images if feed == "images" else reference.code_indices)[:1]}
    found = inspect_graph(bundle, arguments.graph, feeds, arguments.precision, arguments.backend)
    worst = set(sorted(found, key=lambda drift: drift.relative, reverse=True)[: arguments.top])
    print(f"{arguments.graph} in {arguments.precision} on {arguments.backend} against fp32 in onnxruntime:")
    print(f"  {len(found)} tensors in common; of these the {len(worst)} that differ most, in the order of the graph")
    for drift in found:
        if drift in worst:
            print(f"  {drift.relative:9.2e}  {'x'.join(map(str, drift.shape)):>20}  {drift.name}")
