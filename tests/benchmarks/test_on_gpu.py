"""The whole benchmark: on the CPU as a user can, and on a GPU and a TensorRT that are not there (tests/fake_gpu.py)."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import codecs, run
from benchmarks.gpu.device import Device
from benchmarks.gpu.flops import count_flops
from benchmarks.gpu.report import as_markdown
from benchmarks.gpu.request import SIDES, TITLES
from benchmarks.on_gpu import main
from tests.conftest import ROOT
from tests.fake_gpu import FakeCuda, FakeTensorRT, install
from tests.mini import MINI, mini_state

Words = list[str]


@pytest.fixture
def words(mini_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Words:
    """Options that measure a small tokenizer: checkpoint and bundle, few and short calls."""
    torch.save(mini_state("clip"), tmp_path / "mini.pt")
    monkeypatch.setattr(codecs, "recognise", lambda shapes, variant: MINI["clip"])
    quick = ["--rounds", "2", "--seconds", "0.1", "--matmul", "32", "--threads", "1", "--batches", "2,1"]
    return ["--checkpoint", str(tmp_path / "mini.pt"), "--bundle", str(mini_bundle), *quick, "--out", str(tmp_path / "made")]


@pytest.fixture
def drawing(mini_generator: Path) -> Words:
    """Options that measure a small generator."""
    files = ["--generator", str(mini_generator), "--generator-checkpoint", str(mini_generator.parent / "hf")]
    return [*files, "--prompt", "8", "--pictures", "1,2"]


class CardThatIsNot(Device):
    """A GPU for everything but PyTorch, whose tensors stay on the CPU."""

    on_gpu, sdk = True, "cuda:0"

    def __init__(self, cuda: FakeCuda) -> None:
        super().__init__()
        self._cuda = cuda
        self.name = "NVIDIA Test Card"

    def about(self) -> dict[str, Any]:
        return {"name": self.name, "architecture": "sm89", "memory_bytes": self._cuda.memory, "driver": "1.2", "cuda": "13.0"}

    def used(self) -> int:
        return self._cuda.used()

    def peak(self) -> int:
        return 4321


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> tuple[FakeCuda, FakeTensorRT]:
    """A card with TensorRT, without TensorRT-RTX and without onnxruntime for GPUs."""
    monkeypatch.setenv("TOKENFLOW_CACHE", str(tmp_path / "cache"))
    cuda, trt = install(monkeypatch)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    monkeypatch.setattr(run, "open_device", lambda name, threads: CardThatIsNot(cuda))
    return cuda, trt


def written(words: Words) -> tuple[dict[str, Any], str]:
    out = Path(words[words.index("--out") + 1])
    return json.loads(out.with_suffix(".json").read_text()), out.with_suffix(".md").read_text()


def by_side(rows: list[dict[str, Any]], **place: object) -> dict[str, dict[str, Any]]:
    return {row["side"]: row for row in rows if all(row[key] == value for key, value in place.items())}


def check_figures(row: dict[str, Any], pictures: int) -> None:
    assert row["calls"] == 2
    assert 0 < row["median_s"] <= row["p95_s"]
    assert row["pictures_per_s"] == pytest.approx(pictures / row["median_s"])


def test_on_a_cpu(words: Words, drawing: Words, mini_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--device", "cpu", *words, *drawing]) == 0
    report, page = written(words)
    assert page in capsys.readouterr().out
    assert report["command"].startswith("python benchmarks/on_gpu.py --device cpu --checkpoint ")
    assert report["products"].keys() == {"float32"}
    (tokenizer,) = report["tokenizers"]
    assert tokenizer["flops"] == {graph: count_flops(mini_bundle / f"{graph}.onnx") for graph in ("encode", "decode")}
    assert tokenizer["parity"]["onnxruntime"] == {
        "equal_codes": 1.0,
        "agreement": 1.0,
        "decode_psnr": None,
        "largest_flip_margin": 0.0,
        "failures": [],
    }
    assert tokenizer["parity"]["torch"]["equal_codes"] == tokenizer["parity"]["torch"]["agreement"] == 1.0
    places = [(row["graph"], row["batch"], row["side"]) for row in tokenizer["rows"]]
    assert places == [(g, b, s) for g in ("encode", "decode") for b in (1, 2) for s in ("torch", "onnxruntime")]
    for row in tokenizer["rows"]:
        check_figures(row, row["batch"])
        assert row["memory_bytes"] is None
        achieved = tokenizer["flops"][row["graph"]] * row["batch"] / row["median_s"]
        assert row["flop_per_s"] == pytest.approx(achieved)
        assert row["share_of_product"] == pytest.approx(achieved / report["products"]["float32"])
    check_drawn(report["generator"])


def check_drawn(generator: dict[str, Any]) -> None:
    assert (generator["codes"], generator["prompt"]) == (30, 8)
    assert generator["parity"]["onnxruntime"]["failures"] == []
    for preset in ("fast", "paper"):
        one, two = (by_side(generator["rows"], preset=preset, pictures=n) for n in (1, 2))
        for side in ("torch", "onnxruntime"):
            check_figures(one[side], 1)
            assert one[side]["equal_codes"] == 1.0
        check_figures(two["onnxruntime"], 2)
        assert two["torch"]["why"] == "The PyTorch side draws one picture at a time."


def test_on_a_card(words: Words, drawing: Words, machine: tuple[FakeCuda, FakeTensorRT], monkeypatch) -> None:
    """Half precision, engines in float16, a compiler that fails, and two sides that are not installed."""

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
    assert report["products"].keys() == {"float32", "float16"}
    (tokenizer,) = report["tokenizers"]
    assert tokenizer["parity"]["tensorrt"]["failures"] == []
    assert tokenizer["parity"]["tensorrt"]["agreement"] > 0.975
    for graph in ("encode", "decode"):
        rows = by_side(tokenizer["rows"], graph=graph)
        assert tuple(rows) == SIDES
        for side in ("torch", "torch-fp16", "tensorrt"):
            check_figures(rows[side], 1)
            dtype = "float32" if side == "torch" else "float16"
            assert rows[side]["share_of_product"] == pytest.approx(rows[side]["flop_per_s"] / report["products"][dtype])
        assert rows["torch"]["memory_bytes"] == rows["torch-fp16"]["memory_bytes"] == 4321
        assert rows["tensorrt"]["memory_bytes"] > 0
        assert rows["compile"]["why"] == "RuntimeError: no compiler here"
        assert "no CUDA provider" in rows["onnxruntime"]["why"]
        assert rows["tensorrt-rtx"]["why"].startswith("tensorrt-rtx cannot be imported")
    drawn = by_side(report["generator"]["rows"], preset="fast", pictures=2)
    assert "compile" not in drawn
    assert drawn["tensorrt"]["memory_bytes"] > 0
    assert "no CUDA provider" in drawn["onnxruntime"]["why"]
    assert report["generator"]["parity"]["tensorrt"]["hidden_cosine"] > 0.99
    assert f"| {TITLES['compile']} | not available: RuntimeError: no compiler here |" in page
    cuda, _ = machine
    assert cuda.used() == 0


@pytest.mark.parametrize("broken", ["decode", "encode"])
def test_wrong_engines_end_it(
    broken: str, words: Words, machine: tuple[FakeCuda, FakeTensorRT], capsys: pytest.CaptureFixture[str]
) -> None:
    machine[1].broken = {broken}
    assert main([*words, "--parts", "tokenizer", "--sides", "tensorrt"]) == 1
    error = " ".join(capsys.readouterr().err.split())
    assert "WRONG RESULTS of clipb_256, so nothing is measured or written" in error
    assert "is refused" in error
    assert not list(Path(words[-1]).parent.glob("made*"))


def test_wrong_results_of_a_session_end_it(words: Words, monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a certificate in between: codes that nothing explains."""
    from tokenflow_sdk import Tokenizer

    right = Tokenizer.latent
    calls: list[int] = []

    def latent(self: Tokenizer, images: Any) -> Any:
        calls.append(1)
        # The first call makes the reference.
        return right(self, images) * (1 if len(calls) == 1 else -1)

    monkeypatch.setattr(Tokenizer, "latent", latent)
    assert main(["--device", "cpu", *words, "--parts", "tokenizer", "--sides", "onnxruntime"]) == 1
    error = " ".join(capsys.readouterr().err.split())
    assert "onnxruntime: a code flipped at a margin of" in error
    assert not list(Path(words[-1]).parent.glob("made*"))


