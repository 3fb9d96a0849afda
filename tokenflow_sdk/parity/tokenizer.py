"""Does an engine compute what PyTorch computed? A bundle carries the answers; this compares.

The search is residual: one flipped code changes every finer scale. So agreement is counted *teacher-forced*: at each scale
the residual is formed from the reference's codes, and only the latent is the engine's own. A flip is harmless where the
two best codes are equally near, so each is reported with the distance between them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokenflow_sdk.bundle.bundle import Bundle, load_reference
from tokenflow_sdk.bundle.model_config import TokenizerConfig
from tokenflow_sdk.errors import ParityError
from tokenflow_sdk.model.tokenizer_graphs import TokenizerGraphs
from tokenflow_sdk.pictures.images import psnr, ssim
from tokenflow_sdk.pictures.resize import area_matrix, bicubic_matrix
from tokenflow_sdk.pictures.scales import Scales

__all__ = [
    "EIGHT_BIT_PSNR",
    "EXACT",
    "ROUNDED",
    "TIE_DISTANCE",
    "Flip",
    "TokenizerReference",
    "TokenizerReport",
    "Tolerances",
    "check_tokenizer",
    "forced_agreement",
    "find_flips",
    "mean_cosine",
    "scale_cells",
    "worst_margin",
]

TIE_DISTANCE = 1e-4
"""Squared distances closer than this count as equal: either code is right."""


@dataclass(frozen=True)
class Tolerances:
    """What an engine must reach, over all reference pictures: `margin` is the largest of a flip, `agreement` the least share of
    teacher-forced codes, errors are largest absolute ones, `semantic_cosine` and `decode_psnr` (dB) the least."""

    margin: float
    agreement: float
    features_error: float
    semantic_error: float
    semantic_cosine: float
    decode_psnr: float

    def code_failures(self, flips: Sequence[Flip], agreement: float) -> list[str]:
        """In words, for all flips and the teacher-forced share of equal codes; a figure that is not a number misses its bar."""
        worst = worst_margin(flips)
        checks = [
            (worst < self.margin, f"a code flipped at a margin of {worst:.1e} (less than {self.margin:.0e} is accepted)"),
            (agreement >= self.agreement, f"only {agreement:.2%} of the codes agree ({self.agreement:.1%} must)"),
        ]
        return [text for holds, text in checks if not holds]

    def decode_failures(self, decibels: float) -> list[str]:
        """In words, for the worst decoded picture."""
        return [] if decibels >= self.decode_psnr else [f"decoded pictures agree to {decibels:.1f} dB only"]


EXACT = Tolerances(TIE_DISTANCE, 0.0, 1e-3, 1e-2, 0.9999, 55.0)
"""For float32."""
ROUNDED = Tolerances(0.1, 0.975, 1e-2, float("inf"), 0.999, 45.0)
"""For half precision: rounding moves latents by about 1e-3, which decides near ties differently."""
EIGHT_BIT_PSNR = 40.0
"""dB that pictures of an int8 or fp8 decoder must reach: far less than a tokenizer itself loses, while wrong scales fall below.
docs/tensorrt.md has figures."""

Float32 = NDArray[np.float32]


@dataclass(frozen=True)
class TokenizerReference:
    """What PyTorch computed for a few pictures, stored in the bundle as `reference.npz`.

    images, decoded: u8 [N, H, W, 3]; code_indices: int32 [N, L]; latent, features: float32 [N, 40, g, g];
    semantic: float32 [N, g * g, width]; codebook: float32 [K, 40], both halves of unit length.
    """

    images: NDArray[np.uint8]
    code_indices: NDArray[np.int32]
    latent: Float32
    features: Float32
    decoded: NDArray[np.uint8]
    semantic: Float32
    codebook: Float32

    @classmethod
    def load(cls, bundle: Bundle[TokenizerConfig]) -> TokenizerReference:
        """Raises:
        CorruptBundleError: the file is damaged.
        """
        return load_reference(bundle, cls)


@dataclass(frozen=True)
class Flip:
    """A code that differs from the reference's; `margin` is how much nearer (squared distance) the reference's code is."""

    picture: int
    scale: int
    position: int
    expected: int
    got: int
    margin: float


def worst_margin(flips: Sequence[Flip]) -> float:
    """The largest in either direction; 0 without a flip."""
    return max((abs(flip.margin) for flip in flips), default=0.0)


@dataclass(frozen=True)
class TokenizerReport:
    """Figures of one comparison. `agreement` is teacher-forced, one fraction a scale; errors are largest absolute ones."""

    pictures: int
    patch_nums: tuple[int, ...]
    agreement: tuple[float, ...]
    flips: tuple[Flip, ...]
    equal_codes: float
    features_error: float
    semantic_error: float
    semantic_cosine: float
    decode_psnr: float
    decode_ssim: float

    @property
    def overall(self) -> float:
        """Teacher-forced agreement over the codes of all scales."""
        return float(np.average(self.agreement, weights=Scales(self.patch_nums).counts))

    def failures(self, tolerances: Tolerances = EXACT) -> list[str]:
        """Which tolerances are missed, in words; empty when all hold."""
        checks = [
            (self.features_error <= tolerances.features_error, f"features differ by {self.features_error:.1e}"),
            (self.semantic_error <= tolerances.semantic_error, f"semantic features differ by {self.semantic_error:.1e}"),
            (
                self.semantic_cosine >= tolerances.semantic_cosine,
                f"semantic features have a cosine of {self.semantic_cosine:.5f}",
            ),
        ]
        features = [text for holds, text in checks if not holds]
        return tolerances.code_failures(self.flips, self.overall) + features + tolerances.decode_failures(self.decode_psnr)

    @property
    def summary(self) -> str:
        """One line for people."""
        decoded = "identical" if np.isinf(self.decode_psnr) else f"{self.decode_psnr:.1f} dB, SSIM {self.decode_ssim:.4f}"
        return (
            f"codes agree {self.overall:.2%} teacher-forced ({len(self.flips)} flips, worst scale {min(self.agreement):.2%}), "
            f"decode {decoded}, semantic cosine {self.semantic_cosine:.5f}"
        )

    def to_json(self) -> dict[str, Any]:
        """For bundle.json: equality of pictures (infinite PSNR) is written as null."""
        data = asdict(self)
        data["decode_psnr"] = None if np.isinf(self.decode_psnr) else round(self.decode_psnr, 2)
        return data

    def require(self, what: str) -> None:
        """Raises:
        ParityError: a bar is missed; `what` names the thing checked.
        """
        failures = self.failures()
        if failures:
            raise ParityError(
                f"{what} does not reproduce PyTorch: {'; '.join(failures)}.",
                "Do not use it. Update onnxruntime or export again with other versions, and report it with these figures.",
            )


def scale_cells(
    latent: Float32, codebook: Float32, config: TokenizerConfig, forced: NDArray[np.int32] | None = None
) -> Iterator[tuple[NDArray[np.float64], NDArray[np.int64]]]:
    """The shared-mapping residual search, slow and plain, for one picture's latent [40, g, g].

    Yields for each scale the cells [s * s, 40] it looks up, the semantic half of unit length and the pixel half of length
    `pixel_weight`, and the nearest codes [s * s].
    With `forced` code indices the residual follows those instead of the nearest, so every scale is judged by itself.
    """
    residual = latent.astype(np.float64)
    for side, start, end in zip(config.patch_nums, config.scales.starts, config.scales.ends, strict=True):
        down, up = area_matrix(config.grid, side), bicubic_matrix(side, config.grid)
        cells = (down @ residual @ down.T).reshape(len(latent), -1).T
        halves = np.split(cells, [config.semantic_dim], axis=1)
        unit = [half / np.maximum(np.linalg.norm(half, axis=1, keepdims=True), 1e-12) for half in halves]
        cells = np.concatenate([unit[0], config.pixel_weight * unit[1]], axis=1)
        nearest = (cells.astype(np.float32) @ codebook.T).argmax(axis=1)
        yield cells, nearest
        codes = nearest if forced is None else forced[start:end]
        rows = codebook[codes].astype(np.float64).T.reshape(-1, side, side)
        residual = residual - up @ rows @ up.T


def forced_agreement(
    latents: Float32, codes: NDArray[np.int32], codebook: Float32, config: TokenizerConfig
) -> tuple[float, ...]:
    """Share of codes that latents [N, 40, g, g] give again, one a scale, each scale's residual formed from `codes` [N, L]."""
    rows = [
        np.concatenate([nearest for _, nearest in scale_cells(latent, codebook, config, row)])
        for latent, row in zip(latents, codes, strict=True)
    ]
    return tuple(float(scale.mean()) for scale in config.scales.split(np.stack(rows) == codes))


