"""`tokenflow verify`: checks a bundle's files against their hashes, and its results on this machine against its reference."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tokenflow_sdk.arguments import integer
from tokenflow_sdk.backends.onnxruntime import open_onnxruntime
from tokenflow_sdk.backends.openvino import OPENVINO
from tokenflow_sdk.backends.tensorrt_module import FLAVOURS
from tokenflow_sdk.bundle.bundle import Bundle, open_bundle
from tokenflow_sdk.bundle.model_config import TokenizerConfig
from tokenflow_sdk.cli.console import make_table, stderr, stdout
from tokenflow_sdk.cli.opening import bundle_paths, runtime_options, shown_path
from tokenflow_sdk.cli.progress import progress_bar
from tokenflow_sdk.engines.build_config import ONNXRUNTIME, BuildConfig
from tokenflow_sdk.engines.choice import Needs, engines_for, require_by_picture
from tokenflow_sdk.engines.openvino_models import FewerBits
from tokenflow_sdk.engines.options import RuntimeOptions
from tokenflow_sdk.parity.certificate import certify
from tokenflow_sdk.parity.tokenizer import check_tokenizer
from tokenflow_sdk.tokenizer import Tokenizer

__all__ = ["verify", "verify_bundles"]


def verify(arguments: argparse.Namespace) -> int:
    """Verify every bundle under a name."""
    given = arguments.batch_limit
    limit = 1 if given is None else integer("batch_limit", given, 1, 2**31 - 1, "is no number of images in a call.", "Give 1.")
    verify_bundles(bundle_paths(arguments), runtime_options(arguments), limit, arguments.sha256)
    return 0


def verify_bundles(paths: Iterable[Path], options: RuntimeOptions, batch_limit: int = 1, sha256: str | None = None) -> None:
    """Check bundles, and print how they agree with their references.

    Args:
        paths: their directories.
        options: the backend to check. Where it is OpenVINO, language models beside a tokenizer are checked on onnxruntime.
        batch_limit: most images in a call; engines must be built for as many.
        sha256: SHA-256 that bundle.json must have; None: any.

    Raises:
        CorruptBundleError: a file is missing or damaged.
        ParityError, EngineRefusedError: a bundle does not reproduce its reference.
    """
    found = [open_bundle(path, sha256) for path in paths]
    has_tokenizer = any(isinstance(bundle.config, TokenizerConfig) for bundle in found)
    for bundle in found:
        path, is_tokenizer = bundle.path, isinstance(bundle.config, TokenizerConfig)
        runtime = options.for_language_models() if has_tokenizer and not is_tokenizer else options
        wanted, config = runtime.wanted(), runtime.loaded_build_config()
        if wanted in FLAVOURS:
            _verify_engines(path, runtime, batch_limit)
        elif wanted == OPENVINO and config is not None:
            _verify_fewer_bits(bundle, runtime, config)
        elif is_tokenizer:
            with stderr.step(f"opening {shown_path(path)}"):
                tokenizer = Tokenizer.open(path, runtime, batch_limit)
            with tokenizer:
                _verify_tokenizer(tokenizer)
        else:
            _verify_language_model(path, runtime)
        stdout.print(f"{shown_path(path)}: bundle.json has the SHA-256 {bundle.sha256}", soft_wrap=True)
    stdout.print("files and numbers are right", style="green")


def _verify_tokenizer(tokenizer: Tokenizer) -> None:
    with progress_bar("comparing with PyTorch", 100) as done:
        report = check_tokenizer(tokenizer.graphs, progress=lambda fraction: done(round(100 * fraction)))
    title = f"{tokenizer.config.variant}: {report.pictures} pictures, teacher-forced"
    table = make_table("scale", "codes", "agreement", title=title)
    scales = tokenizer.config.scales
    for side, count, share in zip(scales.sides, scales.counts, report.agreement, strict=True):
        table.add_row(f"{side} x {side}", str(count * report.pictures), f"{share:.2%}")
    stdout.print(table)
    for flip in report.flips[:20]:
        stdout.print(f"flip: picture {flip.picture}, scale {flip.scale + 1}, cell {flip.position}, margin {flip.margin:.1e}")
    stdout.print(f"codes equal {report.equal_codes:.2%}, decoded pictures {report.decode_psnr:.1f} dB")
    stdout.print(f"largest error: features {report.features_error:.1e}, semantic features {report.semantic_error:.1e}")
    report.require(str(tokenizer.bundle.path))


def _verify_language_model(path: Path, options: RuntimeOptions) -> None:
    """Compare the graphs' results on onnxruntime here with those at export."""
    bundle = open_bundle(path)
    if options.backend == OPENVINO:
        require_by_picture(bundle)
    with ExitStack() as stack:
        stack.enter_context(stderr.step(f"running {shown_path(path)}"))
        bundle.verify()
        certificate = certify(bundle, lambda file, entry, _: open_onnxruntime(file, entry, options.session), "fp32", pages=64)
    stdout.print(f"{shown_path(path)} on {ONNXRUNTIME}: {certificate.summary}", soft_wrap=True)
    certificate.require(str(path))


def _verify_fewer_bits(bundle: Bundle[Any], options: RuntimeOptions, config: BuildConfig) -> None:
    """Compare what OpenVINO computes in the bits of a build config with the reference, also if that was done before."""
    require_by_picture(bundle)
    with stderr.step(f"running {shown_path(bundle.path)} on {OPENVINO}"):
        bundle.verify()
        fewer = FewerBits(bundle, config, options.session)
        certificate = fewer.certify()
    stdout.print(f"{shown_path(bundle.path)} on {OPENVINO}: {certificate.summary}", soft_wrap=True)
    fewer.require(certificate)
    stdout.print("certified", style="green")


def _verify_engines(path: Path, options: RuntimeOptions, batch_limit: int) -> None:
    bundle = open_bundle(path)
    engines = engines_for(bundle, options, Needs(batch_limit))
    with stderr.step(f"running {shown_path(path)} on {options.backend}"):
        bundle.verify()
        certificate = engines.recertify()
    stdout.print(f"{shown_path(path)} on {options.backend}: {certificate.summary}", soft_wrap=True)
    certificate.require(str(path))
    stdout.print("certified", style="green")
