from __future__ import annotations

import argparse
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from tokenflow_export.checkpoints.pickles import load_pickle, released_keys, state_dict_in
from tokenflow_sdk.errors import CheckpointError

OLD, NEW = {"a": torch.zeros(2)}, {"a": torch.ones(2)}


class Exploit:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("ran",)


class Averaged:
    def __init__(self) -> None:
        self.weights = NEW


@pytest.mark.parametrize(
    "beside",
    [
        {"fid": np.float64(1.5)},
        {"rng": np.random.default_rng(0).bit_generator.state, "legacy": np.random.RandomState(0).get_state()},
        {"args": argparse.Namespace(out=Path("x"))},
        {"ema": None},
        {"ema": {}},
        {"evil": Averaged()},
    ],
)
def test_what_lies_beside_the_weights_stays_unread(beside: dict, tmp_path: Path) -> None:
    torch.save({"model": NEW} | beside, tmp_path / "c.pt")
    assert state_dict_in(load_pickle(tmp_path / "c.pt"), "c.pt")["a"].tolist() == [1, 1]


@pytest.mark.parametrize("zipped", [False, True])
def test_code_never_runs(zipped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": NEW, "x": Exploit()}, "c.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"without executing code: it holds (posix|nt)\.mkdir\. Where you trust it"):
        load_pickle(Path("c.pt"))
    assert os.listdir() == ["c.pt"]


def test_averaged_weights_that_cannot_be_read_are_not_passed_over(tmp_path: Path) -> None:
    torch.save({"model": OLD, "ema": Averaged()}, tmp_path / "c.pt")
    with pytest.raises(CheckpointError, match="object under 'ema' whose class is not known"):
        state_dict_in(load_pickle(tmp_path / "c.pt"), "c.pt")


def test_the_format_before_zip_archives_is_read(tmp_path: Path) -> None:
    torch.save({"model": NEW}, tmp_path / "c.pt", _use_new_zipfile_serialization=False)
    assert torch.equal(load_pickle(tmp_path / "c.pt")["model"]["a"], NEW["a"])


@pytest.mark.parametrize(
    "content",
    [
        {"ema": {"state_dict": NEW, "decay": 0.9}, "model": OLD},
        {"module": NEW, "dp_world_size": 8},
        {"state_dict": {"model": NEW}},
    ],
)
def test_nested_state_dicts_are_found(content: dict) -> None:
    assert state_dict_in(content, "c.pt") is NEW


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([1], "holds no state dict .* it has no keys at all"),
        ({"params_ema": NEW}, "holds no state dict .* it has 'params_ema'"),
        (NEW | {"step": 3}, "holds 'step', a int, among its weights"),
        ({"a": np.ones(2)}, "holds no state dict"),
    ],
)
def test_what_is_no_state_dict_is_named(content: object, words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        state_dict_in(content, "c.pt")


def test_a_dict_that_holds_itself_ends() -> None:
    content: dict = {}
    content["model"] = content
    with pytest.raises(CheckpointError, match="holds no state dict"):
        state_dict_in(content, "c.pt")


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"\x80\x02K\x01.", b"PK\x03\x04" + bytes(50)])
def test_damaged_files_are_named_without_torchs_advice(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "c.pt").write_bytes(content)
    with pytest.raises(
        CheckpointError, match=r"c\.pt cannot be read as a PyTorch checkpoint: .+ It may be truncated"
    ) as caught:
        load_pickle(tmp_path / "c.pt")
    assert "\x1b" not in str(caught.value)
    assert "weights_only" not in str(caught.value)


def test_a_text_file_is_told_by_what_it_is_not_by_a_number_of_the_unpickler(tmp_path: Path) -> None:
    (tmp_path / "c.pt").write_bytes(b"hello\n")  # a KeyError of torch: 101
    with pytest.raises(CheckpointError, match=r"as a PyTorch checkpoint: it is no file of torch\.save\. It may"):
        load_pickle(tmp_path / "c.pt")


def test_prefixes_of_wrappers_are_removed_where_all_keys_have_them() -> None:
    assert released_keys(["module._orig_mod.a", "module._orig_mod.b"]) == {
        "a": "module._orig_mod.a",
        "b": "module._orig_mod.b",
    }
    assert released_keys(["module.a", "b"]) == {"module.a": "module.a", "b": "b"}
    assert released_keys([]) == {}
