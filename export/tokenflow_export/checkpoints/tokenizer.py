"""Reads released tokenizer checkpoints: fetches them, recognises the variant, and loads the weights strictly.

A checkpoint is a `.pt` pickle (read with `weights_only=True`) that holds the state dict under `ema`, else `model`, else
`state_dict`, or it is a `.safetensors` file that holds the state dict itself. Tensors stay memory-mapped until they are used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from tokenflow_export.checkpoints.pickles import load_pickle, released_keys, state_dict_in
from tokenflow_export.checkpoints.strict import Shapes, as_float32, key_problems
from tokenflow_export.models.config import STANDARD, VARIANTS, TokenizerArchitecture
from tokenflow_export.models.tokenizer import TokenFlowTokenizer
from tokenflow_sdk.errors import ArgumentError, CheckpointError

__all__ = ["load_model", "read_state_dict", "recognise", "released_shapes", "resolve"]

_POSITION_TABLES = {"encoder_vqkd.positional_embedding": "semantic_encoder", "decoder_vqkd.pos_embed": "semantic_decoder"}


def resolve(checkpoint: str) -> Path:
    """The local path of a checkpoint, which is a path or `hf://org/repo/path/to/file`; the latter is downloaded once.

    Raises:
        CheckpointError: there is no such file, or it could not be downloaded.
    """
    if checkpoint.startswith("hf://"):
        return _download(checkpoint)
    path = Path(checkpoint).expanduser()
    if path.is_file():
        return path
    why = "is a directory" if path.is_dir() else "does not exist"
    raise CheckpointError(
        f"Checkpoint {checkpoint!r} {why}.",
        "Give the released .pt or .safetensors file, or hf://org/repo/file to fetch it from the Hugging Face hub.",
    )


def _download(url: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    parts = url.removeprefix("hf://").split("/", 2)
    if len(parts) < 3 or not all(parts):
        raise CheckpointError(f"{url!r} names no file on the hub.", "Write it as hf://org/repo/path/in/repo.pt.")
    try:
        return Path(hf_hub_download(f"{parts[0]}/{parts[1]}", parts[2]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"{url!r} could not be fetched: {str(error).splitlines()[0]}",
            "Check the name and the network (private repositories need `hf auth login`), or download it and give its path.",
        ) from error


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Read the state dict of a checkpoint, memory-mapped. Code in a pickle is never executed.

    Raises:
        CheckpointError: the file is damaged or truncated, or holds no state dict.
    """
    state = _read_safetensors(path) if path.suffix == ".safetensors" else state_dict_in(load_pickle(path), path.name)
    return {key: state[stored] for key, stored in released_keys(state).items()}


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path, device="cpu")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path.name} cannot be read as safetensors: {error}", "It may be truncated: download it again."
        ) from error


