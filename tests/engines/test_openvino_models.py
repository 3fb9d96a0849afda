"""Compiled models are kept in the engine cache, and what is damaged or cannot be kept does no harm."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from tests.conftest import ROOT
from tests.support.mini import bundled_tokenizer, store_ranges
from tokenflow_export.precision.calibrate import magnitudes
from tokenflow_export.progress import ProgressSteps
from tokenflow_sdk import Generator, Tokenizer
from tokenflow_sdk.backends.cores import instruction_sets
from tokenflow_sdk.backends.openvino import Compiled, has_bfloat16
from tokenflow_sdk.backends.session import Array, SessionOptions
from tokenflow_sdk.bundle.bundle import Bundle, find_bundle
from tokenflow_sdk.bundle.model_config import TokenizerConfig
from tokenflow_sdk.bundle.schema import GraphEntry
from tokenflow_sdk.cli import main
from tokenflow_sdk.engines import openvino_models
from tokenflow_sdk.engines.annotations import Annotations
from tokenflow_sdk.engines.build_config import BuildConfig
from tokenflow_sdk.engines.cache import EngineCache
from tokenflow_sdk.engines.openvino_models import FewerBits, open_openvino
from tokenflow_sdk.errors import ArgumentError, BackendError, OutputError
from tokenflow_sdk.parity.certificate import Certificate
from tokenflow_sdk.parity.tokenizer import TokenizerReference
from tokenflow_sdk.parity.tokenizer_report import EIGHT_BIT_PSNR
from tokenflow_sdk.pictures.images import psnr

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

    def noted(path: Path, entry: GraphEntry, options: SessionOptions, bfloat16: bool) -> Compiled:
        names.append(path.stem)
        return real(path, entry, options, bfloat16)

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


@pytest.fixture
def processor(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Gives the processor products in bfloat16 and int8, or not. Without the instructions OpenVINO computes in float32."""

    def give(bfloat16: bool = True, sets: tuple[str, ...] = ("AVX2", "AVX-512 VNNI")) -> None:
        monkeypatch.setattr(openvino_models, "has_bfloat16", lambda: bfloat16)
        monkeypatch.setattr(openvino_models, "instruction_sets", lambda: list(sets))

    give()
    return give


@pytest.mark.usefixtures("processor")
def test_in_bfloat16_a_tokenizer_is_compared_once(compiled: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["build", "tiny", "--config", "cpu-bf16"]) == 0
    assert "tokenizer certified: codes agree" in capsys.readouterr().out
    assert sorted(compiled) == ["decode", "encode", "features", "semantic"]
    records = {entry.key.graph: entry for entry in EngineCache().entries()}
    assert {entry.key.precision for entry in records.values()} == {"bf16"}
    assert main(["cache", "list"]) == 0
    assert capsys.readouterr().out.count("passed") == 4
    photo = ROOT / "examples" / "chelsea.jpg"
    with Tokenizer.from_pretrained("tiny") as exact, Tokenizer.from_pretrained("tiny", build_config="cpu-bf16") as rounded:
        expected, found = exact.encode(photo), rounded.encode(photo)
        assert psnr(np.asarray(exact.decode(expected)), np.asarray(rounded.decode(expected))) > 45
        assert psnr(np.asarray(exact.decode(expected)), np.asarray(exact.decode(found))) > 22
    assert len(compiled) == 4
    # Only a comparison that was made is believed.
    assert main(["verify", "tiny", "--config", "cpu-bf16"]) == 0
    said = capsys.readouterr().out
    assert "certified" in said
    assert "tiny (generator) on onnxruntime: " in said
    assert main(["verify", str(find_bundle("tiny", "generator")), "--config", "cpu-bf16"]) == 2
    EngineCache().certify(records["semantic"].key, "cpu", Certificate(("codes agree 3 % only",), "", {}).to_json())
    for words in (["build", "tiny"], ["encode", str(photo)]):
        assert main([*words, "--config", "cpu-bf16"]) == 2
        said = " ".join(capsys.readouterr().err.split())
        assert (
            "tokenizer in bf16 on OpenVINO is refused: codes agree 3 % only. Leave the build config out; if it is codes" in said
        )


