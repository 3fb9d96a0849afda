"""What a decoder's convolutions read on real pictures, and what decoding in 8 bits costs: for int8 and fp8 decoders.

The bundle's float32 graphs run in onnxruntime on the CPU, and so do the graphs that engines are built from: no GPU is needed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np
import onnx_ir as ir
import onnxruntime
from numpy.typing import NDArray

from tokenflow_export.precision.search import Score, run_each, search, store
from tokenflow_export.progress import ProgressSteps
from tokenflow_sdk.backends.onnxruntime import OnnxRuntimeSession
from tokenflow_sdk.backends.session import SessionOptions
from tokenflow_sdk.bundle.bundle import Bundle
from tokenflow_sdk.bundle.model_config import TokenizerConfig
from tokenflow_sdk.engines.annotations import RANGES, pinned_nodes
from tokenflow_sdk.engines.build import engine_graph
from tokenflow_sdk.parity.tokenizer import TokenizerReference
from tokenflow_sdk.parity.tokenizer_report import EIGHT_BIT_PSNR
from tokenflow_sdk.passes.graph import load_graph
from tokenflow_sdk.passes.quantize import ActivationRanges, EightBit, inner_convolutions
from tokenflow_sdk.pictures.images import psnr, ssim

__all__ = ["Cost", "calibrate", "magnitudes"]

QUANTILES = (1.0, 0.99999, 0.9999)
"""Of the magnitudes in a picture, tried as ranges: all of them, or all but those few that would cost the others precision."""
BAR = EIGHT_BIT_PSNR + 1
"""dB to reach here, so that what an engine rounds differently does not fail its certificate."""


@dataclass(frozen=True)
class Cost:
    """What a decoder in 8 bits loses against float32: least and mean PSNR (dB) and SSIM over `pictures`. `quantile` gave the
    ranges of `convolutions`; `kept` more are left in half precision, because without that the bar is missed. `own_psnr` is what
    the tokenizer itself loses: float32 against the photos, mean."""

    pictures: int
    least_psnr: float
    mean_psnr: float
    least_ssim: float
    mean_ssim: float
    own_psnr: float
    quantile: float
    convolutions: int
    kept: int


def magnitudes(
    bundle: Bundle[TokenizerConfig], codes: NDArray[np.int32], quantiles: tuple[float, ...], steps: ProgressSteps
) -> dict[str, NDArray[np.float64]]:
    """For each inner convolution of the decoder, by name, quantiles [len(quantiles)] of the magnitudes it reads: those of the
    picture in which they are largest.

    Args:
        bundle: a tokenizer's.
        codes: int32 [N, L] of pictures.
        quantiles: from 0 to 1.
        steps: shows progress.
    """
    model = load_graph(bundle.graph_path("decode"))
    names = set(inner_convolutions(model))
    read = {str(node.name): node.inputs[0] for node in model.graph if node.name in names}
    marked = {str(value.name): value for value in read.values() if value is not None}
    model.graph.outputs.extend(marked.values())
    found = {name: np.zeros(len(quantiles)) for name in marked}
    with tempfile.TemporaryDirectory() as work:
        path = Path(work) / "decode.onnx"
        ir.save(model, path, external_data="decode.onnx.data")
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    steps.start(f"what {len(names)} convolutions read", total=1)
    for number in range(len(codes)):
        tensors = session.run(list(marked), {"code_indices": codes[number : number + 1]})
        for name, tensor in zip(marked, tensors, strict=True):
            found[name] = np.maximum(found[name], np.quantile(np.abs(tensor), quantiles))
        steps.fraction((number + 1) / len(codes))
    return {name: found[str(value.name)] for name, value in read.items() if value is not None}


def calibrate(
    bundle: Bundle[TokenizerConfig], images: NDArray[np.uint8], held_out: NDArray[np.uint8], steps: ProgressSteps
) -> dict[EightBit, Cost]:
    """Find ranges on `images` and what they cost on others, and store both in the bundle, where `tokenflow build` looks.

    Of the quantiles, the one is taken that costs least. Where that misses the bar, convolutions are left in half precision,
    those first that cost most. The bundle's reference is judged too, because certificates are given by it.

    Args:
        bundle: a tokenizer's.
        images, held_out: u8 [N, H, W, 3], of its size.
        steps: shows progress.

    Raises:
        ParityError: the decoder misses the bar in half precision already.
        CorruptBundleError: the bundle's reference or list of pinned nodes is damaged.
    """
    with _session(bundle, "encode") as encode:
        steps.start("codes", total=1)
        codes, others = (run_each(encode, "images", rows, "code_indices", steps) for rows in (images, held_out))
    judged = np.concatenate([others, TokenizerReference.load(bundle).code_indices])
    with _session(bundle, "decode") as decode:
        steps.start("decode in float32", total=1)
        exact = run_each(decode, "code_indices", judged, "images", steps)
    own = float(np.mean([psnr(a, b) for a, b in zip(exact, held_out, strict=False)]))
    pinned = pinned_nodes(bundle, "fp16").get("decode", ())
    found = {name: row for name, row in magnitudes(bundle, codes, QUANTILES, steps).items() if name not in pinned}
    costs: dict[EightBit, Cost] = {}
    lists = {}

    def rounded(ranges: ActivationRanges) -> NDArray[np.uint8]:
        return _decode(bundle, ranges, pinned, judged, steps)

    def least(pictures: NDArray[np.uint8]) -> float:
        return min(psnr(a, b) for a, b in zip(pictures, exact, strict=True))

    for dtype in get_args(EightBit):
        candidates = [
            ActivationRanges(dtype, {name: float(row[i]) for name, row in found.items()}) for i in range(len(QUANTILES))
        ]
        tried = [rounded(ranges) for ranges in candidates]
        best = int(np.argmax([least(pictures) for pictures in tried]))
        ranges, pictures = candidates[best], tried[best]
        kept: tuple[str, ...] = ()
        if least(pictures) < BAR:

            def score(kept: Collection[str], ranges: ActivationRanges = ranges) -> Score:
                found = least(rounded(ranges.without(kept)))
                return Score(-found, (f"{found:.1f} dB",) if found < BAR else ())

            kept = search(list(found), score, f"The decoder in {dtype}")
            ranges = ranges.without(kept)
            pictures = rounded(ranges)
        decibels, likeness = (
            [measure(a, b) for a, b in zip(pictures[: len(held_out)], exact, strict=False)] for measure in (psnr, ssim)
        )
        costs[dtype] = Cost(
            pictures=len(held_out),
            least_psnr=min(decibels),
            mean_psnr=float(np.mean(decibels)),
            least_ssim=min(likeness),
            mean_ssim=float(np.mean(likeness)),
            own_psnr=own,
            quantile=QUANTILES[best],
            convolutions=len(ranges.magnitudes),
            kept=len(kept),
        )
        lists[dtype] = {"decode": ranges.magnitudes}
    store(bundle, RANGES, lists, {dtype: _figures(cost) for dtype, cost in costs.items()})
    return costs


def _session(bundle: Bundle[TokenizerConfig], name: str, path: Path | None = None) -> OnnxRuntimeSession:
    entry = bundle.graph(name)
    return OnnxRuntimeSession(path or bundle.graph_path(name), entry, SessionOptions("cpu"))


def _decode(
    bundle: Bundle[TokenizerConfig],
    ranges: ActivationRanges,
    pinned: Collection[str],
    codes: NDArray[np.int32],
    steps: ProgressSteps,
) -> NDArray[np.uint8]:
    """Pictures u8 [N, H, W, 3] of codes [N, L] from the graph that an engine is built from."""
    graph = bundle.graph_path("decode")
    with tempfile.TemporaryDirectory() as work:
        path = engine_graph(graph, "fp16", Path(work), pinned, ranges)
        with _session(bundle, "decode", path) as session:
            steps.start(f"decode, {len(ranges.magnitudes)} convolutions in {ranges.dtype}", total=1)
            return run_each(session, "code_indices", codes, "images", steps)


def _figures(cost: Cost) -> dict[str, float]:
    """For bundle.json."""
    return {
        "pictures": cost.pictures,
        "decode_psnr": round(cost.least_psnr, 2),
        "decode_psnr_mean": round(cost.mean_psnr, 2),
        "decode_ssim": round(cost.least_ssim, 4),
        "decode_ssim_mean": round(cost.mean_ssim, 4),
        "own_psnr": round(cost.own_psnr, 2),
        "quantile": cost.quantile,
        "convolutions": cost.convolutions,
    }
