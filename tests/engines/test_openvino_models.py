"""Compiled models are kept in the engine cache, and what is damaged or cannot be kept does no harm."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest

from tokenflow_sdk.backends.openvino import Compiled
from tokenflow_sdk.backends.session import Array, SessionOptions
from tokenflow_sdk.bundle.bundle import Bundle
from tokenflow_sdk.bundle.model_config import TokenizerConfig
from tokenflow_sdk.bundle.schema import GraphEntry
from tokenflow_sdk.cli import main
from tokenflow_sdk.engines import openvino_models
from tokenflow_sdk.engines.cache import EngineCache
from tokenflow_sdk.engines.openvino_models import open_openvino

pytest.importorskip("openvino", reason="openvino is not installed: pip install 'tokenflow-sdk[openvino]'")
CODES = {"code_indices": np.ones((2, 30), np.int32)}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENFLOW_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the graphs that were compiled."""
    names: list[str] = []
    real = openvino_models.compile_graph

    def noted(path: Path, entry: GraphEntry, options: SessionOptions) -> Compiled:
        names.append(path.stem)
        return real(path, entry, options)

    monkeypatch.setattr(openvino_models, "compile_graph", noted)
    return names


def features(bundle: Path, threads: int = 1) -> Array:
    opened = Bundle.open(bundle, TokenizerConfig)
    options = SessionOptions("cpu", threads=threads)
    with open_openvino(opened.graph_path("features"), opened.graph("features"), options) as session:
        return session.run(CODES)["features"]


def test_a_graph_is_compiled_once(mini_bundle: Path, compiled: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    first = features(mini_bundle)
    assert np.array_equal(first, features(mini_bundle))
    assert compiled == ["features"]
    (entry,) = EngineCache().entries()
    assert (entry.key.flavour, entry.key.target, entry.key.precision) == ("openvino", "cpu", "fp32")
    features(mini_bundle, threads=3)
    assert compiled == ["features"] * 2
    # They are no engines of a GPU.
    assert main(["info", str(mini_bundle)]) == 0
    assert "compared with the reference" not in capsys.readouterr().out
    assert main(["cache", "list"]) == 0
    assert "not stored" in capsys.readouterr().out
    assert main(["cache", "clear"]) == 0
    assert EngineCache().entries() == []
    features(mini_bundle)
    assert compiled == ["features"] * 3


def test_a_damaged_file_is_never_loaded(mini_bundle: Path, compiled: list[str]) -> None:
    first = features(mini_bundle)
    (entry,) = EngineCache().entries()
    data = entry.path.read_bytes()
    for damaged in (data[:-1], b"", data[:100] + b"\xff" + data[101:]):
        entry.path.write_bytes(damaged)
        assert np.array_equal(first, features(mini_bundle))
        # Compiled again; the file's own figures, such as how long that took, need not have as many digits.
        assert entry.path.read_bytes() != damaged
    assert compiled == ["features"] * 4


def test_a_cache_that_cannot_be_written_is_said(
    mini_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("TOKENFLOW_CACHE", str(tmp_path / "file" / "cache"))
    with caplog.at_level(logging.WARNING):
        features(mini_bundle)
    assert "features.onnx is compiled again at the next start" in caplog.text
    assert "$TOKENFLOW_CACHE" in caplog.text
