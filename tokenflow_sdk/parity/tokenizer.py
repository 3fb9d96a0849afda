"""Compares a tokenizer's graphs, on any backend, with what PyTorch computed for the bundle's reference images.

The codebook search is residual, so one code that differs (a flip) changes all finer scales. Agreement of codes is therefore
counted *teacher-forced*: the residual of each scale is formed from the reference's codes, and only the latent comes from the
graphs under test. A flip between two codes that are about equally near is harmless, so each flip is reported with its margin,
the difference of their squared distances.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from tokenflow_sdk.bundle.arrays import load_reference
from tokenflow_sdk.bundle.bundle import Bundle
from tokenflow_sdk.bundle.model_config import TokenizerConfig
from tokenflow_sdk.model.tokenizer_graphs import TokenizerGraphs
from tokenflow_sdk.parity.tokenizer_report import Flip, TokenizerReport
from tokenflow_sdk.pictures.images import psnr, ssim
from tokenflow_sdk.pictures.resize import area_matrix, bicubic_matrix

__all__ = [
    "TokenizerReference",
    "check_tokenizer",
    "find_flips",
    "forced_agreement",
    "mean_cosine",
    "scale_cells",
]

Float32 = NDArray[np.float32]


@dataclass(frozen=True)
class TokenizerReference:
    """What PyTorch computed for N images at export, stored in the bundle as `reference.npz`.

    Attributes:
        images: preprocessed inputs, uint8 [N, height, width, 3].
        code_indices: int32 [N, L].
        latent: the encoders' output before the codebook search, float32 [N, C, g, g].
        features: quantized features, float32 [N, C, g, g].
        decoded: images decoded from the codes, uint8 [N, height, width, 3].
        semantic: the semantic decoder's features, float32 [N, g * g, semantic_width].
        codebook: float32 [K, C]; the semantic and the pixel half of each row have unit length.
    """

    layout: ClassVar[str] = (
        "images uint8 n image_size image_size 3; code_indices int32<codebook_size n n_codes; "
        "latent float32 n code_dim grid grid; features float32 n code_dim grid grid; "
        "decoded uint8 n image_size image_size 3; semantic float32 n cells semantic_width; "
        "codebook float32 codebook_size code_dim"
    )

    images: NDArray[np.uint8]
    code_indices: NDArray[np.int32]
    latent: Float32
    features: Float32
    decoded: NDArray[np.uint8]
    semantic: Float32
    codebook: Float32

    @classmethod
    def load(cls, bundle: Bundle[TokenizerConfig]) -> TokenizerReference:
        """Read a bundle's reference.

        Raises:
            CorruptBundleError: the bundle has no reference, or it is damaged.
        """
        return load_reference(bundle, cls)


def scale_cells(
    latent: Float32, codebook: Float32, config: TokenizerConfig, forced: NDArray[np.int32] | None = None
) -> Iterator[tuple[NDArray[np.float64], NDArray[np.int64]]]:
    """Residual codebook search with shared mapping for one image: a slow, plain version of the encode graph's.

    Args:
        latent: float32 [C, g, g].
        codebook: float32 [K, C].
        config: of the tokenizer.
        forced: code indices, int32 [L], to form the residuals from (teacher forcing); None: from the nearest codes.

    Yields:
        For each scale of side s the cells that are looked up, float64 [s * s, C], and the nearest codes, int64 [s * s]. The
        semantic half of a cell has unit length, the pixel half has length `config.pixel_weight`.
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
    """Fraction of codes in each scale that a search in the latents reproduces, teacher-forced.

    Args:
        latents: of N images, float32 [N, C, g, g].
        codes: the images' expected codes, int32 [N, L].
        codebook: float32 [K, C].
        config: of the tokenizer.
    """
    rows = [
        np.concatenate([nearest for _, nearest in scale_cells(latent, codebook, config, row)])
        for latent, row in zip(latents, codes, strict=True)
    ]
    return tuple(float(scale.mean()) for scale in config.scales.split(np.stack(rows) == codes))


def _flips(
    picture: int, reference: TokenizerReference, config: TokenizerConfig, got: NDArray[np.int32], judged: Sequence[bool]
) -> list[Flip]:
    """Flips of the codes `got`, int32 [L], of reference image `picture`, in those scales for which `judged` is true."""
    flips = []
    expected = reference.code_indices[picture]
    scales = scale_cells(reference.latent[picture], reference.codebook, config, expected)
    for scale, (cells, _) in enumerate(scales):
        start, end = config.scales.starts[scale], config.scales.ends[scale]
        for at in np.flatnonzero(got[start:end] != expected[start:end]) if judged[scale] else ():
            ours, theirs = int(got[start + at]), int(expected[start + at])
            # Both halves of cells and codes have fixed lengths, so a squared distance is a constant minus twice the product.
            margin = 2 * float(cells[at] @ (reference.codebook[theirs].astype(np.float64) - reference.codebook[ours]))
            flips.append(Flip(picture, scale, int(at), theirs, ours, margin))
    return flips


def find_flips(
    picture: int, reference: TokenizerReference, config: TokenizerConfig, codes: NDArray[np.int32], latent: Float32
) -> list[Flip]:
    """Compare one image's latent and codes with the reference.

    Args:
        picture: index of the reference image.
        reference: of the bundle.
        config: of the tokenizer.
        codes: under test, int32 [L].
        latent: under test, float32 [C, g, g].

    Returns:
        The flips of a teacher-forced search in the latent, and those of `codes` in the first scale that differs from the
        reference; later scales differ as a consequence.
    """
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
    """Compare a tokenizer's graphs with what PyTorch computed for the bundle's reference images.

    Args:
        graphs: on any backend.
        reference: None: the bundle's own.
        progress: called after each image with the fraction done, from 0 to 1.

    Raises:
        CorruptBundleError, BackendError: the reference or a graph cannot be loaded or run.
    """
    config = graphs.bundle.config
    reference = reference or TokenizerReference.load(graphs.bundle)
    flips: list[Flip] = []
    equal, errors, semantic_errors, cosines, psnrs, ssims = [], [], [], [], [], []
    for i in range(len(reference.images)):
        image, expected = reference.images[i : i + 1], reference.code_indices[i]
        codes, latent = (found[0] for found in graphs.encode_with_latent(image))
        flips += find_flips(i, reference, config, codes, latent)
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
    """Mean cosine of corresponding rows of two arrays, float32 [..., D]."""
    return float(np.mean((a * b).sum(axis=-1) / np.maximum(np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1), 1e-12)))
