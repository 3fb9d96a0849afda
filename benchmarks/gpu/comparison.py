"""Do the sides compute the same? Crops of a photo, on the CPU in onnxruntime, are what each is compared with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from benchmarks.common import ROOT
from benchmarks.gpu.codecs import Codec, Side
from tokenflow_sdk import Tokenizer
from tokenflow_sdk.bundle import Bundle
from tokenflow_sdk.config import TokenizerConfig
from tokenflow_sdk.errors import CheckpointError, ParityError
from tokenflow_sdk.images import preprocess, psnr
from tokenflow_sdk.parity import EXACT, ROUNDED, Reference, check_parity, forced_agreement

__all__ = ["compare", "crops", "reference_of", "require_right", "require_same_weights"]

_CORNERS = ((0.0, 0.0), (0.5, 0.0), (0.0, 0.5), (0.5, 0.5))
"""Left and upper edge of each crop, as a share of what is left of the photo's sides."""


def crops(config: TokenizerConfig) -> NDArray[np.uint8]:
    """Four square parts of the example photo, u8 [4, H, W, 3]."""
    with Image.open(ROOT / "examples" / "chelsea.jpg") as photo:
        side = min(photo.size) * 2 // 3
        room = (photo.width - side, photo.height - side)
        found = []
        for x, y in _CORNERS:
            left, upper = round(2 * x * room[0]), round(2 * y * room[1])
            part = photo.crop((left, upper, left + side, upper + side))
            found.append(preprocess(part, config.image_size, config.preprocess))
    return np.stack(found)


def reference_of(bundle: Bundle[TokenizerConfig], threads: int | None) -> Reference:
    """What onnxruntime computes of the crops on the CPU."""
    images = crops(bundle.config)
    shape = (len(images), bundle.config.code_dim, bundle.config.grid, bundle.config.grid)
    with Tokenizer.from_pretrained(bundle.path, device="cpu", threads=threads, backend="onnxruntime") as cpu:
        indices = cpu.encode_array(images)
        rows = [cpu.codes(row) for row in indices]
        return Reference(
            images=images,
            code_indices=indices,
            latent=cpu.latent(images),
            features=np.stack([cpu.features(row).T for row in rows]).reshape(shape),
            decoded=cpu.decode_array(indices),
            semantic=np.stack([cpu.semantic(row) for row in rows]),
            codebook=Reference.load(bundle).codebook,
        )


def compare(side: Side, codec: Codec, reference: Reference) -> dict[str, Any]:
    """Share of equal codes, teacher-forced agreement, and dB of decoded pictures (None: identical); for tokenflow-sdk also
    every bar of its precision that is missed, in words."""
    if isinstance(codec, Tokenizer):
        report = check_parity(codec, reference)
        bars = EXACT if side.dtype == "float32" else ROUNDED
        agreement, equal, decibels = report.overall, report.equal_codes, report.decode_psnr
        margin = max((abs(flip.margin) for flip in report.flips), default=0.0)
        judged = {"largest_flip_margin": margin, "failures": report.failures(bars)}
    else:
        config, expected = codec.config, reference.code_indices
        singly = [(codec.encode_array(image[None]), codec.latent(image[None])) for image in reference.images]
        equal = float(np.mean([(codes[0] == row).mean() for (codes, _), row in zip(singly, expected, strict=True)]))
        latents = np.concatenate([latent for _, latent in singly])
        shares = forced_agreement(latents, expected, reference.codebook, config)
        agreement = float(np.average(shares, weights=[scale * scale for scale in config.patch_nums]))
        pictures = [codec.decode_array(row[None])[0] for row in expected]
        decibels = min(psnr(ours, theirs) for ours, theirs in zip(pictures, reference.decoded, strict=True))
        judged = {}
    shown = None if np.isinf(decibels) else round(float(decibels), 2)
    return {"equal_codes": equal, "agreement": agreement, "decode_psnr": shown} | judged


def require_same_weights(found: Mapping[str, Any], checkpoint: object, bundle: object) -> None:
    """Check float32 PyTorch by the bar that half precision has to reach.

    Raises:
        CheckpointError: the bundle was made from something else.
    """
    if found["agreement"] < ROUNDED.agreement:
        raise CheckpointError(
            f"PyTorch with {checkpoint} gives other codes than {bundle}: only {found['agreement']:.1%} agree.",
            "Give the --checkpoint that the --bundle was exported from, or leave one of them out.",
        )


def require_right(parity: Mapping[str, Mapping[str, Any]], what: str) -> None:
    """Raises:
    ParityError: a side of tokenflow-sdk missed a bar.
    """
    wrong = [f"{side}: {'; '.join(found['failures'])}" for side, found in parity.items() if found.get("failures")]
    if wrong:
        raise ParityError(
            f"WRONG RESULTS of {what}, so nothing is measured or written. {' | '.join(wrong)}.",
            "Report this with the figures; --sides leaves a side out.",
        )