def released_shapes(config: TokenizerArchitecture) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of a released checkpoint by its key, including tensors that are never used."""
    with torch.device("meta"):
        model = TokenFlowTokenizer(config)
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    for key, part in _POSITION_TABLES.items():
        if key in shapes:
            grid = getattr(config, part).position_grid
            shapes[key] = (*shapes[key][:-2], grid * grid + 1, shapes[key][-1])
    return shapes | _unused_shapes(config, shapes)


def _unused_shapes(config: TokenizerArchitecture, shapes: Shapes) -> dict[str, tuple[int, ...]]:
    semantic = config.semantic_encoder
    unused: dict[str, tuple[int, ...]] = {"quantize.codebook_used": (4 * config.codebook_size,)}
    if semantic.projection_width:
        unused["encoder_vqkd.proj"] = (semantic.width, semantic.projection_width)
    if semantic.kind != "siglip":
        return unused
    layer = "encoder_vqkd.vision_model.encoder.layers."
    for index in range(semantic.layers, semantic.layers + semantic.unused_layers):
        for key in [k for k in shapes if k.startswith(f"{layer}0.")]:
            unused[f"{layer}{index}." + key.removeprefix(f"{layer}0.")] = shapes[key]
    width, mlp_width, vision = semantic.width, semantic.mlp_width, "encoder_vqkd.vision_model."
    tail = {
        "post_layernorm": (width,),
        "head.attention.out_proj": (width, width),
        "head.layernorm": (width,),
        "head.mlp.fc1": (mlp_width, width),
        "head.mlp.fc2": (width, mlp_width),
    }
    for name, shape in tail.items():
        unused |= {f"{vision}{name}.weight": shape, f"{vision}{name}.bias": shape[:1]}
    attention = f"{vision}head.attention.in_proj_"
    return unused | {
        f"{vision}head.probe": (1, 1, width),
        f"{attention}weight": (3 * width, width),
        f"{attention}bias": (3 * width,),
    }


def recognise(shapes: Shapes, variant: str | None = None, name: str = "checkpoint") -> TokenizerArchitecture:
    """Find the configuration that a state dict has, from its keys and shapes.

    A CLIP tokenizer has the same keys at 224 and at 256 px. Without `variant`, one with the enhanced decoder is taken for
    `clipb_256` and one with the standard decoder for `clipb_224`, as they were released.

    Args:
        shapes: of the state dict.
        variant: the name of the variant, if it is known.
        name: of the checkpoint, for messages.

    Raises:
        ArgumentError: `variant` is unknown, or is not what the checkpoint holds.
        CheckpointError: these are not the keys of a TokenFlow tokenizer.
    """
    if variant is not None and variant not in VARIANTS:
        raise ArgumentError(f"There is no variant {variant!r}.", f"Choose one of: {', '.join(VARIANTS)}.")
    output = shapes.get("decoder.conv_out.weight")
    if "encoder_vqkd.class_embedding" in shapes:
        enhanced = output is not None and output[1] == VARIANTS["clipb_256"].pixel_decoder.base_channels
        candidates = ["clipb_256", "clipb_224"] if enhanced else ["clipb_224", "clipb_256"]
    elif "encoder_vqkd.patch_embed.backbone.stem.conv1.weight" in shapes:
        candidates, enhanced = ["vitamin_256"], False
    elif "encoder_vqkd.vision_model.embeddings.patch_embedding.weight" in shapes:
        candidates, enhanced = ["siglip_384"], False
    else:
        raise CheckpointError(
            f"{name} is not a TokenFlow tokenizer: it has none of the known semantic encoders' keys (first key: "
            f"{next(iter(shapes), None)!r}).",
            "Give the tokenizer's own checkpoint, not the language model's.",
        )
    if variant is not None and variant not in candidates:
        raise ArgumentError(
            f"{name} holds a {' or '.join(sorted(candidates))} tokenizer, not {variant}.", "Leave --variant out, or correct it."
        )
    config = VARIANTS[variant or candidates[0]]
    decoder = VARIANTS["clipb_256"].pixel_decoder if enhanced else STANDARD
    return replace(config, pixel_decoder=decoder)


def check_keys(shapes: Shapes, config: TokenizerArchitecture, name: str) -> None:
    """Check that keys and shapes are exactly those of `released_shapes`.

    Raises:
        CheckpointError: they are not; the message counts the missing, unexpected and mis-shaped keys and names the first.
    """
    problems = key_problems(shapes, released_shapes(config))
    if problems:
        raise CheckpointError(
            f"{name} does not match {config.variant}: {problems}.",
            "Check that it is the released file of this variant and was downloaded completely.",
        )


def load_model(state: Mapping[str, Tensor], config: TokenizerArchitecture, name: str = "checkpoint") -> TokenFlowTokenizer:
    """Build the PyTorch model and load a state dict into it, strictly, as float32. Float32 tensors are used without a copy.

    Raises:
        CheckpointError: keys, shapes or dtypes are not those of a released checkpoint of this configuration.
    """
    check_keys({key: tuple(value.shape) for key, value in state.items()}, config, name)
    with torch.device("meta"):
        model = TokenFlowTokenizer(config)
    weights = {}
    for key, target in model.state_dict().items():
        value = as_float32(state[key], key, name)
        weights[key] = _resize_positions(value, config.grid) if value.shape != target.shape else value
    model.load_state_dict(weights, strict=True, assign=True)
    return model.eval().requires_grad_(False)


def _resize_positions(table: Tensor, grid: int) -> Tensor:
    """Resize a position table [..., 1 + r * r, D] to [..., 1 + grid * grid, D] (docs/model.md, section 2).

    As in the released code, the coordinates use the factor (grid + 0.1) / r instead of grid / r.
    """
    first, cells = table[..., :1, :], table[..., 1:, :]
    released, width = round(cells.shape[-2] ** 0.5), cells.shape[-1]
    factor = (grid + 0.1) / released
    maps = cells.reshape(1, released, released, width).permute(0, 3, 1, 2)
    maps = F.interpolate(maps, scale_factor=(factor, factor), mode="bicubic", align_corners=False)
    return torch.cat([first, maps.permute(0, 2, 3, 1).reshape(*table.shape[:-2], grid * grid, width)], dim=-2)
