"""Calibrates the decoder for int8 and fp8: finds the ranges of its activations, and measures what decoding in 8 bits costs.

Both the bundle's float32 graphs and the graphs that engines are built from run in onnxruntime on the CPU, so no GPU is needed.
"""

from __future__ import annotations

import tempfile
from bisect import bisect_left
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np
import onnx_ir as ir
import onnxruntime
from numpy.typing import NDArray

from tokenflow_export.precision.search import run_each, store
from tokenflow_export.progress import ProgressSteps
from tokenflow_sdk.backends.onnxruntime import OnnxRuntimeSession
from tokenflow_sdk.backends.session import SessionOptions
from tokenflow_sdk.bundle.bundle import Bundle
from tokenflow_sdk.bundle.model_config import TokenizerConfig
from tokenflow_sdk.engines.annotations import RANGES, pinned_nodes
from tokenflow_sdk.engines.build import engine_graph
from tokenflow_sdk.errors import ParityError
from tokenflow_sdk.parity.tokenizer import TokenizerReference
from tokenflow_sdk.parity.tokenizer_report import EIGHT_BIT_PSNR
from tokenflow_sdk.passes.graph import load_graph
from tokenflow_sdk.passes.quantize import ActivationRanges, EightBit, inner_convolutions, unscaled_convolutions
from tokenflow_sdk.pictures.images import psnr, ssim

__all__ = ["Cost", "calibrate", "magnitudes"]

QUANTILES = (1.0, 0.99999, 0.9999)
"""Quantiles of the magnitudes that are tried as ranges. Cutting off the few largest keeps the others more precise."""
MIN_PSNR = EIGHT_BIT_PSNR + 2
"""dB that must be reached here: more than a certificate asks for, because an engine rounds differently. OpenVINO rounds what is
not in 8 bits to bfloat16, and with a decoder that by this alone has 45 dB, the least that is certified, 42 become 40.2."""
FEW = 4
"""Pictures by which convolutions to leave are looked for: those that 8 bits cost most. What is found is measured on all."""
MORE = 4
"""Convolutions that are left as well at a time, where another picture is not near enough then."""


@dataclass(frozen=True)
class _Judge:
    """Compares ranges by the pictures that they decode to.

    Args:
        bundle: of a tokenizer.
        pinned: nodes that stay in float32.
        codes: code indices int32 [N, L] of the pictures to decode.
        exact: u8 [N, H, W, 3], decoded in float32.
        order: all convolutions, those first that are left in half precision first.
        steps: shows progress.
    """

    bundle: Bundle[TokenizerConfig]
    pinned: Collection[str]
    codes: NDArray[np.int32]
    exact: NDArray[np.uint8]
    order: Sequence[str]
    steps: ProgressSteps

    def choose(self, candidates: Sequence[ActivationRanges]) -> tuple[int, ActivationRanges, NDArray[np.uint8]]:
        """The best candidate's number, its ranges without the convolutions to leave, and all pictures decoded with these.

        Raises:
            ParityError: `MIN_PSNR` is missed without any convolution in 8 bits.
        """
        tried = [self._decode(ranges) for ranges in candidates]
        best = int(np.argmax([decibels.min() for _, decibels in tried]))
        ranges, (pictures, decibels) = candidates[best], tried[best]
        if decibels.min() >= MIN_PSNR:
            return best, ranges, pictures
        # The more are left, the nearer is a picture. With those that are found, others may be the worst.
        worst = np.argsort(decibels)[:FEW]
        fewest = bisect_left(range(len(self.order)), True, 1, key=lambda n: self._suffices(ranges, n, worst))
        for left in (*range(fewest, len(self.order), MORE), len(self.order)):
            pictures, decibels = self._decode(ranges.without(self.order[:left]))
            if decibels.min() >= MIN_PSNR:
                return best, ranges.without(self.order[:left]), pictures
        raise ParityError(
            f"The decoder of {self.bundle.path.name} misses the {MIN_PSNR} dB that {ranges.dtype} needs even with all of its "
            f"convolutions in half: {decibels.min():.1f} dB.",
            "Leave 8 bits out: build without --decoder.",
        )

    def _suffices(self, ranges: ActivationRanges, left: int, rows: NDArray[np.intp]) -> bool:
        return bool(self._decode(ranges.without(self.order[:left]), rows)[1].min() >= MIN_PSNR)

    def _decode(
        self, ranges: ActivationRanges, rows: NDArray[np.intp] | slice = slice(None)
    ) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
        """Pictures of some codes from the graph that an engine in 8 bits is built from, and the PSNR of each in dB."""
        with tempfile.TemporaryDirectory() as work:
            path = engine_graph(self.bundle.graph_path("decode"), "fp16", Path(work), self.pinned, ranges)
            with _session(self.bundle, "decode", path) as session:
                self.steps.start(f"decode, {len(ranges.magnitudes)} convolutions in {ranges.dtype}", total=1)
                pictures = run_each(session, "code_indices", self.codes[rows], "images", self.steps)
        return pictures, np.array([psnr(a, b) for a, b in zip(pictures, self.exact[rows], strict=True)])