def _flips(
    picture: int, reference: TokenizerReference, config: TokenizerConfig, got: NDArray[np.int32], judged: Sequence[bool]
) -> list[Flip]:
    """Codes in `got` that differ from the reference's, in the scales that are `judged`."""
    flips = []
    expected = reference.code_indices[picture]
    scales = scale_cells(reference.latent[picture], reference.codebook, config, expected)
    for scale, (cells, _) in enumerate(scales):
        start, end = config.scales.starts[scale], config.scales.ends[scale]
        for at in np.flatnonzero(got[start:end] != expected[start:end]) if judged[scale] else ():
            ours, theirs = int(got[start + at]), int(expected[start + at])
            # Halves of fixed length: a squared distance is a constant minus twice the inner product.
            margin = 2 * float(cells[at] @ (reference.codebook[theirs].astype(np.float64) - reference.codebook[ours]))
            flips.append(Flip(picture, scale, int(at), theirs, ours, margin))
    return flips


def find_flips(
    picture: int, reference: TokenizerReference, config: TokenizerConfig, codes: NDArray[np.int32], latent: Float32
) -> list[Flip]:
    """Flips of an engine's latent [40, g, g], teacher-forced, and of its own codes [L] in the first scale that leaves the
    reference, for a picture of the reference."""
    expected = reference.code_indices[picture]
    forced = np.concatenate([nearest for _, nearest in scale_cells(latent, reference.codebook, config, expected)])
    flips = _flips(picture, reference, config, forced.astype(np.int32), [True] * len(config.patch_nums))
    differing = [bool(scale.any()) for scale in config.scales.split(codes != expected)]
    if any(differing):
        first = differing.index(True)
        own = _flips(picture, reference, config, codes, [scale == first for scale in range(len(config.scales))])
        flips += [flip for flip in own if flip not in flips]
    return flips


