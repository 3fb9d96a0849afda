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

from benchmarks.gpu import codecs, generators, run, tokenizers
from benchmarks.gpu.codecs import TorchCodec, half_copy
from benchmarks.gpu.device import Device
from benchmarks.gpu.flops import count_flops, count_weights
from benchmarks.gpu.generators import Drawing, TorchArtist, measure_generator
from benchmarks.gpu.report import add_roofline, as_markdown
from benchmarks.gpu.request import SIDES, TITLES
from benchmarks.gpu.timing import Pace
from benchmarks.gpu.tokenizers import Work
from benchmarks.on_gpu import main
from tests.conftest import ROOT
from tests.fake_gpu import FakeCuda, FakeEngine, FakeTensorRT, FakeTensorRTRTX, install
from tests.mini import MINI, mini_model, mini_state
from tokenflow_sdk.engine_recipe import EnginePlan
from tokenflow_sdk.errors import BackendError, CorruptBundleError

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
    """A GPU for everything but PyTorch, whose tensors stay on the CPU. `cached` is what its allocator keeps of the GPU."""

    on_gpu, sdk = True, "cuda:0"

    def __init__(self, cuda: FakeCuda) -> None:
        super().__init__()
        self._cuda, self.cached = cuda, 0
        self.name = "NVIDIA Test Card"

    def about(self) -> dict[str, Any]:
        return {"name": self.name, "architecture": "sm89", "memory_bytes": self._cuda.memory, "driver": "1.2", "cuda": "13.0"}

    def used(self) -> int:
        return self._cuda.used() + self.cached

    def allocated(self) -> int:
        return 321

    def peak(self) -> int:
        return 4321

    def release(self) -> None:
        self.cached = 0


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
    assert report["peaks"]["before"].keys() == {"float32", "float16", "copy"}
    (tokenizer,) = report["tokenizers"]
    assert tokenizer["parity"]["tensorrt"]["failures"] == []
    assert tokenizer["parity"]["tensorrt"]["agreement"] > 0.975
    eager = {"torch": mini_model("clip"), "torch-fp16": half_copy(mini_model("clip"))}
    for graph in ("encode", "decode"):
        rows = by_side(tokenizer["rows"], graph=graph)
        assert tuple(rows) == SIDES
        for side in ("torch", "torch-fp16", "tensorrt"):
            check_figures(rows[side], 1)
            assert rows[side]["dtype"] == ("float32" if side == "torch" else "float16")
            check_roofline(rows[side], tokenizer, report["peaks"])
        weights = {key: TorchCodec(model, tokenizer, Device()).weight_bytes for key, model in eager.items()}
        assert {key: rows[key]["memory_bytes"] for key in weights} == {key: size + 4000 for key, size in weights.items()}
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


def test_memory_of_a_side_that_draws_is_its_own(mini_generator: Path, machine, monkeypatch) -> None:
    """Neither of the sides opened after it, nor what PyTorch keeps for later."""
    cuda, _ = machine
    install_rtx(monkeypatch, cuda)
    card = CardThatIsNot(cuda)
    draw = TorchArtist.draw

    def draw_and_keep(self: TorchArtist, *words: Any) -> Any:
        card.cached += 10**9
        return draw(self, *words)

    monkeypatch.setattr(TorchArtist, "draw", draw_and_keep)

    def memory(*sides: str) -> dict[tuple[str, str, int], int]:
        found: dict[str, Any] = {}
        drawing = Drawing(mini_generator, mini_generator.parent / "hf", 8, (1, 2))
        measure_generator(found, drawing, Work(card, sides, (), (), Pace(1, 0.01)))
        rows = [row for row in found["rows"] if row["side"] != "torch"]
        return {(row["side"], row["preset"], row["pictures"]): row["memory_bytes"] for row in rows}

    together = memory("torch", "tensorrt", "tensorrt-rtx")
    assert len(together) == 2 * 2 * 2
    assert min(together.values()) > 0
    assert together == memory("tensorrt") | memory("tensorrt-rtx")


def install_rtx(monkeypatch: pytest.MonkeyPatch, cuda: FakeCuda) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", FakeTensorRTRTX(cuda))


@pytest.mark.parametrize("broken", ["decode", "encode"])
def test_a_refused_engine_is_a_row(broken: str, words: Words, machine, capsys: pytest.CaptureFixture[str]) -> None:
    machine[1].broken = {broken}
    assert main([*words, "--parts", "tokenizer", "--sides", "torch,tensorrt"]) == 1
    error = " ".join(capsys.readouterr().err.split())
    assert "error: WRONG RESULTS of clipb_256, which were not timed." in error
    report, page = written(words)
    for graph in ("encode", "decode"):
        for batch in (1, 2):
            rows = by_side(report["tokenizers"][0]["rows"], graph=graph, batch=batch)
            check_figures(rows["torch"], batch)
            check_wrong(rows["tensorrt"], "is refused")
    assert f"| {TITLES['tensorrt']} | WRONG RESULTS, not timed: " in page
    assert "**WRONG RESULTS of clipb_256" in page


