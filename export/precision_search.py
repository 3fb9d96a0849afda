"""What half precision costs on real pictures, and which nodes must stay in float32 so that it costs no more than is allowed.

A bundle's graphs are rewritten as for an engine (`tokenflow_sdk.half`) and run in onnxruntime on the CPU, so no GPU is needed.
Where a bar is missed, the nodes that cost most are pinned to float32, group by group, until it holds.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from export.onnx_export import file_entry
from export.progress import Steps
from tokenflow_sdk.backends.base import Session, SessionOptions
from tokenflow_sdk.backends.onnxruntime import OnnxRuntimeSession
from tokenflow_sdk.bundle import Bundle
from tokenflow_sdk.config import TokenizerConfig
from tokenflow_sdk.engine_build import engine_graph
from tokenflow_sdk.engine_jobs import PINNED
from tokenflow_sdk.errors import ParityError
from tokenflow_sdk.files import write_atomic
from tokenflow_sdk.half import compute_nodes
from tokenflow_sdk.images import fit, load_image, psnr
from tokenflow_sdk.parity import Reference, forced_agreement

__all__ = ["Finding", "Score", "crops", "run_each", "search", "search_bundle", "store"]

MIN_AGREEMENT = 0.975
"""Least teacher-forced agreement with float32 in any scale."""
MIN_PSNR = 45.0
"""Least dB between pictures decoded in half and in float32."""
GROUPS = 12
"""Neighbouring nodes are tried in this many groups."""


@dataclass(frozen=True)
class Score:
    """How far a graph in half precision is from float32: `error` ranks, `failures` says which bars it misses."""

    error: float
    failures: tuple[str, ...]


@dataclass(frozen=True)
class Finding:
    """What a search found. `agreement`: teacher-forced, one share a scale; `decode_psnr`: the least, in dB; `pinned`: nodes by
    graph."""

    pictures: int
    agreement: tuple[float, ...]
    decode_psnr: float
    pinned: dict[str, tuple[str, ...]]


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


def search(nodes: Sequence[str], measure: Callable[[Collection[str]], Score], what: str) -> tuple[str, ...]:
    """The nodes to pin, by groups of neighbours, those that help most first.

    Args:
        nodes: in the order of the graph.
        measure: the score with some nodes pinned.
        what: for the message.

    Raises:
        ParityError: the bars are missed even with all of them pinned.
    """
    score = measure(())
    if not score.failures:
        return ()
    groups = [tuple(map(str, group)) for group in np.array_split(np.array(nodes, dtype=object), min(GROUPS, len(nodes)))]
    ranked = sorted(groups, key=lambda group: measure(group).error)
    pinned: tuple[str, ...] = ()
    for group in ranked:
        pinned += group
        score = measure(pinned)
        if not score.failures:
            return pinned
    raise ParityError(
        f"{what} misses its bars even with all of its products left as they are: {'; '.join(score.failures)}.",
        "Build its engines with --precision fp32.",
    )


def search_bundle(bundle: Bundle[TokenizerConfig], images: NDArray[np.uint8], bar: float, steps: Steps) -> Finding:
    """Search the encoder and the decoder, and store what was found in the bundle, where `tokenflow build` looks.

    Args:
        bundle: a tokenizer's.
        images: u8 [N, H, W, 3], of its size.
        bar: least teacher-forced agreement in any scale.
        steps: shows progress.

    Raises:
        ParityError: no choice of nodes is good enough.
    """
    codebook = Reference.load(bundle).codebook
    steps.start("float32", total=1)
    with _open(bundle, "encode") as encode, _open(bundle, "decode") as decode:
        codes, latents = (run_each(encode, "images", images, name, steps) for name in ("code_indices", "latent"))
        decoded = run_each(decode, "code_indices", codes, "images", steps)
    shares: dict[Collection[str], tuple[float, ...]] = {}
    least: dict[Collection[str], float] = {}

    def measure_encode(pinned: Collection[str]) -> Score:
        with tempfile.TemporaryDirectory() as work, _open(bundle, "encode", Path(work), pinned) as session:
            steps.start(f"encode in fp16, {len(pinned)} pinned", total=1)
            found = run_each(session, "images", images, "latent", steps)
        shares[pinned] = forced_agreement(found, codes, codebook, bundle.config)
        low = [
            f"{side} x {side}: {share:.2%}"
            for side, share in zip(bundle.config.patch_nums, shares[pinned], strict=True)
            if share < bar
        ]
        return Score(float(np.square(found - latents).mean()), tuple(low))

    def measure_decode(pinned: Collection[str]) -> Score:
        with tempfile.TemporaryDirectory() as work, _open(bundle, "decode", Path(work), pinned) as session:
            steps.start(f"decode in fp16, {len(pinned)} pinned", total=1)
            found = run_each(session, "code_indices", codes, "images", steps)
        least[pinned] = min(psnr(a, b) for a, b in zip(found, decoded, strict=True))
        return Score(-least[pinned], (f"{least[pinned]:.1f} dB",) if least[pinned] < MIN_PSNR else ())

    pinned = {
        name: search(compute_nodes(ir.load(bundle.path / f"{name}.onnx")), measure, f"The {name} graph")
        for name, measure in (("encode", measure_encode), ("decode", measure_decode))
    }
    finding = Finding(len(images), shares[pinned["encode"]], least[pinned["decode"]], pinned)
    figures = {
        "pictures": finding.pictures,
        "agreement": list(finding.agreement),
        "decode_psnr": None if np.isinf(finding.decode_psnr) else round(finding.decode_psnr, 2),
    }
    lists = {"fp16": {graph: names for graph, names in finding.pinned.items() if names}}
    store(bundle, PINNED, lists, {"fp16": figures})
    return finding


def _open(
    bundle: Bundle[TokenizerConfig],
    name: str,
    work: Path | None = None,
    pinned: Collection[str] = (),
) -> OnnxRuntimeSession:
    entry = bundle.graph(name)
    path = bundle.path / entry.files[0].name
    if work is not None:
        path = engine_graph(path, "fp16", work, pinned)
    return OnnxRuntimeSession(path, entry, SessionOptions(device="cpu"))


def run_each(session: Session, feed: str, rows: NDArray[Any], output: str, steps: Steps) -> NDArray[Any]:
    """One output [N, ...] of a graph with one input, a row of it [N, ...] at a time."""
    found = []
    for number in range(len(rows)):
        found.append(session.run({feed: rows[number : number + 1]}, [output])[output])
        steps.fraction((number + 1) / len(rows))
    return np.concatenate(found)


def store(bundle: Bundle[TokenizerConfig], asset: str, content: object, figures: Mapping[str, Any]) -> None:
    """Write `content` as the bundle's file `asset`.json, and figures beside those of the export into bundle.json."""
    path = bundle.path / f"{asset}.json"
    write_atomic(path, json.dumps(content, indent=2).encode())
    assets = dict(bundle.assets) | {asset: file_entry(path)}
    replace(bundle, assets=assets, parity=dict(bundle.parity) | figures).write_manifest()
