"""Writes the figures of a run, as JSON and as Markdown."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.request import TITLES
from tokenflow_sdk.files import write_atomic

__all__ = ["add_roofline", "as_markdown", "problems", "write"]

_WIDTHS = {"float32": 4, "float16": 2}
"""The bytes of a number, by dtype."""


def add_roofline(report: Mapping[str, Any]) -> None:
    """Add its FLOP/s and its roofline to each row of the tokenizers that has measured peaks.

    The roofline is the attainable seconds, what bounds them, and their share of the median.
    """
    peaks = _roof(report)
    for tokenizer in report["tokenizers"]:
        for row in tokenizer.get("rows", ()):
            flops, weights = (tokenizer[name].get(row["graph"]) for name in ("flops", "weights"))
            if "median_s" not in row or flops is None or row["dtype"] not in peaks or "copy" not in peaks:
                continue
            row["flop_per_s"] = flops * row["pictures_per_s"]
            bounds = {
                "product": flops * row["batch"] / peaks[row["dtype"]],
                "weights": weights * _WIDTHS[row["dtype"]] / peaks["copy"],
            }
            row["bound"] = max(bounds, key=lambda name: bounds[name])
            row["attainable_s"] = bounds[row["bound"]]
            row["share_of_attainable"] = row["attainable_s"] / row["median_s"]


def problems(report: Mapping[str, Any]) -> list[str]:
    """List the problems of a run in sentences: sides with wrong results, and parts that failed."""
    found = []
    for name, part in [(t["variant"], t) for t in report["tokenizers"]] + [("the generator", report["generator"] or {})]:
        reasons = dict.fromkeys(f"{TITLES[row['side']]}: {row['wrong']}" for row in part.get("rows", ()) if "wrong" in row)
        if reasons:
            found.append(f"WRONG RESULTS of {name}, which were not timed. {' | '.join(reasons)}. Report this with the figures.")
    return found + [f"Not everything was measured: {failed['part']}: {failed['why']}" for failed in report["failed"]]


def _roof(report: Mapping[str, Any]) -> dict[str, float]:
    """The peaks by name: the better of the two measurements of each."""
    measured = [peak for moment in report["peaks"].values() for peak in moment.items()]
    return {name: max(rate for other, rate in measured if other == name) for name, _ in measured}


def write(report: Mapping[str, Any], out: Path) -> tuple[Path, Path]:
    """Write OUT.json and OUT.md.

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
    if (report["generator"] or {}).get("rows"):
        sections += _generator(report["generator"])
    return "\n".join([*sections, *_notes(report)]) + "\n"


def _head(report: Mapping[str, Any]) -> Iterable[str]:
    device, pace = report["device"], report["pace"]
    details = (
        [str(device["architecture"]), f"driver {device['driver']}", f"CUDA {device['cuda']}"] if "driver" in device else []
    )
    wrong = [f"**{sentence}**" for sentence in problems(report)]
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    yield from (
        f"# tokenflow-sdk against PyTorch: {device['name']}",
        "",
        *(line for sentence in wrong for line in (sentence, "")),
        f"{', '.join([device['name'], *details])}; {versions}.",
        "",
        f"    {report['command']}",
        "",
        f"Same weights, one process, sides in turns; median and 95th percentile of up to {pace['rounds']} calls (fewer, but at "
        "least five, where they take long), after warming up. Pictures start as u8 and codes end as int32 on the host, or the "
        "other way round, on every side. Float32 is without TF32.",
        "",
        "What PyTorch reaches on this device, measured in this run, before and after everything else:",
        "",
        *_table(("", "before", "after")),
        *(_row([_peak_name(name, report["product_size"]), *_peak(report, name)], 3) for name in _roof(report)),
        "",
        "The roofline of a row is the larger of two times: its work at the rate of the product of its type, and its weights, "
        "read once, at the rate of the copy. `attainable` is that time, with what bounds it, and `reached` its share of the "
        "median. PyTorch's product of float16 adds in float32, so kernels that add in float16 may exceed 100 %.",
    )


def _peak_name(name: str, size: int) -> str:
    what = (
        "copy of one matrix of float32, TB/s read and written"
        if name == "copy"
        else f"product of two matrices of {name}, TFLOP/s"
    )
    return f"{what} ({size:,} x {size:,})"


