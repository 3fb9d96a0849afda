"""The figures of a run, as JSON and as a page to read."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.request import TITLES
from tokenflow_sdk.files import write_atomic

__all__ = ["add_rates", "as_markdown", "write"]


def add_rates(tokenizer: Mapping[str, Any], products: Mapping[str, float]) -> None:
    """Write into each row of a tokenizer what it achieved: FLOP/s, and their share of those of a product of its type."""
    for row in tokenizer["rows"]:
        if "median_s" in row:
            row["flop_per_s"] = tokenizer["flops"][row["graph"]] * row["pictures_per_s"]
            row["share_of_product"] = row["flop_per_s"] / products[row["dtype"]]


def write(report: Mapping[str, Any], out: Path) -> tuple[Path, Path]:
    """OUT.json and OUT.md.

    Raises:
        OutputError: they cannot be written.
    """
    found = out.parent / f"{out.name}.json", out.parent / f"{out.name}.md"
    for path, text in zip(found, (json.dumps(report, indent=2) + "\n", as_markdown(report)), strict=True):
        write_atomic(path, text.encode())
    return found


def as_markdown(report: Mapping[str, Any]) -> str:
    sections = [*_head(report)]
    for tokenizer in report["tokenizers"]:
        sections += _tokenizer(tokenizer)
    if report["generator"] is not None:
        sections += _generator(report["generator"])
    return "\n".join([*sections, *_notes(report)]) + "\n"


def _head(report: Mapping[str, Any]) -> Iterable[str]:
    device, pace = report["device"], report["pace"]
    details = (
        [str(device["architecture"]), f"driver {device['driver']}", f"CUDA {device['cuda']}"] if "driver" in device else []
    )
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    products = [f"{rate / 1e12:,.2f} TFLOP/s in {dtype}" for dtype, rate in report["products"].items()]
    yield from (
        f"# tokenflow-sdk against PyTorch: {device['name']}",
        "",
        f"{', '.join([device['name'], *details])}; {versions}.",
        "",
        f"    {report['command']}",
        "",
        f"Same weights, one process, sides in turns; median and 95th percentile of up to {pace['rounds']} calls (fewer, but at "
        "least five, where they take long), after warming up. Pictures start as u8 and codes end as int32 on the host, or the "
        "other way round, on every side. Float32 is without TF32.",
        "",
        f"A plain product of two {report['product_size']:,} x {report['product_size']:,} matrices in PyTorch reaches, in this "
        f"run, {' and '.join(products)}: what the last column is a share of.",
    )


def _tokenizer(found: Mapping[str, Any]) -> Iterable[str]:
    yield from ("", f"## {found['variant']}")
    for graph, flops in found["flops"].items():
        yield from (
            "",
            f"{graph}: {flops / 1e9:,.2f} GFLOP a picture, {flops / 2e9:,.2f} G multiply-adds, counted in the graph.",
            "",
            *_table(("batch", "side", "median", "p95", "pictures/s", "memory", "TFLOP/s", "of product")),
        )
        for row in found["rows"]:
            if row["graph"] == graph:
                rates = () if "why" in row else (f"{row['flop_per_s'] / 1e12:.2f}", f"{row['share_of_product']:.0%}")
                yield _row([str(row["batch"]), TITLES[row["side"]], *_figures(row), *rates], 8)
    yield from ("", "Results against onnxruntime on the CPU, on four crops of a photo:", "")
    yield from _table(("side", "equal codes", "teacher-forced", "decoded"))
    for key, figures in found["parity"].items():
        decoded = "identical" if figures["decode_psnr"] is None else f"{figures['decode_psnr']:.1f} dB"
        yield _row([TITLES[key], f"{figures['equal_codes']:.2%}", f"{figures['agreement']:.2%}", decoded], 4)


def _generator(found: Mapping[str, Any]) -> Iterable[str]:
    yield from (
        "",
        "## Text to image",
        "",
        f"Width {found['width']}, {found['layers']} layers, {found['codes']} codes a picture, a prompt of {found['prompt']} "
        "ids; codes only, decoding is above. PyTorch runs the whole sequence at every pass, as upstream does, and the time in "
        "which it draws codes from logits does not count.",
        "",
        *_table(("preset", "pictures", "side", "median", "p95", "pictures/s", "memory", "equal codes")),
    )
    for row in found["rows"]:
        equal = (f"{row['equal_codes']:.1%}",) if "equal_codes" in row else ("",)
        yield _row([row["preset"], str(row["pictures"]), TITLES[row["side"]], *_figures(row), *equal], 8)
    yield ""
    for key, figures in found["parity"].items():
        yield (
            f"- {TITLES[key]}, against its bundle's reference: hidden states have a cosine of {figures['hidden_cosine']:.5f}, "
            f"the likeliest code is the same at {figures['same_code']:.1%}."
        )


def _notes(report: Mapping[str, Any]) -> Iterable[str]:
    yield from (
        "",
        "Memory of tokenflow-sdk is what the device has less of, by cudaMemGetInfo, once a side is open and has run: weights, "
        "working memory, and what its engine keeps for later. Memory of PyTorch is the peak of its allocator "
        "(torch.cuda.max_memory_allocated): all weights of the model, and what is alive at once. Work is counted alike for "
        "all sides, from the bundle's graph: a multiply-add is two. Equal codes is lower than teacher-forced agreement "
        "because one code that differs changes all finer scales.",
    )
    if "memory_bytes" not in report["device"]:
        yield from ("", "This run was on a CPU, to try the benchmark out: no memory is measured.")


def _figures(row: Mapping[str, Any]) -> Sequence[str]:
    """Four cells, or one that says why there are none."""
    if "why" in row:
        return (f"not available: {row['why'].replace('|', '/')}",)
    memory = "" if row["memory_bytes"] is None else f"{row['memory_bytes'] / 1e6:,.0f} MB"
    times = [f"{row[name] * 1e3:,.2f} ms" for name in ("median_s", "p95_s")]
    return (*times, f"{row['pictures_per_s']:,.2f}", memory)


def _table(names: Sequence[str]) -> Sequence[str]:
    return _row(list(names), len(names)), "| --- " * len(names) + "|"


def _row(cells: Sequence[str], width: int) -> str:
    return "| " + " | ".join([*cells, *[""] * (width - len(cells))]) + " |"
