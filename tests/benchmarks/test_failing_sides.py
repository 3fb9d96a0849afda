"""What goes wrong in a benchmark is said, and costs no more than it has to."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import codecs, generators, run, tokenizers
from benchmarks.gpu.codecs import TorchCodec
from benchmarks.gpu.request import TITLES
from benchmarks.on_gpu import main
from tests.benchmarks.card import Words, by_side, check_drawn, check_figures, check_wrong, written
from tests.support.fake_gpu import FakeEngine
from tests.support.mini import mini_state
from tokenflow_sdk.engines.build_config import BuildConfig
from tokenflow_sdk.errors import BackendError
from tokenflow_sdk.model.tokenizer_graphs import TokenizerGraphs


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


def test_a_wrong_session_is_a_row(words: Words, monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a certificate in between: codes that nothing explains."""
    right, both = TokenizerGraphs.latent, TokenizerGraphs.encode_with_latent
    calls: list[int] = []

    def latent(self: TokenizerGraphs, images: Any) -> Any:
        calls.append(1)
        # The first call makes the reference.
        return right(self, images) * (1 if len(calls) == 1 else -1)

    def encode_with_latent(self: TokenizerGraphs, images: Any) -> Any:
        codes, found = both(self, images)
        return codes, -found

    monkeypatch.setattr(TokenizerGraphs, "latent", latent)
    monkeypatch.setattr(TokenizerGraphs, "encode_with_latent", encode_with_latent)
    assert main(["--device", "cpu", *words, "--parts", "tokenizer"]) == 1
    error = " ".join(capsys.readouterr().err.split())
    assert "onnxruntime, float32: a code flipped at a margin of" in error
    report, page = written(words)
    rows = by_side(report["tokenizers"][0]["rows"], graph="encode", batch=2)
    check_wrong(rows["onnxruntime"], "a code flipped at a margin of")
    check_figures(rows["torch"], 2)
    assert "a code flipped" in page.split("| tolerances missed |")[1]


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

    def build_config(flavour: str, pictures: list[int]) -> BuildConfig:
        if max(pictures) > 1:
            raise BackendError("GPU 0 has no 4,321 MB left that transformer works in.", "Free some.")
        return codecs.build_config_for(flavour, pictures)

    monkeypatch.setattr(FakeEngine, "create_execution_context", short)
    monkeypatch.setattr(generators, "build_config_for", build_config)
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
    said = "Not everything was measured: clipb_256: `tokenflow export standin` of clipb_256 ended with status 2."
    assert said in " ".join(capsys.readouterr().err.split())
    report, page = written(words)
    assert said in page
    check_drawn(report["generator"])


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
