"""Small tokenizers of all three kinds: the released architectures with a few narrow layers, and random weights."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from rich.console import Console

from tokenflow_export.checkpoints.standin import standin_arrays
from tokenflow_export.checkpoints.tokenizer import load_model
from tokenflow_export.models.config import SemanticDecoderConfig, SemanticEncoderConfig, TokenizerArchitecture, VqganConfig
from tokenflow_export.models.tokenizer import TokenFlowTokenizer
from tokenflow_export.precision.search import store
from tokenflow_export.progress import ProgressSteps
from tokenflow_export.tokenizer.export import export_tokenizer
from tokenflow_export.tracing.onnx_export import file_entry
from tokenflow_sdk.bundle.bundle import Bundle, find_bundle
from tokenflow_sdk.bundle.model_config import TokenizerConfig as BundleConfig
from tokenflow_sdk.engines.annotations import RANGES
from tokenflow_sdk.parity.tokenizer import TokenizerReference
from tokenflow_sdk.passes.quantize import inner_convolutions

_PIXEL = VqganConfig(base_channels=32, blocks=1, multipliers=(1, 1, 1, 1, 2), latent_channels=32)

_TINY_PIXEL = VqganConfig(base_channels=32, blocks=1, multipliers=(1, 1, 2), latent_channels=32, patch=4, linear_skip=True)


def _config(
    variant: str, image_size: int, semantic: SemanticEncoderConfig, decoder_grid: int, preprocess: str
) -> TokenizerArchitecture:
    return TokenizerArchitecture(
        variant=variant,
        image_size=image_size,
        patch_nums=(1, 2, 3, 4),
        semantic_encoder=semantic,
        pixel_encoder=_PIXEL,
        pixel_decoder=VqganConfig(base_channels=64, blocks=1, multipliers=(1, 1, 1, 1, 2), latent_channels=32),
        semantic_decoder=SemanticDecoderConfig(
            width=48, out_width=20, mlp_width=64, position_grid=decoder_grid, layers=2, heads=4
        ),
        preprocess="squash" if preprocess == "squash" else "crop",
        codebook_size=500,
    )


MINI = {
    # As clipb_256: position tables of another grid, resized at load.
    "clip": _config("mini_clip", 64, SemanticEncoderConfig("clip", 48, 2, 4, 96, 16, 3, projection_width=24), 3, "crop"),
    "vitamin": _config(
        "mini_vitamin",
        64,
        SemanticEncoderConfig("vitamin", 48, 2, 4, 96, 16, 0, stem_widths=(16, 32), stem_depths=(2, 2)),
        4,
        "crop",
    ),
    # As siglip_384: the pixel branch reads a larger picture than the semantic one (64 = 4 x 16 against 56 = 4 x 14).
    "siglip": _config("mini_siglip", 56, SemanticEncoderConfig("siglip", 48, 2, 4, 96, 14, 4, unused_layers=1), 4, "squash"),
    # As the bundled one: a patch stem, a linear skip, and a search that weighs the pixel branch more.
    "tiny": replace(
        _config("mini_tiny", 64, SemanticEncoderConfig("clip", 48, 2, 4, 96, 16, 4, projection_width=24), 4, "crop"),
        pixel_encoder=_TINY_PIXEL,
        pixel_decoder=_TINY_PIXEL,
        semantic_dim=16,
        pixel_weight=3.0,
    ),
}


def mini_state(kind: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """Stand-in weights; those of `tiny` can be stored in half, as the bundled model's."""
    state = {key: torch.from_numpy(array) for key, array in standin_arrays(MINI[kind], seed)}
    return {key: value.half().float() for key, value in state.items()} if kind == "tiny" else state


def mini_model(kind: str, seed: int = 0) -> TokenFlowTokenizer:
    return load_model(mini_state(kind, seed), MINI[kind])


def shorten_reference(path: Path, pictures: int) -> None:
    """Leave fewer pictures in a bundle's reference, each of which takes long. Files that are links are not written into."""
    bundle = Bundle.open(path, BundleConfig)
    stored = vars(TokenizerReference.load(bundle))
    arrays = {key: rows if key == "codebook" else rows[:pictures] for key, rows in stored.items()}
    (path / "reference.npz").unlink()
    np.savez(path / "reference.npz", **arrays)
    replace(bundle, assets=dict(bundle.assets) | {"reference": file_entry(path / "reference.npz")}).write_manifest()


def bundled_tokenizer(directory: Path) -> Path:
    """A copy of the bundled tokenizer to change, with one picture in its reference instead of four, which take longer."""
    path = Path(shutil.copytree(find_bundle("tiny", "tokenizer"), directory / "tiny"))
    shorten_reference(path, 1)
    return path


def store_ranges(bundle: Path, magnitudes: float | Mapping[str, float]) -> Bundle[BundleConfig]:
    """Let a bundle say what the convolutions of its decoder read, by node or all the same."""
    if not isinstance(magnitudes, Mapping):
        magnitudes = dict.fromkeys(inner_convolutions(ir.load(bundle / "decode.onnx")), magnitudes)
    content = {dtype: {"decode": dict(magnitudes)} for dtype in ("int8", "fp8")}
    store(Bundle.open(bundle, BundleConfig), RANGES, content, {})
    return Bundle.open(bundle, BundleConfig)


def export_mini(model: TokenFlowTokenizer, out: Path, force: bool = False, compress: bool = False) -> Path:
    with ProgressSteps(Console(quiet=True)) as steps:
        export_tokenizer(model, out, {"checkpoint": "mini"}, steps, force, compress)
    return out
