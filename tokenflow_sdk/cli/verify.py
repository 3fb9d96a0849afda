"""`tokenflow verify`: are a bundle's files whole, and does an engine compute what its reference says?"""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from pathlib import Path

from rich.progress import Progress
from rich.table import Table

from tokenflow_sdk.backends.base import SessionOptions
from tokenflow_sdk.backends.choice import EngineOptions, Needs
from tokenflow_sdk.bundle import bundle_kind, bundles_in, open_bundle
from tokenflow_sdk.certificate import certify
from tokenflow_sdk.cli.engine import bundle_name, open_tokenizer, stderr, stdout
from tokenflow_sdk.config import GeneratorConfig, UnderstanderConfig
from tokenflow_sdk.parity import check_parity
from tokenflow_sdk.tensorrt_module import FLAVOURS
from tokenflow_sdk.tokenizer import Tokenizer

__all__ = ["verify"]


def verify(arguments: argparse.Namespace) -> int:
    """A bundle's hashes, and its numbers against the stored reference."""
    for path in bundles_in(bundle_name(arguments)):
        arguments.target, arguments.bundle = str(path), None
        if arguments.backend in FLAVOURS:
            _verify_engines(path, arguments)
        elif bundle_kind(path) in (GeneratorConfig.kind, UnderstanderConfig.kind):
            _verify_language_model(path, arguments)
        else:
            with open_tokenizer(arguments) as tokenizer:
                _verify_tokenizer(tokenizer)
    stdout.print("files and numbers are right", style="green")
    return 0


def _verify_tokenizer(tokenizer: Tokenizer) -> None:
    with Progress(console=stderr, transient=True, disable=not stderr.is_terminal) as progress:
        task = progress.add_task("comparing with PyTorch", total=1.0)
        report = check_parity(tokenizer, progress=lambda fraction: progress.update(task, completed=fraction))
    title = f"{tokenizer.config.variant}: {report.pictures} pictures, teacher-forced"
    table = Table("scale", "codes", "agreement", title=title)
    for side, share in zip(report.patch_nums, report.agreement, strict=True):
        table.add_row(f"{side} x {side}", str(side * side * report.pictures), f"{share:.2%}")
    stdout.print(table)
    for flip in report.flips[:20]:
        stdout.print(f"flip: picture {flip.picture}, scale {flip.scale + 1}, cell {flip.position}, margin {flip.margin:.1e}")
    stdout.print(f"codes equal {report.equal_codes:.2%}, decoded pictures {report.decode_psnr:.1f} dB")
    stdout.print(f"largest error: features {report.features_error:.1e}, semantic features {report.semantic_error:.1e}")
    report.require(str(tokenizer.bundle.path))


def _verify_language_model(path: Path, arguments: argparse.Namespace) -> None:
    """The graphs here against what they gave where they were exported."""
    from tokenflow_sdk.backends.base import open_onnxruntime

    bundle = open_bundle(path)
    options = SessionOptions(arguments.device, None, arguments.threads)
    with ExitStack() as stack:
        stack.enter_context(stderr.status(f"running {path}"))
        bundle.verify()
        certificate = certify(bundle, lambda file, entry, _: open_onnxruntime(file, entry, options), "fp32", 64, 16)
    stdout.print(f"{path}: {certificate.summary}", markup=False, soft_wrap=True)
    certificate.require(str(path))


def _verify_engines(path: Path, arguments: argparse.Namespace) -> None:
    bundle = open_bundle(path)
    wanted = EngineOptions(arguments.backend, arguments.recipe, build=False)
    engines = wanted.engines(bundle, SessionOptions(arguments.device), Needs(arguments.batch_limit))
    with stderr.status(f"running {path} on {arguments.backend}"):
        bundle.verify()
        certificate = engines.recertify()
    stdout.print(f"{path} on {arguments.backend}: {certificate.summary}", markup=False, soft_wrap=True)
    certificate.require(str(path))
    stdout.print("certified", style="green")
