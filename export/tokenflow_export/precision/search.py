"""Which nodes of a graph must stay in float32, so that half precision costs no more than is allowed.

A bundle's graphs are rewritten as for an engine and run as one would compute them (`emulate_half`) in onnxruntime on the CPU,
so no GPU is needed. Where a bar is missed, the nodes that cost most are pinned to float32, group by group, until it holds.
`tokenizer_search` and `generator_search` say what is measured.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokenflow_export.progress import ProgressSteps
from tokenflow_export.tracing.onnx_export import file_entry
from tokenflow_sdk.backends.session import Session
from tokenflow_sdk.bundle.bundle import Bundle
from tokenflow_sdk.engines.annotations import PINNED
from tokenflow_sdk.errors import ParityError
from tokenflow_sdk.files import write_atomic
from tokenflow_sdk.passes.half_precision import HalfType
from tokenflow_sdk.pictures.images import fit, load_image

__all__ = ["Score", "crops", "run_each", "run_outputs", "search", "store", "store_pinned"]

GROUPS = 12
"""Neighbouring nodes are tried in this many groups."""


@dataclass(frozen=True)
class Score:
    """How far a graph in half precision is from float32: `error` ranks, `failures` says which tolerances it misses."""

    error: float
    failures: tuple[str, ...]


def crops(paths: Sequence[Path], count: int, size: int) -> NDArray[np.uint8]:
    """`count` square crops of photos u8 [N, size, size, 3], of random places and scales, the same every time."""
    rng = np.random.default_rng(0)
    photos = [load_image(path) for path in paths]
    found = []
    for number in range(count):
        photo = photos[number % len(photos)]
        side = int(rng.uniform(0.5, 1.0) * min(photo.size))
        left, top = (int(rng.integers(0, edge - side + 1)) for edge in photo.size)
        found.append(fit(photo.crop((left, top, left + side, top + side)), size, "crop"))
    return np.stack(found)


def search(
    nodes: Sequence[str],
    measure: Callable[[Collection[str]], Score],
    what: str,
    rank: Callable[[Collection[str]], Score] | None = None,
) -> tuple[str, ...]:
    """The nodes to pin, by groups of neighbours, those that help most first. With these, `measure` was called last.

    Args:
        nodes: in the order of the graph.
        measure: the score with some nodes pinned.
        what: for the message.
        rank: the same from less, for comparing groups; None: `measure`.

    Raises:
        ParityError: the tolerances are missed even with all of them pinned.
    """
    score = measure(())
    if not score.failures:
        return ()
    groups = [tuple(map(str, group)) for group in np.array_split(np.array(nodes, dtype=object), min(GROUPS, len(nodes)))]
    # Those that leave something that is not a number come last.
    ranked = np.argsort([(rank or measure)(group).error for group in groups], kind="stable")
    pinned: tuple[str, ...] = ()
    for index in ranked:
        pinned += groups[index]
        score = measure(pinned)
        if not score.failures:
            return pinned
    raise ParityError(
        f"{what} misses its tolerances even with all of its products left as they are: {'; '.join(score.failures)}.",
        "Build its engines with --precision fp32.",
    )


def run_each(session: Session, feed: str, rows: NDArray[Any], output: str, steps: ProgressSteps) -> NDArray[Any]:
    """One output [N, ...] of a graph with one input, a row of it [N, ...] at a time."""
    return run_outputs(session, feed, rows, (output,), steps)[0]


def run_outputs(
    session: Session, feed: str, rows: NDArray[Any], outputs: Sequence[str], steps: ProgressSteps
) -> tuple[NDArray[Any], ...]:
    """Several outputs, each [N, ...], as `run_each`."""
    found = []
    for number in range(len(rows)):
        found.append(session.run({feed: rows[number : number + 1]}, outputs))
        steps.fraction((number + 1) / len(rows))
    return tuple(np.concatenate([row[output] for row in found]) for output in outputs)


def store(bundle: Bundle[Any], asset: str, content: object, figures: Mapping[str, Any]) -> None:
    """Write `content` as the bundle's file `asset`.json, and figures beside those of the export into bundle.json."""
    path = bundle.path / f"{asset}.json"
    write_atomic(path, json.dumps(content, indent=2).encode())
    assets = dict(bundle.assets) | {asset: file_entry(path)}
    replace(bundle, assets=assets, parity={**bundle.parity, **figures}).write_manifest()


def store_pinned(
    bundle: Bundle[Any], precision: HalfType, pinned: Mapping[str, Sequence[str]], figures: Mapping[str, Any]
) -> None:
    """Write the nodes to pin in one precision, by graph, and what was measured; what is there of others stays."""
    # As it is now: another precision may have been stored since `bundle` was opened.
    bundle, lists = Bundle.open(bundle.path, type(bundle.config)), {}
    if PINNED in bundle.assets:
        entry = bundle.asset(PINNED)
        bundle.verify(entry)
        lists = json.loads((bundle.path / entry.name).read_bytes())
    lists[precision] = {graph: list(names) for graph, names in pinned.items() if names}
    store(bundle, PINNED, lists, {precision: dict(figures)})
