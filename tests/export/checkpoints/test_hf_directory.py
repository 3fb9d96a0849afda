from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.support.small_language_model import SIZES, exporters_logits, state_of, transformers_model, write_directory
from tokenflow_export.checkpoints.hf_directory import HfDirectory
from tokenflow_sdk.errors import CheckpointError

LLAMA = SIZES | {"model_type": "llava_llama"}
HEAD = "lm_head.weight"


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return state_of(transformers_model(LLAMA))


def as_bin(path: Path) -> HfDirectory:
    from safetensors.torch import load_file

    torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()
    return HfDirectory(path)


@pytest.mark.parametrize("binary", [False, True], ids=["safetensors", "bin"])
@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2, torch.int64, torch.complex64], ids=str
)
def test_codes_are_not_read_as_weights(dtype: torch.dtype, binary: bool, weights: dict[str, Tensor], tmp_path: Path) -> None:
    directory = write_directory(tmp_path, LLAMA, weights | {HEAD: weights[HEAD].to(dtype)})
    directory = as_bin(tmp_path) if binary else directory
    with pytest.raises(CheckpointError, match=rf"1 tensors in .* are no floats of 16 bits or more \(first: {HEAD}, "):
        exporters_logits(directory, torch.arange(3))


@pytest.mark.parametrize("binary", [False, True], ids=["safetensors", "bin"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_floats_of_any_width_are_read_as_float32(
    dtype: torch.dtype, binary: bool, weights: dict[str, Tensor], tmp_path: Path
) -> None:
    directory = write_directory(tmp_path, LLAMA, {key: value.to(dtype) for key, value in weights.items()})
    directory = as_bin(tmp_path) if binary else directory
    assert exporters_logits(directory, torch.arange(3)).shape == (3, 40)
    assert torch.equal(directory.tensor(HEAD), weights[HEAD].to(dtype).float())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_named(value: float, weights: dict[str, Tensor], tmp_path: Path) -> None:
    spoilt = weights[HEAD].clone()
    spoilt[7, 3] = value
    directory = write_directory(tmp_path, LLAMA, weights | {HEAD: spoilt})
    with pytest.raises(CheckpointError, match=f"{HEAD} in .* has values that are NaN or infinite"):
        directory.tensor(HEAD)


def test_values_beyond_float32_are_named(weights: dict[str, Tensor], tmp_path: Path) -> None:
    directory = write_directory(tmp_path, LLAMA, weights | {HEAD: weights[HEAD].double() * 1e300})
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        directory.tensor(HEAD)
