"""Compares the results of the sides with those of onnxruntime on the CPU, for crops of a photo."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from benchmarks.common import ROOT
from benchmarks.gpu.codecs import Codec, Side
from tokenflow_sdk import Tokenizer
from tokenflow_sdk.bundle.bundle import Bundle
from tokenflow_sdk.bundle.model_config import TokenizerConfig
from tokenflow_sdk.errors import CheckpointError
from tokenflow_sdk.parity.tokenizer import TokenizerReference, check_tokenizer, find_flips
from tokenflow_sdk.parity.tokenizer_report import EXACT, ROUNDED, Flip, Tolerances, worst_margin
from tokenflow_sdk.pictures.images import preprocess, psnr

__all__ = ["batch_failures", "compare", "crops", "reference_of", "require_same_weights"]

_CORNERS = ((0.0, 0.0), (0.5, 0.0), (0.0, 0.5), (0.5, 0.5))
"""The left and upper edge of each crop, as a share of the photo's sides less the crop's."""


def crops(config: TokenizerConfig) -> NDArray[np.uint8]:
    """Cut four squares from the example photo: u8 [4, H, W, 3]."""
    with Image.open(ROOT / "examples" / "chelsea.jpg") as photo:
        side = min(photo.size) * 2 // 3
        room = (photo.width - side, photo.height - side)
        found = []
        for x, y in _CORNERS:
            left, upper = round(2 * x * room[0]), round(2 * y * room[1])
            part = photo.crop((left, upper, left + side, upper + side))
            found.append(preprocess(part, config.image_size, config.preprocess))
    return np.stack(found)


def reference_of(bundle: Bundle[TokenizerConfig], threads: int | None) -> TokenizerReference:
    """Compute the reference for the crops in onnxruntime on the CPU."""
    images = crops(bundle.config)
    shape = (len(images), bundle.config.code_dim, bundle.config.grid, bundle.config.grid)
    with Tokenizer.from_pretrained(bundle.path, device="cpu", threads=threads, backend="onnxruntime") as cpu:
        indices = cpu.encode_array(images)
        rows = [cpu.codes(row) for row in indices]
        return TokenizerReference(
            images=images,
            code_indices=indices,
            latent=cpu.latent(images),
            features=np.stack([cpu.features(row).T for row in rows]).reshape(shape),
            decoded=cpu.decode_array(indices),
            semantic=np.stack([cpu.semantic(row) for row in rows]),
            codebook=TokenizerReference.load(bundle).codebook,
        )


def compare(side: Side, codec: Codec, reference: TokenizerReference) -> dict[str, Any]:
    """Compare a side with the reference.

    Returns:
        The share of equal codes, the teacher-forced agreement, the largest margin of a flip, the least PSNR of decoded pictures
        in dB (None: identical), and the tolerances that are missed, in words.
    """
    if isinstance(codec, Tokenizer):
        report = check_tokenizer(codec.graphs, reference)
        encoded, decibels = _Encoded(report.equal_codes, report.overall, report.flips), report.decode_psnr
        failures = report.failures(_tolerances(side))
    else:
        encoded, decibels = _encode(codec, reference, 1), _decode(codec, reference, 1)
        tolerances = _tolerances(side)
        failures = tolerances.code_failures(encoded.flips, encoded.agreement) + tolerances.decode_failures(decibels)
    shown = None if np.isinf(decibels) else round(float(decibels), 2)
    return {
        "equal_codes": encoded.equal,
        "agreement": encoded.agreement,
        "largest_flip_margin": worst_margin(encoded.flips),
        "decode_psnr": shown,
        "failures": failures,
    }


def batch_failures(side: Side, codec: Codec, graph: str, batch: int, reference: TokenizerReference) -> list[str]:
    """The tolerances that a graph misses in batches of this size, in words. Engines may use other kernels for each batch."""
    if graph == "encode":
        encoded = _encode(codec, reference, batch)
        return _tolerances(side).code_failures(encoded.flips, encoded.agreement)
    return _tolerances(side).decode_failures(_decode(codec, reference, batch))


def _tolerances(side: Side) -> Tolerances:
    """The tolerances for a side. PyTorch in float32 is judged as half precision is: it need not give the same bits."""
    return EXACT if side.ours and side.dtype == "float32" else ROUNDED


@dataclass(frozen=True)
class _Encoded:
    equal: float
    agreement: float
    flips: Sequence[Flip]


def _encode(codec: Codec, reference: TokenizerReference, batch: int) -> _Encoded:
    flips: list[Flip] = []
    equal: list[float] = []
    for pictures in _batches(len(reference.images), batch):
        images = reference.images[pictures]
        for picture, codes, latent in zip(pictures, codec.encode_array(images), codec.latent(images), strict=True):
            flips += find_flips(picture, reference, codec.config, codes, latent)
            equal.append(float((codes == reference.code_indices[picture]).mean()))
    agreement = 1 - len(flips) / (len(equal) * reference.code_indices.shape[1])
    return _Encoded(float(np.mean(equal)), agreement, flips)


def _decode(codec: Codec, reference: TokenizerReference, batch: int) -> float:
    """The PSNR of the worst decoded picture in dB."""
    return min(
        psnr(decoded, reference.decoded[picture])
        for pictures in _batches(len(reference.images), batch)
        for picture, decoded in zip(pictures, codec.decode_array(reference.code_indices[pictures]), strict=True)
    )


def _batches(count: int, batch: int) -> list[list[int]]:
    """Split pictures into as few batches of one size as include each at least once; the last wraps around."""
    return [[number % count for number in range(start, start + batch)] for start in range(0, count, batch)]


def require_same_weights(found: Mapping[str, Any], checkpoint: object, bundle: object) -> None:
    """Check that the bundle was exported from the checkpoint, by the agreement that half precision must reach.

    Raises:
        CheckpointError: it was exported from another one.
    """
    if found["agreement"] < ROUNDED.agreement:
        raise CheckpointError(
            f"PyTorch with {checkpoint} gives other codes than {bundle}: only {found['agreement']:.1%} agree.",
            "Give the --checkpoint that the --bundle was exported from, or leave one of them out.",
        )
