"""What was measured decides, on this machine and with these versions only. OpenVINO is played by onnxruntime here."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tokenflow_sdk import Generator, Tokenizer
from tokenflow_sdk.backends.onnxruntime import OnnxRuntimeSession
from tokenflow_sdk.backends.session import Session, SessionOptions
from tokenflow_sdk.bundle.bundle import Bundle
from tokenflow_sdk.bundle.model_config import TokenizerConfig
from tokenflow_sdk.bundle.schema import GraphEntry
from tokenflow_sdk.cli import main
from tokenflow_sdk.engines import choice, measured_choice
from tokenflow_sdk.engines.choice import survey
from tokenflow_sdk.engines.measured_choice import GraphTimes, MeasuredChoice
from tokenflow_sdk.engines.options import RuntimeOptions
from tokenflow_sdk.errors import BackendError, EngineRefusedError, MissingPackageError


class Played(OnnxRuntimeSession):
    """A session that calls itself OpenVINO's. Graphs in `wrong` give zeros; those in `quick` are faster than onnxruntime."""

    quick: Sequence[str] = ("encode", "decode")
    wrong: Sequence[str] = ()

    def __init__(self, path: Path, entry: GraphEntry, options: SessionOptions, open_in_child: Any = None) -> None:
        super().__init__(path, entry, options)
        self.name = path.stem

    def _infer(self, feeds: Any, outputs: tuple[str, ...]) -> Any:
        found = super()._infer(feeds, outputs)
        return [np.zeros_like(array) for array in found] if self.name in self.wrong else found


