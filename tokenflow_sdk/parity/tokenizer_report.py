"""The report of comparing a tokenizer with its reference, and the tolerances that it must keep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from tokenflow_sdk.errors import ParityError
from tokenflow_sdk.pictures.scales import Scales

__all__ = [
    "EIGHT_BIT_PSNR",
    "EXACT",
    "ROUNDED",
    "TIE_DISTANCE",
    "Flip",
    "TokenizerReport",
    "Tolerances",
    "worst_margin",
]

TIE_DISTANCE = 1e-4
"""Codes whose squared distances differ by less than this are equally near: either is right."""


@dataclass(frozen=True)
class Tolerances:
    """Bounds that the figures of a `TokenizerReport` must keep.

    Attributes:
        margin: every flip's margin must be smaller, in either direction.
        agreement: least fraction of equal codes, teacher-forced, over all scales.
        features_error: largest absolute error of the quantized features.
        semantic_error: largest absolute error of the semantic features.
        semantic_cosine: least mean cosine of an image's semantic features.
        decode_psnr: least PSNR of a decoded image, in dB.
    """

    margin: float
    agreement: float
    features_error: float
    semantic_error: float
    semantic_cosine: float
    decode_psnr: float

    def code_failures(self, flips: Sequence[Flip], agreement: float) -> list[str]:
        """The tolerances of codes that are missed, in words. NaN misses a tolerance.

        Args:
            flips: of all images.
            agreement: fraction of equal codes, teacher-forced.
        """
        worst = worst_margin(flips)
        checks = [
            (worst < self.margin, f"a code flipped at a margin of {worst:.1e} (less than {self.margin:.0e} is accepted)"),
            (agreement >= self.agreement, f"only {agreement:.2%} of the codes agree ({self.agreement:.1%} must)"),
        ]
        return [text for holds, text in checks if not holds]

    def decode_failures(self, decibels: float) -> list[str]:
        """The tolerance of decoded images, in words, if `decibels`, the worst image's PSNR, misses it; else empty."""
        return [] if decibels >= self.decode_psnr else [f"decoded pictures agree to {decibels:.1f} dB only"]


EXACT = Tolerances(TIE_DISTANCE, 0.0, 1e-3, 1e-2, 0.9999, 55.0)
"""For graphs in float32."""
ROUNDED = Tolerances(0.1, 0.975, 1e-2, float("inf"), 0.999, 45.0)
"""For engines in half precision: rounding moves latents by about 1e-3, which flips codes that are nearly equally near."""
EIGHT_BIT_PSNR = 40.0
"""Least PSNR, in dB, of images from an int8 or fp8 decoder.

Errors at this level are far below those of the tokenizer itself, and a decoder with wrong quantization scales misses it.
docs/guides/precision.md has figures.
"""


@dataclass(frozen=True)
class Flip:
    """A code that differs from the reference's.

    Attributes:
        picture: index of the reference image.
        scale: index of the scale, from 0, coarse to fine.
        position: index of the code in its scale, row by row.
        expected: the reference's code.
        got: the code under test.
        margin: squared distance of `got` to the reference's cell, minus that of `expected`.
    """

    picture: int
    scale: int
    position: int
    expected: int
    got: int
    margin: float


def worst_margin(flips: Sequence[Flip]) -> float:
    """The largest absolute margin; 0 without flips."""
    return max((abs(flip.margin) for flip in flips), default=0.0)


@dataclass(frozen=True)
class TokenizerReport:
    """Figures of comparing a tokenizer's graphs with its reference; each is the worst of all images unless it says otherwise.

    Attributes:
        pictures: number of reference images.
        patch_nums: sides of the scales in cells, coarse to fine.
        agreement: fraction of the codes in each scale, over all images, that are not in `flips`.
        flips: teacher-forced, and those of the graphs' own codes in the first scale that differs.
        equal_codes: fraction of equal codes, not teacher-forced, over all images.
        features_error: largest absolute error of the quantized features.
        semantic_error: largest absolute error of the semantic features.
        semantic_cosine: mean cosine of the semantic features.
        decode_psnr: PSNR of the decoded images in dB; infinite if they are equal.
        decode_ssim: SSIM of the decoded images.
    """

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
        """`agreement` over the codes of all scales."""
        return float(np.average(self.agreement, weights=Scales(self.patch_nums).counts))

    def failures(self, tolerances: Tolerances = EXACT) -> list[str]:
        """The tolerances that are missed, in words; empty if none."""
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
        """The main figures in one line."""
        decoded = "identical" if np.isinf(self.decode_psnr) else f"{self.decode_psnr:.1f} dB, SSIM {self.decode_ssim:.4f}"
        return (
            f"codes agree {self.overall:.2%} teacher-forced ({len(self.flips)} flips, worst scale {min(self.agreement):.2%}), "
            f"decode {decoded}, semantic cosine {self.semantic_cosine:.5f}"
        )

    def to_json(self) -> dict[str, Any]:
        """All figures as JSON, for bundle.json and certificates; an infinite PSNR becomes null."""
        data = asdict(self)
        data["decode_psnr"] = None if np.isinf(self.decode_psnr) else round(self.decode_psnr, 2)
        return data

    def require(self, what: str) -> None:
        """Raise unless all float32 tolerances hold.

        Args:
            what: what was compared, for the message.

        Raises:
            ParityError: a tolerance is missed.
        """
        failures = self.failures()
        if failures:
            raise ParityError(
                f"{what} does not reproduce PyTorch: {'; '.join(failures)}.",
                "Do not use it. Update onnxruntime or export again with other versions, and report it with these figures.",
            )
