"""Compares the paged transformer in all precisions: size, agreement with float32, and time of a step, in turns.

The model has random weights, hidden 1024 and 8 layers; a step has two rows, as guidance needs.

    python benchmarks/precision.py
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.common import machine
from benchmarks.generator_vs_eager import SIZES, standin
from tests.support.mini_generator import export_quietly
from tokenflow_export.tracing.weight_quantization import FULL_PRECISION, ExportPrecision
from tokenflow_sdk.backends.onnxruntime import OnnxRuntimeSession
from tokenflow_sdk.backends.session import Session, SessionOptions
from tokenflow_sdk.bundle.bundle import Bundle
from tokenflow_sdk.bundle.model_config import GeneratorConfig

PRECISIONS = (
    FULL_PRECISION,
    ExportPrecision("fp16"),
    ExportPrecision("fp32", "int8"),
    ExportPrecision("fp32", "int4"),
    ExportPrecision("fp16", "int4"),
)
STEPS = ((1, 144), (16, 160), (64, 256), (256, 720))
"""Queries and cached tokens of a row, for each kind of step."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "precision_cpu")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        report = measure(Path(directory), arguments.threads, arguments.rounds)
    arguments.out.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n")
    text = as_markdown(report)
    arguments.out.with_suffix(".md").write_text(text)
    print(text)


def measure(directory: Path, threads: int, rounds: int) -> dict[str, Any]:
    checkpoint, tokenizer = standin(directory, SIZES)
    sessions: dict[str, Session] = {}
    rows: dict[str, dict[str, Any]] = {}
    for precision in PRECISIONS:
        out = export_quietly(checkpoint, tokenizer, directory / precision.name.replace(" ", "_"), precision)
        bundle = Bundle.open(out, GeneratorConfig)
        entry = bundle.graph("transformer")
        options = SessionOptions(device="cpu", threads=threads)
        sessions[precision.name] = OnnxRuntimeSession(out / entry.files[0].name, entry, options)
        size = sum(file.size for file in entry.files)
        rows[precision.name] = {"bytes": size, "parity": bundle.parity, "steps": []}
    for queries, context in STEPS:
        seconds = time_step(sessions, queries, context, rounds)
        for name, value in seconds.items():
            rows[name]["steps"].append({"queries": queries, "context": context, "seconds": value})
    return {"machine": machine(), "threads": threads, "rounds": rounds, "precisions": rows}


def time_step(sessions: dict[str, Session], queries: int, context: int, rounds: int) -> dict[str, float]:
    """The median seconds of a step in each precision; the precisions take turns."""
    rng = np.random.default_rng(0)
    heads = SIZES["num_attention_heads"]
    width, pages = SIZES["hidden_size"], -(-context // 16)
    pool = rng.standard_normal((2, SIZES["num_hidden_layers"] * 2 * pages, 16, heads, width // heads), np.float32)
    feeds = {
        "embeddings": rng.standard_normal((2, queries, width), np.float32),
        "positions": np.tile(np.arange(context, context + queries, dtype=np.int32), (2, 1)),
        "visible": np.full((2, queries), queries, np.int32),
        "context": np.full(2, context, np.int32),
        "block_tables": np.arange(2 * pages, dtype=np.int32).reshape(2, pages),
    }
    taken: dict[str, list[float]] = {name: [] for name in sessions}
    for i in range(rounds + 1):
        for name, session in sessions.items():
            dtype = next(spec.dtype for spec in session.inputs if spec.name == "k_pages")
            own = feeds | {"k_pages": pool[0].astype(dtype), "v_pages": pool[1].astype(dtype)}
            began = perf_counter()
            session.run(own)
            taken[name] += [perf_counter() - began] if i else []
    return {name: median(values) for name, values in taken.items()}


def as_markdown(report: dict[str, Any]) -> str:
    machine_, rows = report["machine"], report["precisions"]
    base = rows["fp32"]
    lines = [
        "# The paged transformer in every precision, CPU",
        "",
        f"{machine_['cpu']}, {report['threads']} threads; Python {machine_['python']}, torch {machine_['torch']}, onnxruntime "
        f"{machine_['onnxruntime']}. Hidden {SIZES['hidden_size']}, {SIZES['num_hidden_layers']} layers, random weights, two "
        f"rows. Median of {report['rounds']} alternating steps; `python benchmarks/precision.py`.",
        "",
        "| precision | size | same code | overlap | " + " | ".join(f"{q} queries, {c} cached" for q, c in STEPS) + " |",
        "| --- " * (4 + len(STEPS)) + "|",
    ]
    for name, row in rows.items():
        times = [
            f"{step['seconds'] * 1e3:.0f} ms ({first['seconds'] / step['seconds']:.2f}x)"
            for step, first in zip(row["steps"], base["steps"], strict=True)
        ]
        parity = row["parity"]
        figures = [f"{row['bytes'] / 1e6:.0f} MB", f"{parity['same_code']:.1%}", f"{parity['overlap']:.1%}", *times]
        lines.append(f"| {name} | " + " | ".join(figures) + " |")
    lines += [
        "",
        "Same code: positions whose likeliest code is float32 PyTorch's; overlap: probability that both distributions",
        "share. In brackets: times faster than fp32. onnxruntime's CPU engine computes fp16 in float32; it is for GPUs.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