@pytest.mark.skipif(not has_bfloat16(), reason="this processor has no products in bfloat16")
def test_bfloat16_is_computed() -> None:
    """Not float32, with which no code flips."""
    bundle = Bundle.open(find_bundle("tiny", "tokenizer"), TokenizerConfig)
    figures = FewerBits(bundle, BuildConfig("openvino", precision="bf16"), SessionOptions("cpu")).prepare().figures
    assert 0 < len(figures["flips"]) < 0.025 * 4 * 817
    assert 45 < figures["decode_psnr"] < 70


@pytest.mark.usefixtures("processor")
def test_a_decoder_alone_in_bfloat16_leaves_codes_as_they_are(compiled: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["build", "tiny", "--config", "cpu-bf16-decoder"]) == 0
    assert "tokenizer certified: codes agree" in capsys.readouterr().out
    records = {entry.key.graph: entry for entry in EngineCache().entries()}
    assert {entry.key.precision for entry in records.values()} == {"fp32, bf16 decoder"}
    assert len(compiled) == 4
    figures = records["decode"].certificates["cpu"]["figures"]
    assert figures["decode_psnr"] > 45
    assert (figures["decode_psnr"] < 70) == has_bfloat16()
    # What is refused here is not refused in float32 alone, whose graphs are the same but for the decoder.
    EngineCache().certify(records["encode"].key, "cpu", Certificate(("too coarse",), "", {}).to_json())
    assert main(["build", "tiny", "--config", "cpu-bf16-decoder"]) == 2
    assert "is refused: too coarse. Leave the build config out." in " ".join(capsys.readouterr().err.split())
    assert main(["build", "tiny", "--backend", "openvino", "--precision", "fp32"]) == 0


