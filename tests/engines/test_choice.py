"""Which engines a bundle runs on, and what is said about them, on a machine that is not there (tests/support/fake_gpu.py)."""

from __future__ import annotations

import logging
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.fake_cuda import Status
from tests.support.on_engines import FP32, IMAGES, on_engines
from tokenflow_sdk import Generator, Tokenizer
from tokenflow_sdk.backends.onnxruntime import open_onnxruntime
from tokenflow_sdk.backends.session import SessionOptions
from tokenflow_sdk.bundle.bundle import Bundle
from tokenflow_sdk.bundle.model_config import GeneratorConfig, TokenizerConfig
from tokenflow_sdk.cli import main
from tokenflow_sdk.engines.build_config import BuildConfig
from tokenflow_sdk.engines.cache import EngineCache
from tokenflow_sdk.engines.choice import suitable_batch_limit, survey
from tokenflow_sdk.engines.engine_set import Engines
from tokenflow_sdk.engines.options import RuntimeOptions
from tokenflow_sdk.errors import (
    ArgumentError,
    BackendError,
    EngineRefusedError,
    MissingPackageError,
    OutputError,
)


def test_auto_never_builds_and_uses_what_is_there(machine, mini_bundle: Path) -> None:
    build_config = BuildConfig(batch=(1, 1, 8))
    with Tokenizer.from_pretrained(mini_bundle, build_config=build_config) as tokenizer:
        tokenizer.load("features")
        assert tokenizer.device == "cpu"
    assert machine[1].builds == []
    on_engines(mini_bundle, build_config=build_config).close()
    with Tokenizer.from_pretrained(mini_bundle, build_config=build_config) as tokenizer:
        tokenizer.load("features")
        assert tokenizer.device == "cuda:0"
    with Tokenizer.from_pretrained(mini_bundle, device="cpu") as tokenizer:
        tokenizer.load("features")
        assert tokenizer.device == "cpu"


