from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.conftest import DATA
from tests.support.mini import MINI, mini_state
from tokenflow_export.checkpoints.tokenizer import check_keys, load_model, read_state_dict, recognise, released_shapes, resolve
from tokenflow_export.models.config import VARIANTS
from tokenflow_sdk.errors import ArgumentError, CheckpointError


def released_keys(variant: str) -> dict[str, tuple[int, ...]]:
    keys = json.loads((DATA / "keys" / f"{variant}.json").read_text())
    return {key: tuple(shape) for key, shape in keys.items()}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_released_key_is_known_with_its_shape(variant: str) -> None:
    assert released_shapes(VARIANTS[variant]) == released_keys(variant)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_variant_is_recognised_from_keys_and_shapes(variant: str) -> None:
    assert recognise(released_keys(variant)) == VARIANTS[variant]


def test_variant_settles_the_resolution_of_a_clip_tokenizer() -> None:
    at_224 = recognise(released_keys("clipb_256"), "clipb_224")
    assert (at_224.image_size, at_224.grid) == (224, 14)
    assert at_224.pixel_decoder == VARIANTS["clipb_256"].pixel_decoder
    check_keys(released_keys("clipb_256"), at_224, "x")
    at_256 = recognise(released_keys("clipb_224"), "clipb_256")
    assert at_256 == replace(VARIANTS["clipb_256"], pixel_decoder=VARIANTS["clipb_224"].pixel_decoder)


def test_a_contradicting_or_unknown_variant_is_refused() -> None:
    with pytest.raises(ArgumentError, match="siglip_384 tokenizer, not clipb_256"):
        recognise(released_keys("siglip_384"), "clipb_256")
    with pytest.raises(ArgumentError, match="Choose one of: clipb_224"):
        recognise(released_keys("siglip_384"), "clip")


def test_something_else_is_not_recognised() -> None:
    with pytest.raises(CheckpointError, match=r"not a TokenFlow tokenizer.*model\.norm\.weight"):
        recognise({"model.norm.weight": (4096,)})


def test_wrong_keys_are_named() -> None:
    shapes = released_keys("clipb_224")
    del shapes["encoder.conv_in.weight"]
    shapes["encoder.conv_in.bias"] = (64,)
    shapes["surprise"] = (1,)
    with pytest.raises(CheckpointError) as caught:
        check_keys(shapes, VARIANTS["clipb_224"], "a.pt")
    for part in (
        "a.pt",
        "1 missing (first: encoder.conv_in.weight)",
        "1 unexpected (first: surprise)",
        "1 mis-shaped (first: encoder.conv_in.bias [64] instead of [128])",
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    "wrap", [lambda s: {"ema": s, "model": {}}, lambda s: {"model": s}, lambda s: {"state_dict": s}, lambda s: s]
)
def test_state_dicts_are_found_where_training_scripts_put_them(wrap, tmp_path: Path) -> None:
    state = {"a": torch.arange(3.0)}
    torch.save(wrap(state), tmp_path / "c.pt")
    assert torch.equal(read_state_dict(tmp_path / "c.pt")["a"], state["a"])


def test_training_arguments_beside_the_weights_are_fine(tmp_path: Path) -> None:
    torch.save({"model": {"a": torch.zeros(1)}, "args": argparse.Namespace(lr=1e-4), "steps": 3}, tmp_path / "c.pt")
    assert list(read_state_dict(tmp_path / "c.pt")) == ["a"]


def test_safetensors(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "c.safetensors")
    assert torch.equal(read_state_dict(tmp_path / "c.safetensors")["a"], torch.ones(2))


class Exploit:
    def __reduce__(self) -> tuple:
        return print, ("code ran",)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04" + bytes(100)])
def test_damaged_files_are_refused(content: bytes, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"c{suffix}"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"c{suffix} cannot be read"):
        read_state_dict(path)


