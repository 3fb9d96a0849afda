"""Searches for the nodes of a tokenizer that must stay in float32 so that its engines in half precision are accepted."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from tokenflow_export.precision.emulate_half import emulated_sessions
from tokenflow_export.precision.search import Score, run_outputs, search, store_pinned
from tokenflow_export.progress import ProgressSteps
from tokenflow_sdk.backends.onnxruntime import open_onnxruntime
from tokenflow_sdk.backends.session import Array, OpenSession, Session, SessionOptions, Tensor
from tokenflow_sdk.bundle.bundle import Bundle
from tokenflow_sdk.bundle.model_config import TokenizerConfig
from tokenflow_sdk.bundle.schema import GraphEntry
from tokenflow_sdk.errors import ParityError
from tokenflow_sdk.parity.certificate import Certificate, certify
from tokenflow_sdk.parity.tokenizer import TokenizerReference, forced_agreement, mean_cosine
from tokenflow_sdk.parity.tokenizer_report import ROUNDED
from tokenflow_sdk.passes.half_precision import HalfType, compute_nodes
from tokenflow_sdk.pictures.images import psnr

__all__ = ["TokenizerFinding", "search_tokenizer"]

RANKED_ON = 8
"""How many pictures groups of nodes are compared on. Tolerances are checked on all pictures."""
_GRAPHS = {
    "encode": ("images", "latent"),
    "decode": ("code_indices", "images"),
    "semantic": ("code_indices", "features"),
    "features": ("code_indices", "features"),
}
"""The input of each graph, and the output that is compared."""


@dataclass(frozen=True)
class Quality:
    """How half precision compares with float32.

    Args:
        agreement: share of equal codes when teacher-forced, by scale.
        decode_psnr: least PSNR of a decoded picture in dB; infinite if all are identical.
        semantic_cosine: least mean cosine similarity of a picture's semantic features.
        features_error: largest difference of features.

    The last three include the pictures of the bundle's reference.
    """

    agreement: tuple[float, ...]
    decode_psnr: float
    semantic_cosine: float
    features_error: float

    def to_json(self) -> dict[str, Any]:
        """The figures as bundle.json stores them; an infinite PSNR is null."""
        return asdict(self) | {"decode_psnr": None if np.isinf(self.decode_psnr) else round(self.decode_psnr, 2)}

    def lines(self, patch_nums: Sequence[int], pictures: int) -> list[str]:
        """The result in words, for the terminal."""
        return [
            *(
                f"  {f'{side} x {side}':>8}  {share:8.3%} of {side * side * pictures:,} codes"
                for side, share in zip(patch_nums, self.agreement, strict=True)
            ),
            f"  decoded pictures agree to {self.decode_psnr:.1f} dB at least",
            f"  semantic features have a cosine of {self.semantic_cosine:.5f} at least, features differ by "
            f"{self.features_error:.1e} at most",
        ]


@dataclass(frozen=True)
class TokenizerFinding:
    """The result of a search.

    Args:
        pictures: how many were encoded.
        plain: the quality with nothing pinned.
        quality: the quality with `pinned`.
        pinned: nodes that must stay in float32, by graph.
        nodes: how many nodes could be pinned, by graph.
        certificate: what engines with `pinned` would get.
    """

    pictures: int
    plain: Quality
    quality: Quality
    pinned: dict[str, tuple[str, ...]]
    nodes: dict[str, int]
    certificate: Certificate

    def lines(self, patch_nums: Sequence[int]) -> list[str]:
        """The result in words, for the terminal."""
        found = [*self.quality.lines(patch_nums, self.pictures)]
        for graph, names in self.pinned.items():
            found.append(f"  {graph}: {len(names)} of {self.nodes[graph]} products and convolutions pinned to float32")
        if any(self.pinned.values()):
            found += ["  with nothing pinned:", *self.plain.lines(patch_nums, self.pictures)]
        return [*found, f"  certificate: {self.certificate.summary}"]


def search_tokenizer(
    bundle: Bundle[TokenizerConfig],
    images: NDArray[np.uint8],
    least_agreement: float,
    precision: HalfType,
    steps: ProgressSteps,
    decoded: int | None = None,
) -> TokenizerFinding:
    """Search for the nodes of all graphs to pin, and store them in the bundle, where `tokenflow build` finds them.

    Args:
        bundle: of a tokenizer.
        images: u8 [N, H, W, 3] of the bundle's size.
        least_agreement: least share of equal codes in any scale when teacher-forced.
        precision: of the engines.
        steps: shows progress.
        decoded: how many of the images are decoded too, which takes the longest; None decodes all.

    Raises:
        ParityError: tolerances are missed even with all nodes pinned, or engines would be refused nevertheless.
    """
    trial = _Trial(bundle, images, least_agreement, precision, steps, decoded)
    names = {graph: compute_nodes(ir.load(bundle.graph_path(graph))) for graph in _GRAPHS}
    plain: dict[str, Any] = {}
    found: dict[str, Any] = {}
    pinned: dict[str, tuple[str, ...]] = {}
    for graph, nodes in names.items():

        def measure(pinned: Collection[str], graph: str = graph) -> Score:
            found[graph] = trial.run(graph, pinned)
            plain.setdefault(graph, found[graph])
            return trial.judge(graph, found[graph])

        def rank(pinned: Collection[str], graph: str = graph) -> Score:
            return trial.judge(graph, trial.run(graph, pinned, RANKED_ON))

        pinned[graph] = search(nodes, measure, f"The {graph} graph in {precision}", rank)
    certificate = trial.certify(pinned, found)
    quality = trial.quality(found)
    store_pinned(bundle, precision, pinned, {"pictures": len(images)} | quality.to_json())
    counts = {graph: len(nodes) for graph, nodes in names.items()}
    return TokenizerFinding(len(images), trial.quality(plain), quality, pinned, counts, certificate)


class _Trial:
    """Runs the graphs of a tokenizer with half precision emulated, and compares the results with float32."""

    def __init__(
        self,
        bundle: Bundle[TokenizerConfig],
        images: NDArray[np.uint8],
        least_agreement: float,
        precision: HalfType,
        steps: ProgressSteps,
        decoded: int | None,
    ) -> None:
        self.bundle, self.least_agreement, self.precision, self.steps = bundle, least_agreement, precision, steps
        reference = TokenizerReference.load(bundle)
        self.codebook = reference.codebook
        steps.start("float32", total=1)
        latents, codes = self._run_graph("encode", open_onnxruntime, images, ("latent", "code_indices"))
        self.codes: NDArray[np.int32] = codes
        # The reference is judged as well: certificates use it, and its generated pictures can be worse than any photo.
        judged, pictures = (np.concatenate([rows, reference.code_indices]) for rows in (codes, codes[:decoded]))
        self.rows = {"encode": images, "decode": pictures, "semantic": judged, "features": judged}
        self.exact = {"encode": latents}
        for graph in ("decode", "semantic", "features"):
            (self.exact[graph],) = self._run_graph(graph, open_onnxruntime, self.rows[graph], _GRAPHS[graph][1:])

    def run(self, graph: str, pinned: Collection[str], count: int | None = None) -> NDArray[Any]:
        """Run a graph in half precision on its first `count` inputs, or on all."""
        self.steps.start(f"{graph} in {self.precision}, {len(pinned)} pinned", total=1)
        with tempfile.TemporaryDirectory() as work:
            opening = emulated_sessions(self.bundle, self.precision, Path(work), {graph: pinned})
            return self._run_graph(graph, opening, self.rows[graph][:count], _GRAPHS[graph][1:])[0]

    def judge(self, graph: str, found: NDArray[Any]) -> Score:
        """Compare results, for all inputs or the first of them, with float32. NaN, from an overflow, misses every tolerance."""
        if graph == "encode":
            shares = zip(self.bundle.config.patch_nums, self._agreement(found), strict=True)
            low = tuple(f"{side} x {side}: {share:.2%}" for side, share in shares if share < self.least_agreement)
            return Score(float(np.square(found - self.exact["encode"][: len(found)]).mean()), low)
        if graph == "decode":
            decibels = self._decode_psnr(found)
            return Score(-decibels, () if decibels >= ROUNDED.decode_psnr else (f"{decibels:.1f} dB",))
        if graph == "semantic":
            cosine = self._semantic_cosine(found)
            return Score(-cosine, () if cosine >= ROUNDED.semantic_cosine else (f"a cosine of {cosine:.5f}",))
        error = self._features_error(found)
        return Score(error, () if error <= ROUNDED.features_error else (f"an error of {error:.1e}",))

    def quality(self, found: dict[str, NDArray[Any]]) -> Quality:
        """The figures of results by graph, each for all inputs."""
        return Quality(
            self._agreement(found["encode"]),
            self._decode_psnr(found["decode"]),
            self._semantic_cosine(found["semantic"]),
            self._features_error(found["features"]),
        )

    def certify(self, pinned: dict[str, tuple[str, ...]], found: dict[str, NDArray[Any]]) -> Certificate:
        """The certificate that engines with `pinned` would get.

        Args:
            pinned: by graph.
            found: results with `pinned` by graph, each for all inputs. The reference is among them but for `encode`, which is
                the only graph that is run again.

        Raises:
            ParityError: they would be refused.
        """
        self.steps.start("the certificate")
        with tempfile.TemporaryDirectory() as work:
            emulated = emulated_sessions(self.bundle, self.precision, Path(work), pinned)
            names = {self.bundle.graph_path(graph): graph for graph in _GRAPHS}

            def opening(path: Path, entry: GraphEntry, options: SessionOptions) -> Session:
                graph = names[path]
                if graph == "encode":
                    return emulated(path, entry, options)
                return _Known(entry, self.rows[graph], found[graph])

            certificate = certify(self.bundle, opening, self.precision)
        if not certificate.passed:
            raise ParityError(
                f"Engines of {self.bundle.path} in {self.precision} would be refused: {'; '.join(certificate.failures)}.",
                "Ask for more with --agreement, so that more is pinned, or build with --precision fp32.",
            )
        return certificate

    def _run_graph(
        self, graph: str, opening: OpenSession, rows: NDArray[Any], outputs: Sequence[str]
    ) -> tuple[NDArray[Any], ...]:
        entry = self.bundle.graph(graph)
        with opening(self.bundle.path / entry.files[0].name, entry, SessionOptions(device="cpu")) as session:
            return run_outputs(session, _GRAPHS[graph][0], rows, outputs, self.steps)

    def _agreement(self, latents: NDArray[np.float32]) -> tuple[float, ...]:
        return forced_agreement(latents, self.codes[: len(latents)], self.codebook, self.bundle.config)

    def _decode_psnr(self, pictures: NDArray[np.uint8]) -> float:
        return float(np.min([psnr(a, b) for a, b in zip(pictures, self.exact["decode"], strict=False)]))

    def _semantic_cosine(self, rows: NDArray[np.float32]) -> float:
        return float(np.min([mean_cosine(a, b) for a, b in zip(rows, self.exact["semantic"], strict=False)]))

    def _features_error(self, rows: NDArray[np.float32]) -> float:
        return float(np.abs(rows - self.exact["features"][: len(rows)]).max())


class _Known(Session):
    """A graph whose result is known for each of its inputs.

    Args:
        entry: of the graph, which has one input and one output.
        rows: inputs [N, ...].
        found: the results for them [N, ...].
    """

    def __init__(self, entry: GraphEntry, rows: NDArray[Any], found: NDArray[Any]) -> None:
        super().__init__(entry.inputs, entry.outputs)
        self.found = {row.tobytes(): result for row, result in zip(rows, found, strict=True)}

    def _infer(self, feeds: Mapping[str, Tensor], outputs: tuple[str, ...]) -> Sequence[Array]:
        (rows,) = feeds.values()
        return [np.stack([self.found[row.tobytes()] for row in np.asarray(rows)])]

    def close(self) -> None:
        self.found.clear()
