"""Encoding and decoding, side against side: results first, then memory, then time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.gpu.codecs import Codec, Side, load_eager, sdk_sides, torch_sides
from benchmarks.gpu.comparison import compare, reference_of, require_right, require_same_weights
from benchmarks.gpu.device import Device
from benchmarks.gpu.flops import count_flops
from benchmarks.gpu.request import TORCH
from benchmarks.gpu.timing import Call, Pace, Times, alternate, bar, say_why
from tokenflow_sdk.bundle import Bundle
from tokenflow_sdk.config import TokenizerConfig
from tokenflow_sdk.errors import EngineRefusedError
from tokenflow_sdk.parity import Reference

__all__ = ["Work", "measure_tokenizer", "result"]


@dataclass(frozen=True)
class Work:
    """What is measured. `sides` are keys of `request.TITLES`, `threads` those of a CPU call."""

    device: Device
    sides: tuple[str, ...]
    graphs: tuple[str, ...]
    batches: tuple[int, ...]
    pace: Pace
    threads: int | None = None


def measure_tokenizer(variant: str, checkpoint: Path, bundle_path: Path, work: Work) -> dict[str, Any]:
    """Figures of one tokenizer.

    Raises:
        CheckpointError, BundleError: the files cannot be used, or do not belong together.
        ParityError: a side of tokenflow-sdk computes something else.
    """
    bundle = Bundle.open(bundle_path, TokenizerConfig)
    sides = _sides(variant, checkpoint, bundle, work)
    with bar(f"{variant}: the reference, in onnxruntime on the CPU"):
        reference = reference_of(bundle, work.threads)
    parity, missing = _compare_all(variant, sides, reference)
    if "torch" in parity:
        require_same_weights(parity["torch"], checkpoint, bundle_path)
    require_right(parity, variant)
    rows = []
    for graph in work.graphs:
        with _Graph(graph, variant, reference, work) as measured:
            measured.load(sides, missing)
            rows += measured.rows(sides)
    flops = {graph: count_flops(bundle.path / bundle.graph(graph).files[0].name) for graph in work.graphs}
    return {"variant": variant, "flops": flops, "parity": parity, "rows": rows}


def _sides(variant: str, checkpoint: Path, bundle: Bundle[TokenizerConfig], work: Work) -> list[Side]:
    sides = sdk_sides(bundle, work.device, work.batches, work.threads)
    if set(TORCH) & set(work.sides):
        model = load_eager(checkpoint, variant, work.device)
        sides = torch_sides(model, bundle.config, work.device) + sides
    return [side for side in sides if side.key in work.sides]


def _compare_all(variant: str, sides: Sequence[Side], reference: Reference) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """By key: figures of those that work, and why the others do not."""
    parity: dict[str, dict[str, Any]] = {}
    missing: dict[str, str] = {}
    for side in sides:
        # Engines that are built show how far they are by themselves.
        with bar(f"{variant}: comparing {side.title}", shown=not side.builds):
            try:
                with closing(side.open()) as codec:
                    parity[side.key] = compare(side, codec, reference)
            except EngineRefusedError as error:
                parity[side.key] = {"failures": [error.message]}
            except Exception as error:
                missing[side.key] = say_why(error)
    return parity, missing


class _Graph:
    """One graph, with the sides that can run it open until it is closed."""

    def __init__(self, name: str, variant: str, reference: Reference, work: Work) -> None:
        self.name, self.variant, self.work = name, variant, work
        self._data = reference.images if name == "encode" else reference.code_indices
        self._calls: dict[int, dict[str, Call]] = {batch: {} for batch in work.batches}
        self._memory: dict[tuple[int, str], int | None] = {}
        self._why: dict[tuple[int, str], str] = {}
        self._open = ExitStack()

    def __enter__(self) -> _Graph:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def load(self, sides: Sequence[Side], missing: dict[str, str]) -> None:
        """Open each side, and run every batch once: what it takes of memory, whether it can."""
        for side in sides:
            why = missing.get(side.key)
            with bar(f"{self.variant}: {self.name}, warming up {side.title}", shown=not side.builds):
                if why is None:
                    before = self.work.device.used()
                    try:
                        codec = self._open.enter_context(closing(side.open()))
                    except Exception as error:
                        why = say_why(error)
                    else:
                        self._warm_up(side, codec, before)
            if why is not None:
                self._why |= {(batch, side.key): why for batch in self.work.batches}

    def _warm_up(self, side: Side, codec: Codec, before: int | None) -> None:
        device = self.work.device
        for batch in self.work.batches:
            call = self._call(codec, np.resize(self._data, (batch, *self._data.shape[1:])))
            try:
                # The first call tries kernels out, which takes memory of its own.
                call()
                device.reset_peak()
                call()
            except Exception as error:
                self._why[batch, side.key] = say_why(error)
            else:
                used = device.used()
                held = None if used is None or before is None else used - before
                self._memory[batch, side.key] = held if side.ours else device.peak()
                self._calls[batch][side.key] = call
        # What PyTorch keeps for later would be missing to the others.
        device.release()

    def _call(self, codec: Codec, data: NDArray[np.generic]) -> Call:
        run = codec.encode_array if self.name == "encode" else codec.decode_array

        def call() -> float:
            run(data)
            return 0.0

        return call

    def rows(self, sides: Sequence[Side]) -> Iterator[dict[str, Any]]:
        """Time the sides against each other; a row for each batch and side."""
        work = self.work
        for batch in work.batches:
            title = f"{self.variant}: {self.name}, timing a batch of {batch}"
            with bar(title, work.pace.rounds + 1) as advance:
                found = alternate(self._calls[batch], work.device.synchronize, work.pace, advance)
            for side in sides:
                times = found.get(side.key) or self._why[batch, side.key]
                place = {"graph": self.name, "batch": batch, "side": side.key, "dtype": side.dtype}
                yield place | result(times, batch, self._memory.get((batch, side.key)))


def result(times: Times | str, pictures: int, memory: int | None) -> dict[str, Any]:
    """What a row says of a side: its figures, or why it has none."""
    if isinstance(times, str):
        return {"why": times}
    return {
        "median_s": times.median,
        "p95_s": times.p95,
        "calls": len(times.seconds),
        "pictures_per_s": pictures / times.median,
        "memory_bytes": memory,
    }