def test_a_truncated_checkpoint_is_refused(tmp_path: Path) -> None:
    torch.save({"model": {"a": torch.zeros(10000)}}, tmp_path / "c.pt")
    content = (tmp_path / "c.pt").read_bytes()
    (tmp_path / "c.pt").write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=r"c\.pt cannot be read"):
        read_state_dict(tmp_path / "c.pt")


def test_pickled_code_is_never_executed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"model": {"a": Exploit()}}, tmp_path / "c.pt")
    with pytest.raises(CheckpointError):
        read_state_dict(tmp_path / "c.pt")
    assert "code ran" not in capsys.readouterr().out


def test_a_file_without_a_state_dict_says_so(tmp_path: Path) -> None:
    torch.save({"steps": 3}, tmp_path / "c.pt")
    with pytest.raises(CheckpointError, match="holds no state dict"):
        read_state_dict(tmp_path / "c.pt")


@pytest.mark.parametrize(
    ("name", "why"), [("nowhere.pt", "does not exist"), (".", "is a directory"), ("hf://org/repo", "no file on the hub")]
)
def test_unusable_checkpoint_names(name: str, why: str) -> None:
    with pytest.raises(CheckpointError, match=why):
        resolve(name)


def test_hub_files_are_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked = []

    def download(repo: str, file: str) -> str:
        asked.append((repo, file))
        if file == "gone.pt":
            raise OSError("no network\nand more")
        return str(tmp_path / "c.pt")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert resolve("hf://org/repo/deep/c.pt") == tmp_path / "c.pt"
    assert asked == [("org/repo", "deep/c.pt")]
    with pytest.raises(CheckpointError, match="'hf://org/repo/gone.pt' could not be fetched: no network Check"):
        resolve("hf://org/repo/gone.pt")


def test_loading_is_strict_adopts_memory_and_reads_half_precision() -> None:
    state = mini_state("clip")
    model = load_model(state, MINI["clip"])
    assert model.encoder.conv_in.weight.data_ptr() == state["encoder.conv_in.weight"].data_ptr()
    assert not any(parameter.is_meta or parameter.requires_grad for parameter in model.parameters())
    half = load_model({key: value.half() for key, value in state.items()}, MINI["clip"])
    assert half.encoder.conv_in.weight.dtype == torch.float32
    with pytest.raises(CheckpointError, match=r"1 missing \(first: quant_conv.bias\)"):
        load_model({key: value for key, value in state.items() if key != "quant_conv.bias"}, MINI["clip"])
    with pytest.raises(CheckpointError, match=r"quant_conv.bias is torch.int8"):
        load_model(state | {"quant_conv.bias": state["quant_conv.bias"].to(torch.int8)}, MINI["clip"])


def test_resized_positions_sample_at_the_given_factor() -> None:
    """The released factor (grid + 0.1) / released_grid moves every sampling point; a plain resize to size differs."""
    state = mini_state("clip")
    table = load_model(state, MINI["clip"]).encoder_vqkd.positional_embedding.numpy()
    released = state["encoder_vqkd.positional_embedding"].numpy()
    assert np.array_equal(table[0], released[0])
    source = released[1:].reshape(3, 3, -1)
    expected = np.zeros((4, 4, released.shape[1]))
    for y in range(4):
        for x in range(4):
            for j, wy in _taps(y, 3 / 4.1):
                for i, wx in _taps(x, 3 / 4.1):
                    expected[y, x] += wy * wx * source[np.clip(j, 0, 2), np.clip(i, 0, 2)]
    assert np.abs(table[1:].reshape(4, 4, -1) - expected).max() < 1e-5


def _taps(cell: int, step: float) -> list[tuple[int, float]]:
    centre = (cell + 0.5) * step - 0.5
    first = int(np.floor(centre)) - 1
    return [(first + k, _cubic(abs(centre - first - k))) for k in range(4)]


def _cubic(x: float, a: float = -0.75) -> float:
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0
