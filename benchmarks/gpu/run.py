"""A whole run: the device, its roofline, the tokenizers, the generator, the report."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import ROOT, prepare
from benchmarks.gpu.device import Device, open_device, product_rate, versions
from benchmarks.gpu.generators import Drawing, measure_generator, standin_generator
from benchmarks.gpu.report import add_rates, as_markdown, write
from benchmarks.gpu.request import DTYPES, VARIANT, Request
from benchmarks.gpu.timing import Pace, bar, console
from benchmarks.gpu.tokenizers import Work, measure_tokenizer

__all__ = ["run"]


def run(request: Request) -> None:
    """Measure, print, and write.

    Raises:
        TokenFlowError: something is missing or cannot be used.
        ParityError: tokenflow-sdk computes something wrong; nothing is written.
    """
    device = open_device(request.device, request.threads)
    report = _empty_report(request, device)
    try:
        _measure(report, request, device)
    finally:
        # Of a run that fails in the end, what it had measured is shown, though not written.
        if report["tokenizers"] or report["generator"]:
            print(as_markdown(report))
    out = request.out
    if out is None and device.on_gpu:
        others = "" if request.variants == (VARIANT,) else "_".join(("", *request.variants))
        out = ROOT / "benchmarks" / "results" / f"gpu_{device.slug}{others}"
    if out is not None:
        console.print(f"written: {', '.join(map(str, write(report, out)))}", markup=False, soft_wrap=True)


def _empty_report(request: Request, device: Device) -> dict[str, Any]:
    """What is known before anything is measured."""
    return {
        "command": request.command,
        "device": device.about(),
        "versions": versions(),
        "pace": {"rounds": request.rounds, "seconds": request.seconds},
        "product_size": request.product_size,
        "products": {},
        "tokenizers": [],
        "generator": None,
    }


def _measure(report: dict[str, Any], request: Request, device: Device) -> None:
    """Fill a report in."""
    pace = Pace(request.rounds, request.seconds)
    work = Work(device, request.sides, request.graphs, request.batches, pace, request.threads)
    for dtype in sorted({DTYPES[side] for side in request.sides}, reverse=True):
        with bar(f"a plain product in {dtype}"):
            report["products"][dtype] = product_rate(device, dtype, request.product_size)
    if "tokenizer" in request.parts:
        for variant in request.variants:
            found = _tokenizer(request, variant, work)
            add_rates(found, report["products"])
            report["tokenizers"].append(found)
    if "generator" in request.parts:
        report["generator"] = _generator(request, work)


def _tokenizer(request: Request, variant: str, work: Work) -> dict[str, Any]:
    checkpoint = request.checkpoint or ROOT / "checkpoints" / f"{variant}.pt"
    bundle = request.bundle or ROOT / "bundles" / variant
    prepare(variant, checkpoint, bundle)
    try:
        return measure_tokenizer(variant, checkpoint, bundle, work)
    finally:
        if "compile" in work.sides:
            # It keeps the model, and counts what it has compiled of a function.
            torch.compiler.reset()
        work.device.clear()


def _generator(request: Request, work: Work) -> dict[str, Any]:
    if request.generator is not None:
        drawing = Drawing(request.generator, request.generator_checkpoint, request.prompt, request.pictures)
        return measure_generator(drawing, work)
    with tempfile.TemporaryDirectory(prefix="tokenflow-") as directory:
        checkpoint, bundle = standin_generator(Path(directory), request.sizes)
        return measure_generator(Drawing(bundle, checkpoint, request.prompt, request.pictures), work)
