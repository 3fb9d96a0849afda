"""Measures the sides that encode and decode: results first, then memory, then time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.gpu.codecs import (
    Codec,
    Side,
    TorchCodec,
    lacks_memory,
    load_eager,
    note_of,
    sdk_sides,
    torch_sides,
    with_largest,
)
from benchmarks.gpu.comparison import batch_failures, compare, reference_of, require_same_weights
from benchmarks.gpu.device import Device
from benchmarks.gpu.flops import count_flops, count_weights
from benchmarks.gpu.timing import Call, Pace, Times, alternate, bar, outcome
from tokenflow_sdk.bundle.bundle import Bundle
from tokenflow_sdk.bundle.model_config import TokenizerConfig
from tokenflow_sdk.parity.tokenizer import TokenizerReference

__all__ = ["Work", "measure_tokenizer", "result"]


@dataclass(frozen=True)
class Work:
    """What to measure, and on what. `sides` are keys of `request.TITLES`; `threads` are those of the CPU."""

    device: Device
    sides: tuple[str, ...]
    graphs: tuple[str, ...]
    batches: tuple[int, ...]
    pace: Pace
    threads: int | None = None


def measure_tokenizer(found: dict[str, Any], checkpoint: Path, bundle_path: Path, work: Work) -> None:
    """Write the figures of a tokenizer into `found`. They stay there if a later step fails.

    Args:
        found: has the name as `variant`, and gets `parity`, `flops`, `weights` and `rows`.
        checkpoint: of the tokenizer, for PyTorch.
        bundle_path: the bundle that was exported from it.
        work: what to measure.

    Raises:
        CheckpointError, BundleError: the files cannot be used, or do not belong together.
    """
    variant: str = found["variant"]
    found |= {"parity": {}, "flops": {}, "weights": {}, "rows": []}
    bundle = Bundle.open(bundle_path, TokenizerConfig)
    sides = _sides(variant, checkpoint, bundle, work)
    with bar(f"{variant}: the reference, in onnxruntime on the CPU"):
        reference = reference_of(bundle, work.threads)
    missing: dict[str, dict[str, str]] = {}
    for side in sides:
        # Builds of engines show their own progress.
        with bar(f"{variant}: comparing {side.title}", shown=not side.builds):
            missing[side.key] = _compare(side, found["parity"], reference, work)
        if side.key == "torch" and side.key in found["parity"]:
            require_same_weights(found["parity"]["torch"], checkpoint, bundle_path)
    for graph in work.graphs:
        with _Graph(graph, variant, reference, work) as measured:
            measured.load(sides, missing)
            for row in measured.rows(sides):
                found["rows"].append(row)
        path = bundle.path / bundle.graph(graph).files[0].name
        found["flops"][graph], found["weights"][graph] = count_flops(path), count_weights(path)


def _sides(variant: str, checkpoint: Path, bundle: Bundle[TokenizerConfig], work: Work) -> list[Side]:
    load = partial(load_eager, checkpoint, variant, work.device)
    sides = [
        *torch_sides(load, bundle.config, work.device),
        *sdk_sides(bundle, work.device, work.batches, work.threads),
    ]
    return [side for side in sides if side.key in work.sides]


def _compare(side: Side, parity: dict[str, dict[str, Any]], reference: TokenizerReference, work: Work) -> dict[str, str]:
    """Compare a side, write its figures into `parity`, and give what its rows say instead of times, if anything."""

    def attempt(largest: int) -> dict[str, Any]:
        with closing(side.open(largest)) as codec:
            return compare(side, codec, reference)

    try:
        parity[side.key] = with_largest(work.batches, attempt, work.device)
    except Exception as error:
        return outcome(error)
    failures = parity[side.key]["failures"]
    return {"wrong": "; ".join(failures)} if failures else {}


class _Graph:
    """Measures one graph. The sides stay open until this is closed."""

    def __init__(self, name: str, variant: str, reference: TokenizerReference, work: Work) -> None:
        self.name, self.variant, self.reference, self.work = name, variant, reference, work
        self._data = reference.images if name == "encode" else reference.code_indices
        self._calls: dict[int, dict[str, Call]] = {batch: {} for batch in work.batches}
        self._notes: dict[tuple[int, str], dict[str, Any]] = {}
        """What a row says besides times, or instead of them, by batch and side."""
        self._open = ExitStack()

    def __enter__(self) -> _Graph:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def load(self, sides: Sequence[Side], missing: Mapping[str, dict[str, str]]) -> None:
        """Open each side that has not failed, and run every batch, to measure its memory and to compare its results."""
        for side in sides:
            note = missing[side.key]
            with bar(f"{self.variant}: {self.name}, warming up {side.title}", shown=not side.builds):
                if not note:
                    try:
                        with_largest(self.work.batches, partial(self._open_side, side), self.work.device)
                    except Exception as error:
                        note = outcome(error)
                # The other sides need the memory that PyTorch has cached.
                self.work.device.release()
            if note:
                self._notes |= {(batch, side.key): note for batch in self.work.batches}

    def _open_side(self, side: Side, largest: int) -> None:
        """Open a side for batches of at most `largest` pictures.

        Raises:
            Exception: it cannot be opened, or lacks memory even for the smallest batch.
        """
        with ExitStack() as opened:
            before = self.work.device.used()
            codec = opened.enter_context(closing(side.open(largest)))
            for batch in self.work.batches:
                warm_up = partial(self._warm_up, side, codec, batch, before)
                self._notes[batch, side.key] = note_of(batch, largest, self.work.batches, warm_up)
            self._open.push(opened.pop_all())

    def _warm_up(self, side: Side, codec: Codec, batch: int, before: int | None) -> dict[str, Any]:
        device, call = self.work.device, self._call(codec, np.resize(self._data, (batch, *self._data.shape[1:])))
        try:
            # The first call of a batch chooses or compiles kernels, which takes extra time and memory. The kernels do not
            # change later: cuDNN and torch.compile have chosen theirs, TensorRT chose when it built the engine, and
            # tokenflow-sdk does not let TensorRT-RTX compile in the background. So the second call is measured.
            call()
            device.reset_peak()
            allocated = device.allocated()
            call()
            memory = _memory(codec, device, before, allocated)
            failures = batch_failures(side, codec, self.name, batch, self.reference)
        except Exception as error:
            if batch == self.work.batches[0] and lacks_memory(error):
                raise
            return outcome(error)
        if failures:
            return {"wrong": f"{self.name} in batches of {batch}: {'; '.join(failures)}"}
        self._calls[batch][side.key] = call
        return {"memory_bytes": memory}

    def _call(self, codec: Codec, data: NDArray[Any]) -> Call:
        run = codec.encode_array if self.name == "encode" else codec.decode_array

        def call() -> float:
            run(data)
            return 0.0

        return call

    def rows(self, sides: Sequence[Side]) -> Iterator[dict[str, Any]]:
        """Time the sides in turns, and yield a row for each batch and side."""
        work = self.work
        for batch in work.batches:
            title = f"{self.variant}: {self.name}, timing a batch of {batch}"
            with bar(title, work.pace.rounds + 1) as advance:
                found = alternate(self._calls[batch], work.device.synchronize, work.pace, advance)
            for side in sides:
                place = {"graph": self.name, "batch": batch, "side": side.key, "dtype": side.dtype}
                yield place | result(found.get(side.key), batch, self._notes[batch, side.key])


def _memory(codec: Codec, device: Device, before: int | None, allocated: int | None) -> int | None:
    """The bytes that a side needs. For PyTorch, whose sides share an allocator, they are its weights plus the peak of a call.

    Args:
        codec: has just been called.
        device: where it runs.
        before: the bytes of device memory in use before the side was opened.
        allocated: the bytes that PyTorch's allocator had allocated before the call.
    """
    if isinstance(codec, TorchCodec):
        peak = device.peak()
        return None if peak is None or allocated is None else codec.weight_bytes + peak - allocated
    used = device.used()
    return None if used is None or before is None else used - before


def result(times: Times | str | None, pictures: int, note: Mapping[str, Any]) -> dict[str, Any]:
    """What a row says about a side: its figures, or why it has none. `note` is the result of warming it up."""
    if isinstance(times, str):
        return {"why": times}
    if times is None:
        return dict(note)
    return {
        "median_s": times.median,
        "p95_s": times.p95,
        "calls": len(times.seconds),
        "pictures_per_s": pictures / times.median,
        **note,
    }
