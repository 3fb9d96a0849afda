from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tokenflow_sdk import Tokenizer, __version__
from tokenflow_sdk.cli import main
from tokenflow_sdk.cli.console import stdout
from tokenflow_sdk.cli.environment import environment


def test_without_a_bundle_it_says_what_works_here(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TOKENFLOW_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    requires = ["numpy>=1.26", 'nobody-has-this>=1; extra == "gpu"', 'onnxruntime>=1; extra == "cpu"', 'pytest; extra == "dev"']
    requires.append("nor-this; python_version < '3.11' and extra == 'gpu'")
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: requires)
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    for part in (f"tokenflow-sdk {__version__}, Python 3", "nobody-has-this (missing)", "always works", "tokenflow-sdk[gpu]"):
        assert part in out
    assert f"TOKENFLOW_CACHE={tmp_path}" in out
    assert "secret" not in out
    monkeypatch.setattr(stdout, "width", 80)
    assert main(["info"]) == 0
    assert "│ tokenflow-sdk[tensorrt-rtx] │" in capsys.readouterr().out
    assert main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == environment()
    assert list(found["packages"]) == ["always", "gpu", "cpu"]
    assert found["packages"]["gpu"] == {"nobody-has-this": None}
    assert {"backend": "onnxruntime, CPU", "works": True}.items() <= found["backends"][-1].items()


def test_a_source_directory_that_is_not_installed_has_no_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    def requires(name: str) -> list[str]:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", requires)
    assert environment()["packages"] == {}


def test_tiny_is_one_screen(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "tiny"]) == 0
    out = capsys.readouterr().out
    assert len(out.splitlines()) <= 42
    assert out.count("licence of the weights: Apache-2.0") == 3
    for part in (
        "draws: 64 things in 5 styles: airplane, balloon, banana,",
        "answers: what is this, is there a ..., which colours",
        "runs on onnxruntime, CPU",
        "not on",
    ):
        assert part in out
    assert "onnxruntime: 1" not in out
    assert [line.partition(",")[0] for line in out.splitlines() if line.startswith("tiny")] == [
        "tiny (tokenizer): TokenFlow tokenizer tiny",
        "tiny (generator): TokenFlow generator",
        "tiny (understander): TokenFlow understander",
    ]
    assert "prompts of up to 127 tokens" in out  # as the error of a longer one says
    assert main(["info", "tiny", "--graphs"]) == 0
    out = capsys.readouterr().out
    assert "images uint8[batch, 256, 256, 3]" in out
    assert "exporter: tokenflow-sdk" in out


def test_json_of_bundles_and_codes(mini_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(mini_bundle), "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["bundles"]
    assert (found["kind"], found["license"], found["runs_on"]) == ("tokenizer", None, "onnxruntime, CPU")
    assert found["graphs"]["encode"]["inputs"] == ["images uint8[batch, 64, 64, 3]"]
    assert found["config"]["variant"] == "mini_clip"
    with Tokenizer.from_pretrained(mini_bundle) as tokenizer:
        tokenizer.encode(ROOT / "examples" / "chelsea.jpg").truncate(2).save(tmp_path / "p.tfc")
    assert main(["info", str(tmp_path / "p.tfc"), "--json"]) == 0
    codes = json.loads(capsys.readouterr().out)
    assert (codes["codes"], codes["scales"], codes["patch_nums"]) == (5, 2, [1, 2, 3, 4])