def check_wrong(row: dict[str, Any], why: str) -> None:
    assert why in row["wrong"]
    assert not row.keys() & {"median_s", "pictures_per_s", "flop_per_s"}


def test_a_wrong_session_is_a_row(words: Words, monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a certificate in between: codes that nothing explains."""
    from tokenflow_sdk import Tokenizer

    right = Tokenizer.latent
    calls: list[int] = []

    def latent(self: Tokenizer, images: Any) -> Any:
        calls.append(1)
        # The first call makes the reference.
        return right(self, images) * (1 if len(calls) == 1 else -1)

    monkeypatch.setattr(Tokenizer, "latent", latent)
    assert main(["--device", "cpu", *words, "--parts", "tokenizer"]) == 1
    error = " ".join(capsys.readouterr().err.split())
    assert "onnxruntime, float32: a code flipped at a margin of" in error
    report, page = written(words)
    rows = by_side(report["tokenizers"][0]["rows"], graph="encode", batch=2)
    check_wrong(rows["onnxruntime"], "a code flipped at a margin of")
    check_figures(rows["torch"], 2)
    assert "a code flipped" in page.split("| bars missed |")[1]


@pytest.mark.parametrize("graph", ["encode", "decode"])
def test_every_size_of_batch_is_compared(graph: str, words: Words, monkeypatch) -> None:
    """Kernels for two pictures that mix them up, beside right ones for one."""
    name = {"encode": "encode_array", "decode": "decode_array"}[graph]
    right = getattr(TorchCodec, name)
    monkeypatch.setattr(TorchCodec, name, lambda self, array: right(self, array)[::-1].copy())
    assert main(["--device", "cpu", *words, "--parts", "tokenizer", "--graphs", graph]) == 1
    report, _ = written(words)
    one, two = (by_side(report["tokenizers"][0]["rows"], batch=batch) for batch in (1, 2))
    check_figures(one["torch"], 1)
    check_wrong(two["torch"], f"{graph} in batches of 2: ")
    check_figures(two["onnxruntime"], 2)


def test_a_batch_that_does_not_fit_costs_its_own_rows_only(words: Words, drawing: Words, machine, monkeypatch) -> None:
    """A context's memory is for the largest batch of its engine, whatever a call has."""
    make = FakeEngine.create_execution_context

    def short(self: FakeEngine, settings: Any = None) -> Any:
        batches = [most[0] for profile in self.profiles for _, _, most in profile.values()]
        return make(self, settings) if max(batches) == 1 or self.name not in ("encode", "decode") else None

    def plan(flavour: str, pictures: list[int]) -> EnginePlan:
        if max(pictures) > 1:
            raise BackendError("GPU 0 has no 4,321 MB left that transformer works in.", "Free some.")
        return codecs.engine_plan(flavour, pictures)

    monkeypatch.setattr(FakeEngine, "create_execution_context", short)
    monkeypatch.setattr(generators, "engine_plan", plan)
    assert main([*words, *drawing, "--sides", "tensorrt"]) == 0
    report, page = written(words)
    for graph in ("encode", "decode"):
        one, two = (by_side(report["tokenizers"][0]["rows"], graph=graph, batch=batch)["tensorrt"] for batch in (1, 2))
        check_figures(one, 1)
        assert one["largest_batch"] == 1
        assert two["why"] == "no memory for 2 pictures at once"
    assert "(for at most 1 at once: more do not fit)" in page
    one, two = (by_side(report["generator"]["rows"], preset="fast", pictures=n)["tensorrt"] for n in (1, 2))
    assert one["largest_batch"] == 1
    assert two["why"] == "no memory for 2 pictures at once"


def test_pytorch_without_memory_costs_its_own_rows_only(words: Words, monkeypatch) -> None:
    def load(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(tokenizers, "load_eager", load)
    assert main(["--device", "cpu", *words, "--parts", "tokenizer"]) == 0
    rows = by_side(written(words)[0]["tokenizers"][0]["rows"], graph="encode", batch=1)
    assert rows["torch"]["why"] == "OutOfMemoryError: CUDA out of memory."
    check_figures(rows["onnxruntime"], 1)


def test_other_weights_are_noticed(words: Words, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(mini_state("clip", seed=1), tmp_path / "mini.pt")
    assert main(["--device", "cpu", *words, "--parts", "tokenizer"]) == 1
    assert "gives other codes than" in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.glob("made*"))


def test_a_tokenizer_that_cannot_be_made_leaves_the_generator(words: Words, drawing: Words, monkeypatch, capsys) -> None:
    def prepare(*_: object) -> None:
        raise subprocess.CalledProcessError(2, [sys.executable, "-m", "export", "standin"])

    monkeypatch.setattr(run, "prepare", prepare)
    assert main(["--device", "cpu", *words, *drawing]) == 1
    said = "Not everything was measured: clipb_256: `python -m export standin` of clipb_256 ended with status 2."
    assert said in " ".join(capsys.readouterr().err.split())
    report, page = written(words)
    assert said in page
    check_drawn(report["generator"])


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
    row = {"graph": "encode", "batch": 1, "side": "torch", "why": "a test"}
    found = {"variant": "mini", "flops": {}, "rows": [row]}
    monkeypatch.setattr(run, "_measure", lambda report, request, device: report["tokenizers"].append(found))
    monkeypatch.setattr(run, "ROOT", tmp_path)
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    assert main(["--variant", variant]) == 0
    assert {path.name for path in (tmp_path / "benchmarks" / "results").iterdir()} == {f"{name}.json", f"{name}.md"}


def test_what_was_measured_before_it_failed_is_written(words: Words, tmp_path: Path, capsys) -> None:
    quick = ["--sides", "onnxruntime", "--graphs", "encode", "--generator", str(tmp_path / "nowhere")]
    assert main(["--device", "cpu", *words, *quick]) == 1
    said = capsys.readouterr()
    assert "error: Not everything was measured: the generator: " in " ".join(said.err.split())
    report, page = written(words)
    assert page in said.out
    assert "**Not everything was measured: the generator: " in page
    assert "attainable_s" in report["tokenizers"][0]["rows"][0]
    assert [failed["part"] for failed in report["failed"]] == ["the generator"]


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
    row |= {"pictures_per_s": 2000.0, "memory_bytes": 3 * 10**9, "largest_batch": 8}
    one = row | {"batch": 1, "median_s": 0.001, "pictures_per_s": 1000.0}
    missing = place | {"side": "compile", "why": "a | b"}
    wrong = place | {"side": "tensorrt-rtx", "wrong": "c | d"}
    parity = {"equal_codes": 0.95, "agreement": 0.998, "decode_psnr": 51.23, "largest_flip_margin": 0.01, "failures": []}
    report = {
        "command": "python benchmarks/on_gpu.py",
        "device": {"name": "Card", "architecture": "sm89", "memory_bytes": 1, "driver": "1", "cuda": "13.0", "cudnn": 9},
        "versions": {"torch": "2.13.0"},
        "pace": {"rounds": 50, "seconds": 30},
        "product_size": 8192,
        # The better of both times counts.
        "peaks": {"before": {"float16": 7.4e14, "copy": 0.8e12}, "after": {"float16": 7.0e14, "copy": 1.0e12}},
        "tokenizers": [
            {
                "variant": "clipb_256",
                "flops": {"encode": 185 * 10**9},
                "weights": {"encode": 250 * 10**6},
                "parity": {"tensorrt": parity},
                "rows": [row, one, missing, wrong],
            }
        ],
        "generator": None,
        "failed": [],
    }
    add_roofline(report)
    page = as_markdown(report)
    assert "encode: 185.00 GFLOP a picture, 92.50 G multiply-adds, 250.0 M weights" in page
    # 8 x 185 GFLOP at 740 TFLOP/s; 500 MB at 1 TB/s.
    side = "tokenflow-sdk, TensorRT, float16 (for at most 8 at once: more do not fit)"
    figures = "4.00 ms | 5.00 ms | 2,000.00 | 3,000 MB | 370.00 | 2.00 ms (product) | 50% |"
    assert f"| 8 | {side} | {figures}" in page
    assert f"| 1 | {side} | 1.00 ms | 5.00 ms | 1,000.00 | 3,000 MB | 185.00 | 0.50 ms (weights) | 50% |" in page
    assert "| 8 | torch.compile, float16 | not available: a / b |  |  |  |  |  |  |" in page
    assert "| 8 | tokenflow-sdk, TensorRT-RTX, float16 | WRONG RESULTS, not timed: c / d |  |  |  |  |  |  |" in page
    assert "| tokenflow-sdk, TensorRT, float16 | 95.00% | 99.80% | 51.2 dB |  |" in page
    assert "| product of two matrices of float16, TFLOP/s (8,192 x 8,192) | 740.00 | 700.00 |" in page
    assert "| copy of one matrix of float32, TB/s read and written (8,192 x 8,192) | 0.80 | 1.00 |" in page
    assert "may exceed 100 %" in page
    assert "on a CPU" not in page
