"""Searches for the nodes of a graph that must stay in float32 so that half precision meets its tolerances.

Half precision is emulated in onnxruntime on the CPU (`emulate_half`), so no GPU is needed. Where a tolerance is missed, groups
of nodes are pinned to float32, those that cost most first, until it is met. `tokenizer_search` and `generator_search` define
what is measured.
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
"""The nodes of a graph are split into this many groups of neighbours, which are tried one by one."""


@dataclass(frozen=True)
class Score:
    """How far a graph in half precision is from float32.

    `error` is smaller for better graphs; `failures` names the tolerances that are missed, in words.
    """

    error: float
    failures: tuple[str, ...]


def crops(paths: Sequence[Path], count: int, size: int) -> NDArray[np.uint8]:
    """Cut `count` square crops from photos, at random places and scales that are the same every time: u8 [N, size, size, 3]."""
    rng = np.random.default_rng(0)
    photos = [load_image(path, color="as-stored") for path in paths]
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
    """Find nodes to pin so that no tolerance is missed. `measure` is called last with exactly these.

    Args:
        nodes: those that can be pinned, in the order of the graph.
        measure: gives the score with some nodes pinned.
        what: names the graph, in the error message.
        rank: a faster form of `measure` for comparing groups of nodes; None uses `measure`.

    Raises:
        ParityError: tolerances are missed even with all nodes pinned.
    """
    score = measure(())
    if not score.failures:
        return ()
    groups = [tuple(map(str, group)) for group in np.array_split(np.array(nodes, dtype=object), min(GROUPS, len(nodes)))]
    # `argsort` puts NaN last: with those groups the graph still overflows.
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
    """Run a graph with one input on rows [N, ...], one row at a time, and return one output [N, ...]."""
    return run_outputs(session, feed, rows, (output,), steps)[0]


def run_outputs(
    session: Session, feed: str, rows: NDArray[Any], outputs: Sequence[str], steps: ProgressSteps
) -> tuple[NDArray[Any], ...]:
    """Do what `run_each` does for several outputs, each [N, ...]."""
    found = []
    for number in range(len(rows)):
        found.append(session.run({feed: rows[number : number + 1]}, outputs))
        steps.fraction((number + 1) / len(rows))
    return tuple(np.concatenate([row[output] for row in found]) for output in outputs)


def store(bundle: Bundle[Any], asset: str, content: object, figures: Mapping[str, Any]) -> None:
    """Write `content` to the file `asset`.json of a bundle, and add `figures` to those in bundle.json."""
    path = bundle.path / f"{asset}.json"
    write_atomic(path, json.dumps(content, indent=2).encode())
    assets = dict(bundle.assets) | {asset: file_entry(path)}
    replace(bundle, assets=assets, parity={**bundle.parity, **figures}).write_manifest()


def store_pinned(
    bundle: Bundle[Any], precision: HalfType, pinned: Mapping[str, Sequence[str]], figures: Mapping[str, Any]
) -> None:
    """Store the nodes to pin by graph, and the figures, for one precision; those of other precisions are kept."""
    # The bundle is read again, because another precision may have been stored since it was opened.
    bundle, lists = Bundle.open(bundle.path, type(bundle.config)), {}
    if PINNED in bundle.assets:
        entry = bundle.asset(PINNED)
        bundle.verify(entry)
        lists = json.loads((bundle.path / entry.name).read_bytes())
    lists[precision] = {graph: list(names) for graph, names in pinned.items() if names}
    store(bundle, PINNED, lists, {precision: dict(figures)})
