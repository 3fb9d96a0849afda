from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from tokenflow_export.cli import main
from tokenflow_export.precision.inspect_layers import inspect_graph
from tokenflow_sdk.bundle.bundle import Bundle
from tokenflow_sdk.bundle.model_config import TokenizerConfig
from tokenflow_sdk.errors import MissingPackageError

CODES = {"code_indices": np.random.default_rng(0).integers(0, 500, (1, 30), np.int32)}


def test_half_precision_drifts_and_float32_does_not(mini_bundle: Path) -> None:
    bundle = Bundle.open(mini_bundle, TokenizerConfig)
    half = inspect_graph(bundle, "decode", CODES, precision="fp16", backend="onnxruntime")
    assert len(half) > 20
    assert 1e-5 < max(drift.relative for drift in half) < 0.1
    coarser = inspect_graph(bundle, "decode", CODES, precision="bf16", backend="onnxruntime")
    assert [drift.name for drift in coarser] == [drift.name for drift in half]
    assert 4 * max(drift.relative for drift in half) < max(drift.relative for drift in coarser) < 0.5
    same = inspect_graph(bundle, "decode", CODES, precision="fp32", backend="onnxruntime")
    assert len(same) >= len(half)
    assert max(drift.relative for drift in same) == 0


def test_the_command_shows_the_worst(mini_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(mini_bundle), "encode", "--top", "3"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 5
    assert "tensors in common" in out[1]


def test_without_polygraphy_the_extra_is_named(mini_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "polygraphy", None)
    with pytest.raises(MissingPackageError, match=r"tokenflow-sdk\[inspect\]"):
        inspect_graph(Bundle.open(mini_bundle, TokenizerConfig), "decode", CODES, precision="fp16", backend="onnxruntime")
