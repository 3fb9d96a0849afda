from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tokenflow_export.checkpoints.hf_directory import HfDirectory
from tokenflow_sdk.errors import CheckpointError

SAFE, SAFE_INDEX = "model.safetensors", "model.safetensors.index.json"
BIN, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


def write(directory: Path, name: str, weights: dict[str, Tensor]) -> None:
    """Weights under one of the names of transformers; two shards where it is an index's."""
    save = save_file if "safetensors" in name else torch.save
    if not name.endswith("index.json"):
        save(weights, directory / name)
        return
    shards = {key: f"{i}-{name.removesuffix('.index.json')}" for i, key in enumerate(weights)}
    for key, shard in shards.items():
        save({key: weights[key]}, directory / shard)
    (directory / name).write_text(json.dumps({"weight_map": shards}))


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


@pytest.mark.parametrize(
    "names", [(SAFE, SAFE_INDEX), (SAFE, BIN), (SAFE_INDEX, BIN), (SAFE_INDEX, BIN_INDEX), (BIN, BIN_INDEX)]
)
def test_of_two_sets_transformers_choice_is_read(names: tuple[str, str], directory: Path) -> None:
    for value, name in enumerate(names):
        write(directory, name, {"a": torch.full((2,), float(value)), "b": torch.zeros(1)})
    assert HfDirectory(directory).tensor("a").tolist() == [0, 0]


def damaged(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def go(directory: Path) -> None:
        index = json.loads((directory / SAFE_INDEX).read_text())
        change(index)
        (directory / SAFE_INDEX).write_text(json.dumps(index))

    return go


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda d: save_file({"a": torch.ones(2), "b": torch.ones(1)}, d / "1-model.safetensors"), "has a twice, in 0-model"),
        (damaged(lambda i: i["weight_map"].update(ghost="1-model.safetensors")), "ghost is not in 1-model.safetensors"),
        (damaged(lambda i: i["weight_map"].update(a="1-model.safetensors", c="0-model.safetensors")), "a is not in 1-model"),
        (lambda d: save_file({"b": torch.ones(1), "c": torch.ones(1)}, d / "1-model.safetensors"), "c in .* not in the index"),
        (
            damaged(lambda i: i["weight_map"].update(a="../0-model.safetensors")),
            r"'\.\./0-model.safetensors', which is no file name",
        ),
        (damaged(lambda i: i["weight_map"].update(a="/etc/passwd")), "'/etc/passwd', which is no file name"),
        (damaged(lambda i: i.update(weight_map=["a"])), "no weight_map from keys to files"),
        (damaged(lambda i: i["weight_map"].update(a=1)), "no weight_map from keys to files"),
        (damaged(lambda i: i.update(weight_map=None)), "no weight_map from keys to files"),
        (damaged(lambda i: i.update(weight_map={})), "lacks 0 of 0 shards"),
        (lambda d: (d / SAFE_INDEX).write_text("[" * 100_000), "is not valid JSON"),
        (lambda d: (d / "adapter_config.json").write_text("{}"), r"adapter beside its weights \(adapter_config.json\)"),
        (lambda d: torch.save({}, d / "non_lora_trainables.bin"), "adapter beside its weights"),
    ],
)
def test_indexes_that_are_not_of_their_shards_are_refused(damage, words: str, directory: Path) -> None:
    write(directory, SAFE_INDEX, {"a": torch.zeros(2), "b": torch.zeros(1)})
    damage(directory)
    with pytest.raises(CheckpointError, match=words):
        _ = HfDirectory(directory).shapes


@pytest.mark.parametrize(
    "value",
    [
        torch.ones(2, dtype=torch.int8),
        torch.ones(2, dtype=torch.bool),
        torch.ones(2).to(torch.float8_e4m3fn),
        torch.ones(2, dtype=torch.complex64),
    ],
    ids=lambda value: str(value.dtype),
)
@pytest.mark.parametrize("name", [SAFE, BIN])
def test_codes_are_not_read_as_weights(name: str, value: Tensor, directory: Path) -> None:
    write(directory, name, {"a": value})
    with pytest.raises(CheckpointError, match=f"a is {value.dtype}, not a plain float"):
        HfDirectory(directory).tensor("a")
    # Nor is anything begun with them.
    with pytest.raises(CheckpointError, match=r"a is .*, not a plain float"):
        HfDirectory(directory).require({"a": (2,)})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300])
@pytest.mark.parametrize("name", [SAFE, BIN])
def test_values_that_are_not_finite_in_float32_are_named(name: str, value: float, directory: Path) -> None:
    write(directory, name, {"a": torch.tensor([1.0, value], dtype=torch.float64)})
    with pytest.raises(CheckpointError, match="a has values that are NaN or infinite"):
        HfDirectory(directory).tensor("a")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", [SAFE, BIN])
def test_floats_of_any_width_are_read_as_float32(name: str, dtype: torch.dtype, directory: Path) -> None:
    write(directory, name, {"a": torch.tensor([1.5, -2.0], dtype=dtype)})
    found = HfDirectory(directory)
    found.require({"a": (2,)})
    assert torch.equal(found.tensor("a"), torch.tensor([1.5, -2.0]))


@pytest.mark.parametrize("name", [SAFE, SAFE_INDEX, BIN, BIN_INDEX])
def test_keys_of_wrapped_modules_are_the_released_ones(name: str, directory: Path) -> None:
    write(directory, name, {f"_orig_mod.module.{key}": torch.full((2,), 3.0) for key in ("a", "b.rotary_emb.inv_freq")})
    found = HfDirectory(directory)
    assert found.shapes == {"a": (2,)}
    assert found.tensor("a").tolist() == [3, 3]


@pytest.mark.parametrize(
    ("content", "words"), [([torch.ones(1)], "no state dict"), ({"a": torch.ones(1), "step": 3}, "'step', a int, among")]
)
def test_a_bin_that_is_no_state_dict_is_named(content: object, words: str, directory: Path) -> None:
    torch.save(content, directory / BIN)
    with pytest.raises(CheckpointError, match=words):
        _ = HfDirectory(directory).shapes


def test_the_towers_keys_are_found_and_not_required(directory: Path) -> None:
    key = "model.vision_tower.vq.quantize.embedding_vqkd.weight"
    write(directory, SAFE, {"a": torch.zeros(2), key: torch.ones(1), "vision_tower.b": torch.ones(1)})
    found = HfDirectory(directory)
    assert found.shapes == {"a": (2,), "vision_tower.b": (1,)}
    assert found.tower_key("quantize.embedding_vqkd.weight") == key
    assert found.tower_key("quantize.embedding_vqgan.weight") is None