def _peak(report: Mapping[str, Any], name: str) -> Iterable[str]:
    for moment in ("before", "after"):
        rate = report["peaks"].get(moment, {}).get(name)
        yield "" if rate is None else f"{rate / 1e12:,.2f}"


def _tokenizer(found: Mapping[str, Any]) -> Iterable[str]:
    yield from ("", f"## {found['variant']}")
    rows = found.get("rows", ())
    for graph in dict.fromkeys(row["graph"] for row in rows):
        yield ""
        if graph in found["flops"]:
            flops, weights = found["flops"][graph], found["weights"][graph]
            yield (
                f"{graph}: {flops / 1e9:,.2f} GFLOP a picture, {flops / 2e9:,.2f} G multiply-adds, {weights / 1e6:,.1f} M "
                "weights, counted in the graph."
            )
        else:
            yield f"{graph}: its work could not be counted."
        yield ""
        yield from _table(("batch", "side", "median", "p95", "pictures/s", "memory", "TFLOP/s", "attainable", "reached"))
        for row in rows:
            if row["graph"] == graph:
                yield _row([str(row["batch"]), _title(row), *_figures(row), *_roofline(row)], 9)
    if found.get("parity"):
        yield from ("", "Results against onnxruntime on the CPU, on four crops of a photo:", "")
        yield from _table(("side", "equal codes", "teacher-forced", "decoded", "tolerances missed"))
    for key, figures in found.get("parity", {}).items():
        decoded = "identical" if figures["decode_psnr"] is None else f"{figures['decode_psnr']:.1f} dB"
        missed = "; ".join(figures["failures"])
        yield _row([TITLES[key], f"{figures['equal_codes']:.2%}", f"{figures['agreement']:.2%}", decoded, missed], 5)


def _title(row: Mapping[str, Any]) -> str:
    held = f" (for at most {row['largest_batch']} at once: more do not fit)" if "largest_batch" in row else ""
    return f"{TITLES[row['side']]}{held}"


def _roofline(row: Mapping[str, Any]) -> Sequence[str]:
    if "flop_per_s" not in row:
        return ()
    attainable = f"{row['attainable_s'] * 1e3:,.2f} ms ({row['bound']})"
    return f"{row['flop_per_s'] / 1e12:.2f}", attainable, f"{row['share_of_attainable']:.0%}"


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
        yield _row([row["preset"], str(row["pictures"]), _title(row), *_figures(row), *equal], 8)
    yield ""
    for key, figures in found["parity"].items():
        yield (
            f"- {TITLES[key]}, against its bundle's reference: hidden states have a cosine of {figures['hidden_cosine']:.5f}, "
            f"the likeliest code is the same at {figures['same_choice']:.1%}."
        )


def _notes(report: Mapping[str, Any]) -> Iterable[str]:
    yield from (
        "",
        "Memory of tokenflow-sdk is what the device has less of, by cudaMemGetInfo, once a side is open and has run: weights, "
        "working memory, and what its engine keeps for later. Memory of PyTorch is weights, and the peak of its allocator "
        "(torch.cuda.max_memory_allocated) in a call over what was allocated before: what is alive at once. Work is counted "
        "alike for all sides, from the bundle's graph: a multiply-add is two. Equal codes is lower than teacher-forced "
        "agreement because one code that differs changes all finer scales.",
    )
    if "memory_bytes" not in report["device"]:
        yield from ("", "This run was on a CPU, to try the benchmark out: no memory is measured.")


def _figures(row: Mapping[str, Any]) -> Sequence[str]:
    """The four cells with figures, or one that says why there are none."""
    if "wrong" in row:
        return (f"WRONG RESULTS, not timed: {row['wrong'].replace('|', '/')}",)
    if "why" in row:
        return (f"not available: {row['why'].replace('|', '/')}",)
    memory = "" if row["memory_bytes"] is None else f"{row['memory_bytes'] / 1e6:,.0f} MB"
    times = [f"{row[name] * 1e3:,.2f} ms" for name in ("median_s", "p95_s")]
    return (*times, f"{row['pictures_per_s']:,.2f}", memory)


def _table(names: Sequence[str]) -> Sequence[str]:
    return _row(list(names), len(names)), "| --- " * len(names) + "|"


def _row(cells: Sequence[str], width: int) -> str:
    return "| " + " | ".join([*cells, *[""] * (width - len(cells))]) + " |"