@pytest.mark.skipif(not {"AVX-VNNI", "AVX-512 VNNI", "AMX int8"} & set(instruction_sets()), reason="no products in int8 here")
def test_a_decoder_in_8_bits_is_held_to_its_own_bar(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Ranges a quarter as wide as they should be are refused."""
    right, wrong = (bundled_tokenizer(tmp_path / name) for name in ("right", "wrong"))
    bundle = Bundle.open(right, TokenizerConfig)
    found = magnitudes(bundle, TokenizerReference.load(bundle).code_indices, (1.0,), ProgressSteps(Console(quiet=True)))
    for path, factor in ((right, 1.0), (wrong, 0.25)):
        store_ranges(path, {name: factor * float(row[0]) for name, row in found.items()})
    words = ("--config", "cpu-int8-decoder")
    assert main(["build", str(right), *words]) == 0
    assert {entry.key.precision.partition(" (")[0] for entry in EngineCache().entries()} == {"fp32, int8 decoder"}
    config = BuildConfig.from_file("cpu-int8-decoder")
    figures = FewerBits(Bundle.open(right, TokenizerConfig), config, SessionOptions("cpu")).prepare(build=False).figures
    assert EIGHT_BIT_PSNR < figures["decode_psnr"] < 60  # not in float32
    assert figures["flips"] == []
    assert main(["build", str(wrong), *words]) == 2
    assert "decoded pictures agree to" in capsys.readouterr().err


def test_a_decoder_in_8_bits_has_the_rest_in_bfloat16_where_the_processor_has_it(
    processor: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = bundled_tokenizer(tmp_path)
    bundle = store_ranges(path, 8.0)
    annotations = Annotations.of(bundle, BuildConfig.from_file("cpu-int8-decoder"))
    asked: list[tuple[str, bool]] = []
    compile_graph = openvino_models.compile_graph

    def recorded(path: Path, entry: GraphEntry, options: SessionOptions, bfloat16: bool) -> Compiled:
        asked.append((path.stem, bfloat16))
        return compile_graph(path, entry, options, bfloat16)

    monkeypatch.setattr(openvino_models, "compile_graph", recorded)
    for bfloat16 in (True, False, True):
        processor(bfloat16)
        for name in ("features", "decode"):
            open_openvino(bundle.graph_path(name), bundle.graph(name), SessionOptions("cpu"), annotations=annotations)
    # Each is compiled once, and kept apart from the other.
    assert asked == [("features", False), ("decode", True), ("decode", False)]


def test_a_processor_without_the_products_is_refused(
    processor: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    processor(bfloat16=False, sets=("AVX2",))
    for config in ("cpu-bf16", "cpu-bf16-decoder"):
        assert main(["build", "tiny", "--config", config]) == 2
        assert "AVX2) has no products in bfloat16 (AVX-512 BF16 or AMX)" in " ".join(capsys.readouterr().err.split())
    assert main(["build", "tiny", "--config", "cpu-int8-decoder"]) == 2
    assert "AVX2) is not known to have products in int8 (VNNI or AMX)" in " ".join(capsys.readouterr().err.split())


def test_what_openvino_cannot_build_is_said(mini_generator: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, said in (
        ("tiny --backend openvino", "OpenVINO computes in fp32 or bf16 on a CPU, not in fp16. Give --precision fp32 or bf16."),
        ("tiny --decoder bf16", "a decoder in bf16 is for OpenVINO. Give --config cpu-bf16-decoder"),
        ("tiny --config cpu-bf16 --decoder bf16", "The decoder is in bf16 as all else is. Leave --decoder out"),
        ("tiny --backend openvino --precision bf16 --decoder fp8", "No CPU computes convolutions in fp8."),
        (
            "tiny --backend openvino --precision bf16 --target sm86",
            "OpenVINO compiles for the processor of this machine. Leave out targets or --target.",
        ),
        ("tiny --config cpu-bf16 --plan", "--plan is for TensorRT engines. Leave it out."),
        ("tiny --config cpu-bf16 --cache here", "--cache is for TensorRT engines. $TOKENFLOW_CACHE moves"),
        ("tiny --config cpu --threads 2", "--threads is for OpenVINO, not for onnxruntime."),
        (f"{mini_generator} --config cpu-bf16", "of kind 'generator', not a tokenizer"),
    ):
        assert main(["build", *words.split()]) == 2
        assert said in " ".join(capsys.readouterr().err.split())
    with pytest.raises(BackendError, match="OpenVINO runs tokenizers only.*Leave backend= or build_config= out"):
        Generator.from_pretrained(mini_generator, build_config="cpu-bf16")
    for options in ({"build": True, "serve_while_building": True}, {}):
        with pytest.raises(ArgumentError, match="The build config is for openvino, not for tensorrt"):
            Tokenizer.from_pretrained("tiny", backend="tensorrt", build_config="cpu-bf16", **options)


@pytest.mark.parametrize("command", ["verify", "bench --repeat 1 --tokenizer {}"])
def test_beside_a_tokenizer_language_models_are_checked_and_timed_on_onnxruntime(
    command: str, mini_bundle: Path, mini_generator: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both, neither = tmp_path / "both", tmp_path / "neither"
    for path in (both / "tokenizer", both / "generator", neither / "generator", neither / "another"):
        shutil.copytree(mini_bundle if path.name == "tokenizer" else mini_generator, path)
    words = (*command.format(mini_bundle).split(), "--backend", "openvino")
    assert main([*words, str(both)]) == 0
    assert {entry.key.flavour for entry in EngineCache().entries()} == {"openvino"}
    for path in (both / "generator", neither):
        capsys.readouterr()
        assert main([*words, str(path)]) == 2
        assert "OpenVINO runs tokenizers only" in " ".join(capsys.readouterr().err.split())


@pytest.mark.usefixtures("processor")
def test_without_building_only_what_was_compared_runs(mini_bundle: Path) -> None:
    config = BuildConfig("openvino", precision="fp32", batch=(1, 1, 1))
    with pytest.raises(BackendError, match=f"{mini_bundle.name} was not compared in fp32 on OpenVINO yet") as raised:
        Tokenizer.from_pretrained(mini_bundle, build_config=config, threads=2, build=False)
    command = re.search(r"Run `tokenflow (.*?)`", raised.value.hint)
    assert command is not None and main(command[1].split()) == 0
    Tokenizer.from_pretrained(mini_bundle, build_config=config, threads=2, build=False).close()


@pytest.mark.usefixtures("processor")
def test_without_a_directory_for_a_cache_it_is_compared_each_time(
    mini_bundle: Path, compiled: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("TOKENFLOW_CACHE")
    monkeypatch.setattr("tokenflow_sdk.engines.cache.default_directory", no_home)
    config = BuildConfig("openvino", precision="fp32")
    with Tokenizer.from_pretrained(mini_bundle, build_config=config) as tokenizer:
        tokenizer.load("features")
    assert sorted(compiled) == ["decode", "encode", "features", "features", "semantic"]
    assert "The comparison is repeated at the next start" in caplog.text


def no_home() -> Path:
    raise OutputError("There is no home directory.", "Set $TOKENFLOW_CACHE.")
