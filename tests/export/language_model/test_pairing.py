from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.support.mini_generator import codebook, tokenizer_bundle
from tokenflow_export.checkpoints.hf_directory import HfDirectory
from tokenflow_export.language_model.pairing import require_same_tokenizer
from tokenflow_sdk.errors import CheckpointError


def directory(path: Path, table: np.ndarray | None, dtype: torch.dtype, **config: object) -> HfDirectory:
    (path / "config.json").write_text(json.dumps(config))
    weights = {"a": torch.zeros(1)}
    if table is not None:
        halves = {"vqkd": table[:, :32] * 3, "vqgan": table[:, 32:]}  # released tables are not of unit length
        prefix = "model.vision_tower.vq_model.quantize.embedding_"
        weights |= {f"{prefix}{name}.weight": torch.from_numpy(half.copy()).to(dtype) for name, half in halves.items()}
    save_file(weights, path / "model.safetensors")
    return HfDirectory(path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_directorys_own_codebook_is_compared(dtype: torch.dtype, tmp_path: Path) -> None:
    bundle = tokenizer_bundle(tmp_path / "tok", (1, 2), 50)
    require_same_tokenizer(directory(tmp_path, codebook(50), dtype), bundle)
    for other in (codebook(50, seed=1), codebook(51), np.roll(codebook(50), 1, axis=0)):
        with pytest.raises(
            CheckpointError, match="holds the codebook of its tokenizer .*embedding_vqkd.* is another. Give --tok"
        ):
            require_same_tokenizer(directory(tmp_path, other, dtype), bundle)


@pytest.mark.parametrize("kind", ["TOKEN_FLOW", "VQType.TOKEN_FLOW", "LLAMAGEN_VQKD", None])
def test_what_released_configs_say_fits(kind: str | None, tmp_path: Path) -> None:
    values = {"mm_vision_vq_type": kind, "mm_hidden_size": 40, "mm_projector_type": "mlp2x_gelu"}
    require_same_tokenizer(directory(tmp_path, None, torch.float32, **values), tokenizer_bundle(tmp_path / "tok", (1, 2), 50))


@pytest.mark.parametrize(
    ("key", "value"),
    [("mm_vision_vq_type", "CLIP"), ("mm_hidden_size", 1152), ("mm_projector_type", "linear"), ("vq_codebook_size", 51)],
)
def test_another_tokenizer_in_config_json_is_refused(key: str, value: object, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"config.json gives {key} as {value!r}"):
        require_same_tokenizer(
            directory(tmp_path, None, torch.float32, **{key: value}), tokenizer_bundle(tmp_path / "tok", (1, 2), 50)
        )