def test_a_build_config_without_engines_is_said_to_be_unused(
    machine, mini_bundle: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        Tokenizer.from_pretrained(mini_bundle).close()
        assert caplog.text == ""
        Tokenizer.from_pretrained(mini_bundle, build_config=FP32).close()
    assert "The build config is not used, because no TensorRT engines run here (tensorrt: no engine built yet" in caplog.text
    assert caplog.text.endswith("). onnxruntime, CPU runs.\n")


@pytest.mark.parametrize("backend", ["auto", "onnxruntime"])
@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"device": "cuda"}, BackendError, "device='cuda', but there is no GPU"),
        ({"providers": ["CUDAExecutionProvider"]}, BackendError, "but there is no GPU"),
        ({"providers": ["RocketExecutionProvider"]}, ArgumentError, "no provider RocketExecutionProvider"),
    ],
)
def test_what_cannot_start_fails_when_it_is_opened(
    backend: str,
    options: dict[str, Any],
    error: type[Exception],
    words: str,
    mini_bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    monkeypatch.setattr("tokenflow_sdk.backends.providers.driver_problem", lambda: "there is no GPU")
    with pytest.raises(error, match=words):
        Tokenizer.from_pretrained(mini_bundle, backend=backend, **options)


def test_without_onnxruntime_nothing_is_opened(mini_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    for backend in ("auto", "onnxruntime"):
        with pytest.raises(MissingPackageError, match=r"pip install 'tokenflow-sdk\[cpu\]'"):
            Tokenizer.from_pretrained(mini_bundle, backend=backend)


def test_engines_are_found_however_they_were_built(machine, mini_bundle: Path) -> None:
    """Built ahead by some settings, opened without naming them."""
    ahead = BuildConfig("tensorrt", precision="fp32", batch=(1, 2, 4), workspace_gb=1)
    on_engines(mini_bundle, build_config=ahead).close()
    for backend in ("tensorrt", "auto"):
        with Tokenizer.from_pretrained(mini_bundle, backend=backend, batch_limit=4, build=False) as tokenizer:
            assert tokenizer.load("features").device == "cuda:0"
            assert tokenizer.graphs.load("features").max_size("batch") == 4
    with Tokenizer.from_pretrained(mini_bundle, batch_limit=5) as tokenizer:
        assert tokenizer.load("features").device == "cpu"
    assert len(machine[1].builds) == 4
    half = BuildConfig("tensorrt", batch=(1, 1, 6))
    on_engines(mini_bundle, build_config=half).close()
    with Tokenizer.from_pretrained(mini_bundle) as tokenizer:
        assert tokenizer.load("features").graphs.load("features").max_size("batch") == 6
    machine[1].broken.add("decode")
    assert not Engines(Bundle.open(mini_bundle, TokenizerConfig), half).recertify().passed
    with Tokenizer.from_pretrained(mini_bundle) as tokenizer:
        assert tokenizer.load("features").graphs.load("features").max_size("batch") == 4
    assert len(machine[1].builds) == 8


def test_a_generators_engines_are_found_by_their_pages_too(machine, mini_generator: Path) -> None:
    bundle = Bundle.open(mini_generator, GeneratorConfig)
    Engines(bundle, BuildConfig("tensorrt", precision="fp32", pages=70)).prepare()
    for pages, device in ((None, "cuda:0"), (70, "cuda:0"), (90, "cpu")):
        with Generator.from_pretrained(mini_generator, pages=pages) as generator:
            assert generator.device == device


def test_a_plan_for_cpus_runs_there_and_builds_nothing(machine, mini_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    on_engines(mini_bundle, build_config=BuildConfig(batch=(1, 1, 8))).close()
    with Tokenizer.from_pretrained(mini_bundle, build_config="cpu") as tokenizer:
        assert tokenizer.load("features").device == "cpu"
    assert main(["build", str(mini_bundle), "--config", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "nothing is built for onnxruntime" in out
    assert "files and numbers are right" in out
    assert len(machine[1].builds) == 4
    with pytest.raises(ArgumentError, match="for onnxruntime, not for tensorrt"):
        on_engines(mini_bundle, build_config="cpu")
    assert main(["build", str(mini_bundle), "--config", "cpu", "--precision", "fp16"]) == 2
    assert "runs a bundle's graphs as they are" in capsys.readouterr().err


def test_engines_in_a_directory_that_cannot_be_written_are_compared_at_each_start(
    machine, mini_bundle: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    Engines(Bundle.open(mini_bundle, TokenizerConfig), FP32).prepare()
    for job in Engines(Bundle.open(mini_bundle, TokenizerConfig), FP32).jobs.values():
        EngineCache().certify(job.key, "sm89", {})

    def refuse(path: Path, data: bytes) -> None:
        raise OutputError(f"{path} cannot be written: Read-only file system.", "Choose another output.")

    monkeypatch.setattr("tokenflow_sdk.engines.cache.write_atomic", refuse)
    for _ in range(2):
        with caplog.at_level(logging.WARNING), on_engines(mini_bundle, build=False) as tokenizer:
            tokenizer.encode_array(IMAGES[:1])
        assert "The comparison is repeated at the next start" in caplog.text
        caplog.clear()
    machine[1].broken.add("decode")
    with pytest.raises(EngineRefusedError):
        on_engines(mini_bundle, build=False)


def test_info_shows_what_was_built_and_how_it_compares(machine, mini_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(mini_bundle)]) == 0
    assert "compared with the reference" not in capsys.readouterr().out
    on_engines(mini_bundle).close()
    Engines(Bundle.open(mini_bundle, TokenizerConfig), BuildConfig("tensorrt")).prepare()
    for job in Engines(Bundle.open(mini_bundle, TokenizerConfig), BuildConfig("tensorrt")).jobs.values():
        EngineCache().certify(
            job.key, "sm89", {"failures": ["decoded pictures agree to 20.0 dB only"], "summary": "20.0 dB", "figures": {}}
        )
    assert main(["info", str(mini_bundle)]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "runs on tensorrt" in out
    assert "codes agree 100.00% teacher-forced" in out
    assert "decoded pictures agree to 20.0 dB only" in out
    assert "decode, encode, features, semantic" in out


def test_the_survey_says_why(machine, mini_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = Bundle.open(mini_bundle, TokenizerConfig)

    def reasons(device: str = "auto") -> dict[str, tuple[bool, str]]:
        return {c.title: (c.usable, c.reason) for c in survey(bundle, RuntimeOptions(device=device, build_config=FP32))}

    assert "no engine built yet for encode" in reasons()["tensorrt"][1]
    assert reasons()["onnxruntime, CPU"] == (True, "always works")
    machine[1].broken.add("decode")
    with pytest.raises(EngineRefusedError):
        on_engines(mini_bundle)
    assert "were refused: decoded pictures" in reasons()["tensorrt"][1]
    machine[0].status = Status(35)
    assert "no usable GPU" in reasons()["tensorrt"][1]
    assert set(reasons("cpu")) == {"openvino", "onnxruntime, CPU"}


@pytest.mark.parametrize(("device", "limit"), [("cpu", 1), ("auto", 1), ("cuda:1", 8)])
def test_the_batch_limit_suits_onnxruntime(device: str, limit: int) -> None:
    assert suitable_batch_limit(open_onnxruntime, SessionOptions(device)) == limit
    providers = ("TensorrtExecutionProvider", "CUDAExecutionProvider")
    assert suitable_batch_limit(open_onnxruntime, SessionOptions(device, providers)) == 8
    assert suitable_batch_limit(open_onnxruntime, SessionOptions(device, ("CPUExecutionProvider",))) == 1


def test_the_batch_limit_is_what_the_engines_were_built_for(machine, mini_bundle: Path) -> None:
    config = BuildConfig("tensorrt", precision="fp32", batch=(1, 1, 3))
    with Tokenizer.from_pretrained(mini_bundle, backend="tensorrt", build_config=config) as tokenizer:
        assert tokenizer.batch_limit == 3
    with Tokenizer.from_pretrained(mini_bundle, backend="tensorrt", build_config=config, batch_limit=1) as tokenizer:
        assert tokenizer.batch_limit == 1
    with Tokenizer.from_pretrained(mini_bundle, device="cpu") as tokenizer:
        assert tokenizer.batch_limit == 1
        assert pickle.loads(pickle.dumps(tokenizer)).batch_limit == 1  # noqa: S301 - what this test made