def test_other_weights_are_noticed(words: Words, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(mini_state("clip", seed=1), tmp_path / "mini.pt")
    assert main(["--device", "cpu", *words, "--parts", "tokenizer"]) == 2
    assert "gives other codes than" in " ".join(capsys.readouterr().err.split())


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


@pytest.mark.parametrize(("variant", "name"), [("clipb_256", "gpu_nvidia-test-card"), ("x,y", "gpu_nvidia-test-card_x_y")])
def test_a_card_has_files_of_its_own(variant: str, name: str, machine, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(run, "_measure", lambda report, request, device: None)
    monkeypatch.setattr(run, "ROOT", tmp_path)
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    assert main(["--variant", variant]) == 0
    assert {path.name for path in (tmp_path / "benchmarks" / "results").iterdir()} == {f"{name}.json", f"{name}.md"}


def test_what_was_measured_before_it_failed_is_shown(words: Words, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quick = ["--sides", "onnxruntime", "--graphs", "encode", "--generator", str(tmp_path / "nowhere")]
    assert main(["--device", "cpu", *words, *quick]) == 2
    assert "encode: " in capsys.readouterr().out
    assert not list(tmp_path.glob("made*"))


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


def test_the_page_of_a_run() -> None:
    """Every kind of row, from figures that are easy to check."""
    place = {"graph": "encode", "batch": 8, "dtype": "float16"}
    row = place | {"side": "tensorrt", "median_s": 0.004, "p95_s": 0.005, "calls": 50}
    row |= {"pictures_per_s": 2000.0, "memory_bytes": 3 * 10**9, "flop_per_s": 3.7e14, "share_of_product": 0.5}
    missing = place | {"side": "compile", "why": "a | b"}
    parity = {"equal_codes": 0.95, "agreement": 0.998, "decode_psnr": 51.23, "largest_flip_margin": 0.01, "failures": []}
    report = {
        "command": "python benchmarks/on_gpu.py",
        "device": {"name": "Card", "architecture": "sm89", "memory_bytes": 1, "driver": "1", "cuda": "13.0", "cudnn": 9},
        "versions": {"torch": "2.13.0"},
        "pace": {"rounds": 50, "seconds": 30},
        "product_size": 8192,
        "products": {"float16": 7.4e14},
        "tokenizers": [
            {"variant": "clipb_256", "flops": {"encode": 185 * 10**9}, "parity": {"tensorrt": parity}, "rows": [row, missing]}
        ],
        "generator": None,
    }
    page = as_markdown(report)
    assert "encode: 185.00 GFLOP a picture, 92.50 G multiply-adds" in page
    figures = "4.00 ms | 5.00 ms | 2,000.00 | 3,000 MB | 370.00 | 50% |"
    assert f"| 8 | tokenflow-sdk, TensorRT, float16 | {figures}" in page
    assert "| 8 | torch.compile, float16 | not available: a / b |  |  |  |  |  |" in page
    assert "| tokenflow-sdk, TensorRT, float16 | 95.00% | 99.80% | 51.2 dB |" in page
    assert "reaches, in this run, 740.00 TFLOP/s in float16" in page
    assert "on a CPU" not in page