def check_tokenizer(
    graphs: TokenizerGraphs,
    reference: TokenizerReference | None = None,
    progress: Callable[[float], None] = lambda fraction: None,
) -> TokenizerReport:
    """Compare a tokenizer with what PyTorch computed for its bundle's reference pictures.

    Args:
        graphs: on any backend.
        reference: None loads the bundle's own.
        progress: called with the fraction done, from 0 to 1.

    Raises:
        CorruptBundleError, BackendError: the reference or an engine cannot be loaded or run.
    """
    config = graphs.bundle.config
    reference = reference or TokenizerReference.load(graphs.bundle)
    flips: list[Flip] = []
    equal, errors, semantic_errors, cosines, psnrs, ssims = [], [], [], [], [], []
    for i in range(len(reference.images)):
        image, expected = reference.images[i : i + 1], reference.code_indices[i]
        codes = graphs.encode(image)[0]
        flips += find_flips(i, reference, config, codes, graphs.latent(image)[0])
        equal.append(float((codes == expected).mean()))
        features = graphs.features(expected[None])[0].T.reshape(reference.features[i].shape)
        errors.append(float(np.abs(features - reference.features[i]).max()))
        semantic = graphs.semantic(expected[None])[0]
        semantic_errors.append(float(np.abs(semantic - reference.semantic[i]).max()))
        cosines.append(mean_cosine(semantic, reference.semantic[i]))
        decoded = graphs.decode(expected[None])[0]
        psnrs.append(psnr(decoded, reference.decoded[i]))
        ssims.append(ssim(decoded, reference.decoded[i]))
        progress((i + 1) / len(reference.images))
    counts = [sum(flip.scale == scale for flip in flips) for scale in range(len(config.patch_nums))]
    totals = [len(reference.images) * count for count in config.scales.counts]
    return TokenizerReport(
        pictures=len(reference.images),
        patch_nums=config.patch_nums,
        agreement=tuple(1 - count / total for count, total in zip(counts, totals, strict=True)),
        flips=tuple(flips),
        equal_codes=float(np.mean(equal)),
        features_error=max(errors),
        semantic_error=max(semantic_errors),
        semantic_cosine=min(cosines),
        decode_psnr=min(psnrs),
        decode_ssim=min(ssims),
    )


def mean_cosine(a: Float32, b: Float32) -> float:
    """Mean cosine of the rows of two float32 [..., N, D]."""
    return float(np.mean((a * b).sum(axis=-1) / np.maximum(np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1), 1e-12)))