@pytest.fixture
def played(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A machine with OpenVINO of a `version`, on which `run` takes the time that graphs are said to take."""
    machine = SimpleNamespace(version="2026.4.1", clock=0.0)
    monkeypatch.setenv("TOKENFLOW_CACHE", str(tmp_path / "cache"))
    real_version, real_find = importlib.metadata.version, importlib.util.find_spec

    def version(name: str) -> str:
        return machine.version if name == "openvino" else real_version(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: object() if name == "openvino" else real_find(name, *rest)
    )
    for module in (choice, measured_choice):
        monkeypatch.setattr(module, "open_openvino", Played)

    def run(self: Session, feeds: Any, outputs: Any = None) -> Any:
        mine = isinstance(self, Played)
        machine.clock += (1.0 if self.name in Played.quick else 3.0) if mine else 2.0  # type: ignore[attr-defined]
        return {}

    machine.run = run
    monkeypatch.setattr(measured_choice, "perf_counter", lambda: machine.clock)
    return machine


def kinds(bundle: str | Path, **options: Any) -> dict[str, type[Session]]:
    with Tokenizer.from_pretrained(bundle, **options) as tokenizer:
        return {name: type(tokenizer.graphs.load(name)) for name in ("encode", "decode", "semantic", "features")}


def opened(bundle: Path) -> Bundle[TokenizerConfig]:
    return Bundle.open(bundle, TokenizerConfig)


def stored(bundle: Path, **ratios: float) -> MeasuredChoice:
    """A stored choice of these ratios; other graphs are as fast on both."""
    key = measured_choice._key(opened(bundle), None)
    assert key is not None
    found = MeasuredChoice(key, {name: GraphTimes(ratios.get(name, 1.0), 1.0) for name in opened(bundle).graphs})
    found.store()
    return found


def test_auto_takes_what_was_measured_to_be_faster(played: SimpleNamespace, mini_bundle: Path) -> None:
    assert set(kinds(mini_bundle).values()) == {OnnxRuntimeSession}
    stored(mini_bundle, encode=1.3, decode=1.04, semantic=0.2)
    for options in ({}, {"device": "cpu"}):
        found = kinds(mini_bundle, **options)
        assert [name for name, kind in found.items() if kind is Played] == ["encode"]
    for options in ({"backend": "onnxruntime"}, {"providers": ["CPUExecutionProvider"]}, {"build_config": "cpu"}):
        assert set(kinds(mini_bundle, **options).values()) == {OnnxRuntimeSession}
    assert set(kinds(mini_bundle, backend="openvino").values()) == {Played}


@pytest.mark.parametrize("what", ["version", "processor", "threads", "bundle", "damaged", "of another", "slower"])
def test_a_choice_of_another_machine_or_version_is_not_used(
    what: str, played: SimpleNamespace, mini_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle: str | Path = mini_bundle
    path = stored(mini_bundle, encode=0.9 if what == "slower" else 2.0).store()
    options: dict[str, Any] = {}
    if what == "version":
        played.version = "2026.5.0"
    elif what == "processor":
        monkeypatch.setattr(measured_choice, "processor", lambda: "Another at 3 GHz")
    elif what == "threads":
        options = {"threads": 77}
    elif what == "bundle":
        bundle = "tiny"
    elif what == "damaged":
        path.write_text(path.read_text().replace("2.0", "NaN"))
    elif what == "of another":
        path.write_text(json.dumps(json.loads(path.read_text()) | {"key": {}}))
    assert set(kinds(bundle, **options).values()) == {OnnxRuntimeSession}


def test_the_survey_says_what_was_measured(played: SimpleNamespace, mini_bundle: Path) -> None:
    def way() -> choice.Candidate:
        return next(each for each in survey(opened(mini_bundle), RuntimeOptions()) if each.title == "openvino")

    assert (way().usable, way().chosen) == (True, False)
    assert f"`tokenflow bench {mini_bundle} --choose`" in way().reason
    stored(mini_bundle, encode=1.5)
    assert way().chosen
    assert "encode 1.50" in way().reason
    with pytest.raises(BackendError, match=r"OpenVINO runs tokenizers only.*Leave backend= or build_config= out"):
        Generator.from_pretrained("tiny", backend="openvino")


def test_bench_measures_and_stores(
    played: SimpleNamespace, mini_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(OnnxRuntimeSession, "name", "", raising=False)
    monkeypatch.setattr(measured_choice, "check_choice", lambda *arguments: None)
    monkeypatch.setattr("tokenflow_sdk.cli.bench.check_choice", lambda *arguments: None)
    with monkeypatch.context() as patch:
        patch.setattr(OnnxRuntimeSession, "run", played.run)
        assert main(["bench", str(mini_bundle), "--choose", "--repeat", "3"]) == 0
    out = capsys.readouterr().out
    assert "2.00" in out
    assert "stored for backend='auto'" in out
    found = MeasuredChoice.find(opened(mini_bundle), None)
    assert found is not None
    assert found.faster == ("encode", "decode")
    assert main(["cache", "clear"]) == 0
    assert MeasuredChoice.find(opened(mini_bundle), None) is None


def test_what_does_not_reproduce_the_reference_is_not_timed(
    played: SimpleNamespace, mini_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Played, "wrong", ("decode",))
    with pytest.raises(EngineRefusedError, match="on OpenVINO is refused: .*decoded"):
        measured_choice.check_choice(opened(mini_bundle), 1)
    assert MeasuredChoice.find(opened(mini_bundle), None) is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--backend", "openvino"], "without --backend"),
        (["--device", "cpu"], "without --device"),
        (["--json", "x"], "without --json"),
    ],
)
def test_options_that_do_not_go_with_it_are_named(
    arguments: list[str], words: str, mini_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", str(mini_bundle), "--choose", *arguments]) == 2
    assert words in capsys.readouterr().err


def test_a_directory_that_cannot_be_written_is_named(
    played: SimpleNamespace, mini_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("TOKENFLOW_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(OSError, match="cannot be written"):
        stored(mini_bundle)
    assert set(kinds(mini_bundle).values()) == {OnnxRuntimeSession}


def test_without_openvino_nothing_is_measured(mini_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(MissingPackageError, match=r"tokenflow-sdk\[openvino\]"):
        measured_choice.measure_choice(opened(mini_bundle), None, 1)