@dataclass(frozen=True)
class Cost:
    """What decoding in 8 bits costs, compared with float32.

    Args:
        pictures: how many were decoded.
        least_psnr, mean_psnr: in dB.
        least_ssim, mean_ssim: from -1 to 1.
        own_psnr: what the tokenizer itself loses: mean PSNR of float32 against the photos, in dB.
        quantile: which one gave the ranges, of `QUANTILES`.
        convolutions: how many run in 8 bits.
        kept: how many are left in half precision, because `MIN_PSNR` is missed otherwise.
    """

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
    """Measure the input magnitudes of each inner convolution of the decoder.

    Args:
        bundle: of a tokenizer.
        codes: code indices int32 [N, L] of N pictures.
        quantiles: from 0 to 1.
        steps: shows progress.

    Returns:
        For each convolution by name, the quantiles [len(quantiles)], each the largest among the pictures.
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
    steps.start(f"inputs of {len(names)} convolutions", total=1)
    for number in range(len(codes)):
        tensors = session.run(list(marked), {"code_indices": codes[number : number + 1]})
        for name, tensor in zip(marked, tensors, strict=True):
            found[name] = np.maximum(found[name], np.quantile(np.abs(tensor), quantiles))
        steps.fraction((number + 1) / len(codes))
    return {name: found[str(value.name)] for name, value in read.items() if value is not None}


def calibrate(
    bundle: Bundle[TokenizerConfig], images: NDArray[np.uint8], held_out: NDArray[np.uint8], steps: ProgressSteps
) -> dict[EightBit, Cost]:
    """Find the ranges for a decoder in int8 and in fp8, and store them in the bundle, where `tokenflow build` finds them.

    The quantile that costs least is used. If the worst picture still misses `MIN_PSNR`, convolutions are left in half
    precision: first those whose input is not scaled, then the others in the order of the graph, until it does not. Early ones
    are the cheapest to leave: a decoder's maps grow towards its end, where most products are, and what is rounded early
    passes through all that follows. The worst picture is looked for in the bundle's reference too, because certificates use it.

    Args:
        bundle: of a tokenizer.
        images: u8 [N, H, W, 3] of the bundle's size; ranges are measured on them.
        held_out: u8 [M, H, W, 3]; the cost is measured on them.
        steps: shows progress.

    Returns:
        The cost by dtype, which is stored in the bundle as well.

    Raises:
        ParityError: the decoder misses `MIN_PSNR` even in half precision.
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
    unscaled = set(unscaled_convolutions(load_graph(bundle.graph_path("decode"))))
    order = sorted(found, key=lambda name: name not in unscaled)
    judge = _Judge(bundle, pinned, judged, exact, order, steps)
    costs: dict[EightBit, Cost] = {}
    lists = {}
    for dtype in get_args(EightBit):
        candidates = [
            ActivationRanges(dtype, {name: float(row[i]) for name, row in found.items()}) for i in range(len(QUANTILES))
        ]
        best, ranges, pictures = judge.choose(candidates)
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
            kept=len(found) - len(ranges.magnitudes),
        )
        lists[dtype] = {"decode": ranges.magnitudes}
    store(bundle, RANGES, lists, {dtype: _figures(cost) for dtype, cost in costs.items()})
    return costs


def _session(bundle: Bundle[TokenizerConfig], name: str, path: Path | None = None) -> OnnxRuntimeSession:
    entry = bundle.graph(name)
    return OnnxRuntimeSession(path or bundle.graph_path(name), entry, SessionOptions("cpu"))


def _figures(cost: Cost) -> dict[str, float]:
    """The cost as bundle.json stores it."""
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
