"""`tokenflow bench`: time every graph of a bundle on this machine."""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import median
from time import perf_counter

import numpy as np
from rich.progress import Progress
from rich.table import Table

from tokenflow_sdk import __version__
from tokenflow_sdk.cli.engine import open_tokenizer, stderr, stdout
from tokenflow_sdk.errors import ArgumentError
from tokenflow_sdk.files import write_atomic
from tokenflow_sdk.tokenizer import Tokenizer

__all__ = ["bench"]


@dataclass(frozen=True)
class _Row:
    graph: str
    batch: int
    median_s: float
    worst_s: float


def bench(arguments: argparse.Namespace) -> int:
    """Median and worst time of encode, decode, semantic and features, by batch size."""
    batches = _batches(arguments.batch)
    if arguments.repeat < 1:
        raise ArgumentError(f"--repeat {arguments.repeat} times nothing.", "Give at least 1.")
    arguments.batch_limit = max(arguments.batch_limit, *batches)
    rows: list[_Row] = []
    with (
        open_tokenizer(arguments) as tokenizer,
        Progress(console=stderr, transient=True, disable=not stderr.is_terminal) as progress,
    ):
        began = perf_counter()
        tokenizer.load()
        loading = perf_counter() - began
        calls = _calls(tokenizer)
        task = progress.add_task("timing", total=len(batches) * len(calls) * (arguments.repeat + 1))
        for batch in batches:
            for name, call in calls.items():
                seconds = []
                for i in range(arguments.repeat + 1):
                    began = perf_counter()
                    call(batch)
                    # The first call warms caches and memory up.
                    seconds += [perf_counter() - began] if i else []
                    progress.advance(task)
                rows.append(_Row(name, batch, median(seconds), max(seconds)))
        device = tokenizer.device
    table = Table("graph", "batch", "median ms", "worst ms", "pictures/s", title=f"{tokenizer.config.variant} on {device}")
    for row in rows:
        figures = (f"{row.median_s * 1e3:.1f}", f"{row.worst_s * 1e3:.1f}", f"{row.batch / row.median_s:.2f}")
        table.add_row(row.graph, str(row.batch), *figures)
    stdout.print(table)
    stdout.print(f"all graphs loaded in {loading:.2f} s; {arguments.repeat} timed calls each after one to warm up")
    if arguments.json:
        machine = {"machine": platform.machine(), "system": platform.platform(), "sdk": __version__}
        result = {
            "bundle": str(tokenizer.bundle.path),
            "device": device,
            "load_s": loading,
            "rows": [asdict(row) for row in rows],
        } | machine
        write_atomic(arguments.json, json.dumps(result, indent=2).encode())
    return 0


def _calls(tokenizer: Tokenizer) -> dict[str, Callable[[int], object]]:
    c, rng = tokenizer.config, np.random.default_rng(0)
    images = rng.integers(0, 256, (1, c.image_size, c.image_size, 3), np.uint8)
    indices = rng.integers(0, c.codebook_size, (1, c.n_codes), np.int32)
    codes = tokenizer.codes(indices[0])
    return {
        "encode": lambda batch: tokenizer.encode_array(np.repeat(images, batch, axis=0)),
        "decode": lambda batch: tokenizer.decode_array(np.repeat(indices, batch, axis=0)),
        "semantic": lambda batch: [tokenizer.semantic(codes) for _ in range(batch)],
        "features": lambda batch: [tokenizer.features(codes) for _ in range(batch)],
    }


def _batches(text: str) -> list[int]:
    try:
        batches = [int(part) for part in text.split(",")]
    except ValueError:
        batches = []
    if not batches or min(batches) < 1:
        raise ArgumentError(f"--batch {text!r} is no list of sizes.", "Write it as --batch 1,4,8.")
    return batches
