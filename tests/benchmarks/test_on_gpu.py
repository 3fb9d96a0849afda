"""The whole benchmark: on the CPU as a user can, and on a GPU and a TensorRT that are not there (tests/support/fake_gpu.py)."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import run, tokenizers
from benchmarks.gpu.codecs import TorchCodec, half_copy
from benchmarks.gpu.device import Device
from benchmarks.gpu.flops import count_flops, count_weights
from benchmarks.gpu.generators import GeneratorCase, TorchSampler, measure_generator
from benchmarks.gpu.request import SIDES, TITLES
from benchmarks.gpu.timing import Pace
from benchmarks.gpu.tokenizers import Work
from benchmarks.on_gpu import main
from tests.benchmarks.card import CardThatIsNot, Words, by_side, check_drawn, check_figures, install_rtx, written
from tests.conftest import ROOT
from tests.support.fake_cuda import FakeCuda
from tests.support.fake_gpu import FakeTensorRT
from tests.support.mini import mini_model
from tokenflow_sdk.errors import CorruptBundleError


def test_on_a_cpu(words: Words, drawing: Words, mini_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--device", "cpu", *words, *drawing]) == 0
    report, page = written(words)
    assert page in capsys.readouterr().out
    assert report["command"].startswith("python benchmarks/on_gpu.py --device cpu --checkpoint ")
    assert report["peaks"]["before"].keys() == report["peaks"]["after"].keys() == {"float32", "copy"}
    assert report["failed"] == []
    (tokenizer,) = report["tokenizers"]
    assert tokenizer["flops"] == {graph: count_flops(mini_bundle / f"{graph}.onnx") for graph in ("encode", "decode")}
    assert tokenizer["parity"]["onnxruntime"] == {
        "equal_codes": 1.0,
        "agreement": 1.0,
        "decode_psnr": None,
        "largest_flip_margin": 0.0,
        "failures": [],
    }
    assert tokenizer["weights"] == {graph: count_weights(mini_bundle / f"{graph}.onnx") for graph in ("encode", "decode")}
    assert tokenizer["parity"]["torch"]["equal_codes"] == tokenizer["parity"]["torch"]["agreement"] == 1.0
    places = [(row["graph"], row["batch"], row["side"]) for row in tokenizer["rows"]]
    assert places == [(g, b, s) for g in ("encode", "decode") for b in (1, 2) for s in ("torch", "onnxruntime")]
    for row in tokenizer["rows"]:
        check_figures(row, row["batch"])
        assert row["memory_bytes"] is None
        achieved = tokenizer["flops"][row["graph"]] * row["batch"] / row["median_s"]
        assert row["flop_per_s"] == pytest.approx(achieved)
        check_roofline(row, tokenizer, report["peaks"])
    check_drawn(report["generator"])


def check_roofline(row: dict[str, Any], tokenizer: dict[str, Any], peaks: dict[str, dict[str, float]]) -> None:
    best = {name: max(peaks["before"][name], peaks["after"][name]) for name in (row["dtype"], "copy")}
    work = tokenizer["flops"][row["graph"]] * row["batch"] / best[row["dtype"]]
    weights = tokenizer["weights"][row["graph"]] * {"float32": 4, "float16": 2}[row["dtype"]] / best["copy"]
    assert row["attainable_s"] == pytest.approx(max(work, weights))
    assert row["bound"] == ("product" if work > weights else "weights")
    assert row["share_of_attainable"] == pytest.approx(row["attainable_s"] / row["median_s"])


def test_on_a_card(words: Words, drawing: Words, machine: tuple[FakeCuda, FakeTensorRT], monkeypatch) -> None:
    """Half precision, engines in float16, a compiler that fails, and a side that is not installed."""

    def broken(function: Callable, **options: object) -> Callable:
        def call(*values: object) -> object:
            raise RuntimeError("no compiler here")

        return call

    resets: list[int] = []
    monkeypatch.setattr(torch, "compile", broken)
    monkeypatch.setattr(torch.compiler, "reset", lambda: resets.append(1))
    assert main([*words, *drawing, "--batches", "1"]) == 0
    assert resets == [1]
    report, page = written(words)
    assert report["peaks"]["before"].keys() == {"float32", "float16", "copy"}
    (tokenizer,) = report["tokenizers"]
    assert tokenizer["parity"]["tensorrt"]["failures"] == []
    assert tokenizer["parity"]["tensorrt"]["agreement"] > 0.975
    eager = {"torch": mini_model("clip"), "torch-fp16": half_copy(mini_model("clip"))}
    for graph in ("encode", "decode"):
        rows = by_side(tokenizer["rows"], graph=graph)
        assert tuple(rows) == tuple(side for side in SIDES if side != "tensorrt-rtx")
        for side in ("torch", "torch-fp16", "tensorrt"):
            check_figures(rows[side], 1)
            assert rows[side]["dtype"] == ("float32" if side == "torch" else "float16")
            check_roofline(rows[side], tokenizer, report["peaks"])
        weights = {key: TorchCodec(model, tokenizer, Device()).weight_bytes for key, model in eager.items()}
        assert {key: rows[key]["memory_bytes"] for key in weights} == {key: size + 4000 for key, size in weights.items()}
        assert rows["tensorrt"]["memory_bytes"] > 0
        assert rows["compile"]["why"] == "RuntimeError: no compiler here"
        assert "no CUDA provider" in rows["onnxruntime"]["why"]
    drawn = by_side(report["generator"]["rows"], preset="fast", pictures=2)
    assert "compile" not in drawn
    assert drawn["tensorrt"]["memory_bytes"] > 0
    assert "no CUDA provider" in drawn["onnxruntime"]["why"]
    assert report["generator"]["parity"]["tensorrt"]["hidden_cosine"] > 0.99
    assert f"| {TITLES['compile']} | not available: RuntimeError: no compiler here |" in page
    cuda, _ = machine
    assert cuda.used() == 0


def test_memory_of_a_side_that_draws_is_its_own(mini_generator: Path, machine, monkeypatch) -> None:
    """Neither of the sides opened after it, nor what PyTorch keeps for later."""
    cuda, _ = machine
    install_rtx(monkeypatch, cuda)
    card = CardThatIsNot(cuda)
    sample = TorchSampler.sample

    def sample_and_keep(self: TorchSampler, *words: Any) -> Any:
        card.cached += 10**9
        return sample(self, *words)

    monkeypatch.setattr(TorchSampler, "sample", sample_and_keep)

    def memory(*sides: str) -> dict[tuple[str, str, int], int]:
        found: dict[str, Any] = {}
        case = GeneratorCase(mini_generator, mini_generator.parent / "hf", 8, (1, 2))
        measure_generator(found, case, Work(card, sides, (), (), Pace(1, 0.01)))
        rows = [row for row in found["rows"] if row["side"] != "torch"]
        return {(row["side"], row["preset"], row["pictures"]): row["memory_bytes"] for row in rows}

    together = memory("torch", "tensorrt", "tensorrt-rtx")
    assert len(together) == 2 * 2 * 2
    assert min(together.values()) > 0
    assert together == memory("tensorrt") | memory("tensorrt-rtx")


def test_without_a_checkpoint_pytorch_draws_nothing(words: Words, mini_generator: Path) -> None:
    options = ["--parts", "generator", "--generator", str(mini_generator), "--pictures", "1", "--prompt", "8"]
    assert main(["--device", "cpu", *words, *options]) == 0
    report, _ = written(words)
    assert report["tokenizers"] == []
    rows = by_side(report["generator"]["rows"], preset="fast")
    assert rows["torch"]["why"] == "PyTorch needs the checkpoint of the bundle."
    assert "equal_codes" not in rows["onnxruntime"]


def test_nothing_is_written_on_a_cpu_unless_told(words: Words, capsys: pytest.CaptureFixture[str]) -> None:
    results = ROOT / "benchmarks" / "results"
    before = sorted(results.iterdir())
    quick = ["--parts", "tokenizer", "--sides", "onnxruntime", "--graphs", "encode", "--batches", "1"]
    assert main(["--device", "cpu", *words[:-2], *quick]) == 0
    assert "# tokenflow-sdk against PyTorch" in capsys.readouterr().out
    assert sorted(results.iterdir()) == before


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (["--variant", "clipb_256"], "gpu_nvidia-test-card"),
        (["--variant", "x,y"], "gpu_nvidia-test-card_x_y"),
        (["--sides", "torch,tensorrt-rtx"], "gpu_nvidia-test-card_tensorrt-rtx"),
    ],
)
def test_a_card_has_files_of_its_own(options: Words, name: str, machine, monkeypatch, tmp_path: Path) -> None:
    row = {"graph": "encode", "batch": 1, "side": "torch", "why": "a test"}
    found = {"variant": "mini", "flops": {}, "rows": [row]}
    monkeypatch.setattr(run, "_measure", lambda report, request, device: report["tokenizers"].append(found))
    monkeypatch.setattr(run, "ROOT", tmp_path)
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    assert main(options) == 0
    assert {path.name for path in (tmp_path / "benchmarks" / "results").iterdir()} == {f"{name}.json", f"{name}.md"}


@pytest.mark.parametrize("name", ["count_flops", "product_rate"])
def test_times_are_written_without_a_roofline(name: str, words: Words, monkeypatch) -> None:
    def fails(*_: object) -> None:
        raise CorruptBundleError("This cannot be counted.", "Export again.")

    monkeypatch.setattr(tokenizers if name == "count_flops" else run, name, fails)
    quick = ["--parts", "tokenizer", "--sides", "onnxruntime", "--graphs", "encode"]
    assert main(["--device", "cpu", *words, *quick]) == 1
    report, page = written(words)
    for row in report["tokenizers"][0]["rows"]:
        check_figures(row, row["batch"])
        assert "flop_per_s" not in row
    assert "This cannot be counted. Export again." in page


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "built without CUDA" in error or "no usable NVIDIA GPU" in error
    assert "--device cpu" in error
    assert error.count("error:") == 1


@pytest.mark.parametrize("package", ["torch", "onnx"])
def test_a_package_that_is_missing_is_named(package: str) -> None:
    script = ROOT / "benchmarks" / "on_gpu.py"
    hidden = f"import sys, runpy; sys.modules[{package!r}] = None; runpy.run_path({str(script)!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", hidden], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    error = " ".join(done.stderr.split())
    assert error.startswith("error: This benchmark needs a package that is not installed")
    assert package in error
    assert "make bench-gpu" in error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sides", "tensorflow"], "names 'tensorflow'"),
        (["--device", "cpu", "--sides", "tensorrt"], "Choose from: torch,onnxruntime"),
        (["--sides", "torch,tensorrt,tensorrt-rtx"], "names both TensorRTs, which may not share a process"),
        (["--parts", "tokenizer,"], "names ''"),
        (["--graphs", "semantic"], "names 'semantic'"),
        (["--batches", "1,x"], "--batches '1,x' is no list of sizes"),
        (["--pictures", "0"], "--pictures '0' is no list of sizes"),
        (["--rounds", "0"], "--rounds 0 measures nothing"),
        (["--seconds", "0"], "--seconds 0.0 measures nothing"),
        (["--prompt", "1"], "leaves no id beside BOS"),
        (["--variant", "clipb_256,siglip_384", "--bundle", "x"], "are of one variant"),
        (["--generator-checkpoint", "x"], "Give that with --generator"),
        (["--device", "tpu"], "There is no device 'tpu'"),
    ],
)
def test_options_that_cannot_work(options: Words, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(options) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_help_names_every_side(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    text = "".join(capsys.readouterr().out.split())
    assert ",".join(SIDES) in text
