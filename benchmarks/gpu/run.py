"""Runs the benchmark: measures the peaks of the device, the tokenizers and the generator, and writes the report."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import ROOT, prepare
from benchmarks.gpu.device import Device, copy_rate, open_device, product_rate, versions
from benchmarks.gpu.generators import GeneratorCase, measure_generator, standin_generator
from benchmarks.gpu.report import add_roofline, as_markdown, problems, write
from benchmarks.gpu.request import DTYPES, RTX, VARIANT, Request
from benchmarks.gpu.timing import Pace, bar, console, say_why
from benchmarks.gpu.tokenizers import Work, measure_tokenizer
from tokenflow_sdk.errors import BundleError, TokenFlowError

__all__ = ["run"]


def run(request: Request) -> list[str]:
    """Measure, print and write the report. If a part fails, the others are still measured, and its figures are kept.

    Returns:
        The problems, in sentences.

    Raises:
        TokenFlowError: there is no such device, or the results cannot be written.
    """
    device = open_device(request.device, request.threads)
    report = _empty_report(request, device)
    try:
        _measure(report, request, device)
    finally:
        # An interrupted run prints what it has measured, and writes nothing.
        measured = _rows(report) > 0
        if measured:
            print(as_markdown(report))
    out = request.out
    if out is None and device.on_gpu:
        variants = () if request.variants == (VARIANT,) else request.variants
        name = "_".join((f"gpu_{device.slug}", *variants, *((RTX,) if RTX in request.sides else ())))
        out = ROOT / "benchmarks" / "results" / name
    if out is not None and measured:
        console.print(f"written: {', '.join(map(str, write(report, out)))}", markup=False, soft_wrap=True)
    return problems(report)


def _empty_report(request: Request, device: Device) -> dict[str, Any]:
    """A report without measurements."""
    return {
        "command": request.command,
        "device": device.about(),
        "versions": versions(),
        "pace": {"rounds": request.rounds, "seconds": request.seconds},
        "product_size": request.product_size,
        "peaks": {"before": {}, "after": {}},
        "tokenizers": [],
        "generator": None,
        "failed": [],
    }


def _rows(report: dict[str, Any]) -> int:
    return sum(len(part.get("rows", ())) for part in (*report["tokenizers"], report["generator"] or {}))


def _measure(report: dict[str, Any], request: Request, device: Device) -> None:
    """Measure everything that was asked for, into a report."""
    pace = Pace(request.rounds, request.seconds)
    work = Work(device, request.sides, request.graphs, request.batches, pace, request.threads)
    with _part(report, "the peaks before"):
        _peaks(report["peaks"]["before"], request, device)
    for variant in request.variants if "tokenizer" in request.parts else ():
        found: dict[str, Any] = {"variant": variant}
        report["tokenizers"].append(found)
        with _part(report, variant):
            _tokenizer(found, request, work)
    if "generator" in request.parts:
        report["generator"] = {}
        with _part(report, "the generator"):
            _generator(report["generator"], request, work)
    with _part(report, "the peaks after"):
        _peaks(report["peaks"]["after"], request, device)
    add_roofline(report)


@contextmanager
def _part(report: dict[str, Any], name: str) -> Iterator[None]:
    """Record in the report if a part fails, and go on."""
    try:
        yield
    except Exception as error:
        why = str(error) if isinstance(error, TokenFlowError) else say_why(error)
        report["failed"].append({"part": name, "why": why})


def _peaks(found: dict[str, float], request: Request, device: Device) -> None:
    for dtype in sorted({DTYPES[side] for side in request.sides}, reverse=True):
        with bar(f"a plain product in {dtype}"):
            found[dtype] = product_rate(device, dtype, request.product_size)
    with bar("a plain copy"):
        found["copy"] = copy_rate(device, request.product_size)
    device.clear()


def _tokenizer(found: dict[str, Any], request: Request, work: Work) -> None:
    variant: str = found["variant"]
    checkpoint = request.checkpoint or ROOT / "checkpoints" / f"{variant}.pt"
    bundle = request.bundle or ROOT / "bundles" / variant
    try:
        prepare(variant, checkpoint, bundle)
    except subprocess.CalledProcessError as error:
        raise BundleError(
            f"`tokenflow export {error.cmd[3]}` of {variant} ended with status {error.returncode}.", "It says why above."
        ) from error
    try:
        measure_tokenizer(found, checkpoint, bundle, work)
    finally:
        if "compile" in work.sides:
            # Otherwise torch.compile keeps the model in memory, and soon reaches its limit of recompilations.
            torch.compiler.reset()
        work.device.clear()


def _generator(found: dict[str, Any], request: Request, work: Work) -> None:
    if request.generator is not None:
        case = GeneratorCase(request.generator, request.generator_checkpoint, request.prompt, request.pictures)
        measure_generator(found, case, work)
        return
    with tempfile.TemporaryDirectory(prefix="tokenflow-") as directory:
        checkpoint, bundle = standin_generator(Path(directory), request.sizes)
        measure_generator(found, GeneratorCase(bundle, checkpoint, request.prompt, request.pictures), work)
