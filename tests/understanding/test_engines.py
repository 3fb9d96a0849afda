"""Understander on TensorRT engines, from building to certificates and changing over, on a machine that is not there.

As tests/engines/test_engine_set.py: tests/support/fake_gpu.py pretends to be TensorRT and CUDA, everything else is real.
"""

from __future__ import annotations

import gc
import json
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.support.mini_understander import (
    SMALLEST,
    export_quietly,
    features,
    pool_is_clean,
    reference_model,
    reference_projector,
    write_checkpoint,
)
from tests.support.on_engines import certificate_of
from tests.support.waiting import comes_true
from tokenflow_export.tracing.weight_quantization import ExportPrecision
from tokenflow_sdk import Answer, AnswerParams, Understander
from tokenflow_sdk.backends.cuda import CudaArray
from tokenflow_sdk.backends.tensorrt_context import ExecutionContext
from tokenflow_sdk.bundle.bundle import Bundle
from tokenflow_sdk.bundle.model_config import TokenizerConfig, UnderstanderConfig
from tokenflow_sdk.cli import main
from tokenflow_sdk.engines.build_config import BuildConfig
from tokenflow_sdk.engines.cache import EngineCache
from tokenflow_sdk.engines.choice import survey
from tokenflow_sdk.engines.engine_set import Engines
from tokenflow_sdk.engines.options import RuntimeOptions
from tokenflow_sdk.errors import ArgumentError, BackendError, EngineBuildError, EngineRefusedError, NotFiniteError
from tokenflow_sdk.model.transformer import PREFILL_CHUNK
from tokenflow_sdk.tokenizer import Tokenizer

FP32 = BuildConfig("tensorrt", precision="fp32", batch=(1, 1, 2), pages=70)
FREE = AnswerParams(max_tokens=40, stop_ids=())
GRAPHS = ["embed_text", "head", "project", "transformer"]
LONG = "tell me all about the other thing. " * 12
"""Longer than a piece of a prompt."""


@pytest.fixture(scope="module")
def on_cpu(mini_understander: Path) -> Iterator[Understander]:
    """The same model in onnxruntime: what engines must say too."""
    with Understander.from_pretrained(mini_understander, backend="onnxruntime", threads=1) as understander:
        yield understander


def on_engines(bundle: Path, **options: Any) -> Understander:
    return Understander.from_pretrained(bundle, **({"backend": "tensorrt", "build_config": FP32} | options))


def without_reference(bundle: Path, copy: Path) -> Path:
    """As exported by an SDK that knew no certificates."""
    shutil.copytree(bundle, copy)
    (copy / "reference.npz").unlink()
    data = json.loads((copy / "bundle.json").read_text())
    del data["assets"]["reference"]
    (copy / "bundle.json").write_text(json.dumps(data))
    return copy


def asked_together(understander: Understander) -> list[Answer]:
    """More at once than the engines take, of different lengths, about shared pictures."""
    questions = [(features(i % 2), "what? " * (1 + i)) for i in range(5)]
    return understander.answer_batch(questions, params=FREE)


def ids(answers: list[Answer]) -> list[tuple[int, ...]]:
    return [answer.token_ids for answer in answers]


def test_answers_on_engines_are_the_same(machine, mini_understander: Path, on_cpu: Understander) -> None:
    image = Image.effect_noise((90, 70), 80).convert("RGB")
    with on_engines(mini_understander) as understander:
        assert (understander.device, understander.wait_for_engines()) == ("cuda:0", True)
        assert understander._runner.model.transformer.pool.pages == 70
        assert understander._runner.model.transformer.max_rows == 2
        for pictures, question in ((image, "what?"), ([features(0), features(1)], LONG)):
            expected = on_cpu.answer(pictures, question, params=FREE)
            assert understander.answer(pictures, question, params=FREE).token_ids == expected.token_ids
        assert len(on_cpu._request([features(0), features(1)], LONG, FREE).prompt) > PREFILL_CHUNK
        # The tokenizer runs on engines of its own, built with the same build_config.
        assert understander.tokenizer.device == "cuda:0"
        assert ids(asked_together(understander)) == ids(asked_together(on_cpu))
        chat, other = understander.chat(features(3)), on_cpu.chat(features(3))
        for question in ("what?", "and?", "why?"):
            assert chat.ask(question, params=FREE).text == other.ask(question, params=FREE).text
        assert chat.turns == other.turns
        assert pool_is_clean(understander)
        understander.tokenizer.close()
    assert sorted(machine[1].builds) == sorted(["decode", "encode", "features", "semantic", *GRAPHS])
    records = [json.loads(path.read_bytes()) for path in EngineCache().directory.glob("*.json")]
    stored = [certificate_of(record) for record in records if record["key"]["graph"] in GRAPHS]
    assert len(stored) == 4
    assert all(certificate["failures"] == [] and certificate["figures"]["same_choice"] == 1 for certificate in stored)
    del understander, chat
    gc.collect()
    assert (machine[0].device_memory, machine[0].streams) == ({}, set())
    with on_engines(mini_understander, build=False) as again:
        assert ids(asked_together(again)) == ids(asked_together(on_cpu))
    assert len(machine[1].builds) == 8


def test_an_answer_of_any_length_can_be_penalised(machine, mini_understander: Path, on_cpu: Understander) -> None:
    params = AnswerParams(max_tokens=500, stop_ids=(), repetition_penalty=1.5, temperature=3.0, top_k=288, seed=4)
    with on_engines(mini_understander) as understander:
        found = understander.answer(features(0), "what?", params=params)
    assert len(found.token_ids) == 500
    assert len(set(found.token_ids)) > 200
    assert found.token_ids == on_cpu.answer(features(0), "what?", params=params).token_ids


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_nothing_large_crosses_in_a_step(
    machine, cuda_graphs: bool, mini_understander: Path, on_cpu: Understander, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is copied to and from the GPU while an answer grows: numbers of tokens and pages, settings, the tokens drawn and
    whether they are certain, and the last hidden state of each step."""
    crossed: list[str] = []
    staging, upload = ExecutionContext._staging_buffer, ExecutionContext._upload
    fetched, column = CudaArray.numpy, CudaArray.column

    def noting(called: Any, *names: str) -> Any:
        crossed.extend(name for name in names if name)
        return called()

    patches: dict[str, Any] = {
        "_staging_buffer": lambda context, name, size: noting(lambda: staging(context, name, size), name),
        "_upload": lambda context, used, arrays: noting(lambda: upload(context, used, arrays), *arrays),
    }
    for name, patched in patches.items():
        monkeypatch.setattr(ExecutionContext, name, patched)
    monkeypatch.setattr(CudaArray, "column", lambda array, index: noting(lambda: column(array, index), "a hidden state"))
    monkeypatch.setattr(CudaArray, "numpy", lambda array: noting(lambda: fetched(array), "an array"))
    with on_engines(mini_understander, cuda_graphs=cuda_graphs) as understander:
        expected = on_cpu.answer(features(0), LONG, params=FREE)
        stream = understander.stream(features(0), LONG, params=FREE)
        crossed.clear()
        first = next(stream)
        # Blocks that meet in a piece of the prompt do so on the GPU.
        assert "an array" not in crossed
        running = understander._runner.model
        (turn,) = running.scheduler._live
        crossed.clear()
        answered, before = len(turn.tokens), running.transformer.token_forwards
        text = first + "".join(stream)
        assert running.transformer.token_forwards - before == len(turn.tokens) - answered > 20
        settings = {"seen", "penalty", "temperature", "top_k", "top_p", "noise", "ranks"}
        found = {"certain", "a hidden state"}
        assert set(crossed) == {"token_ids", "positions", "visible", "context", "block_tables"} | settings | found
        assert text == expected.text
        # A piece inside one block stays there too.
        turn = understander._request(features(0), LONG, FREE)
        running.scheduler.submit(turn)
        running.scheduler._admit()
        pending = turn.pending
        assert pending is not None
        crossed.clear()
        running.scheduler.loop.prefill(turn, min(PREFILL_CHUNK, len(pending[0])) - 1)
        assert set(crossed) == {"token_ids", "positions", "visible", "context", "block_tables", "a hidden state"}
        running.scheduler.remove(turn)
        assert pool_is_clean(understander)
    assert bool(machine[0].launches) == cuda_graphs


def test_half_precision_engines_pass_and_answer(machine, mini_understander: Path) -> None:
    with on_engines(mini_understander, build_config=None) as understander:
        assert len(understander.answer(features(0), "what?", params=FREE).token_ids) == 40
        assert understander._runner.model.sessions["transformer"].inputs[-1].dtype == "float16"
    figures = Engines(Bundle.open(mini_understander, UnderstanderConfig), BuildConfig("tensorrt")).prepare(build=False).figures
    assert 0 < figures["hidden_error"] < 0.1
    assert figures["hidden_cosine"] > 0.999


@pytest.mark.parametrize("build_config", [FP32, None], ids=["fp32", "fp16"])
def test_what_overflows_on_engines_fails_alone_and_leaves_pages_finite(
    machine, build_config: BuildConfig | None, mini_understander: Path
) -> None:
    """Also in the middle of a prompt, whose tokens nothing is sampled from."""
    wide = np.full((16, 40), 3e38, np.float32)
    with on_engines(mini_understander, build_config=build_config) as understander:
        expected = understander.answer(features(0), LONG, params=FREE).token_ids
        while understander._runner.model.scheduler.cache.evict():
            pass
        for question in ("what?", LONG):
            with pytest.raises(NotFiniteError, match="NaN or infinity"):
                understander.answer(wide, question, params=FREE)
        transformer = understander._runner.model.transformer
        assert all(np.isfinite(np.asarray(pages.slots)).all() for pages in (transformer._k, transformer._v))
        assert understander.answer(features(0), LONG, params=FREE).token_ids == expected
        assert pool_is_clean(understander)


@pytest.mark.parametrize("precision", [ExportPrecision("fp32", "int8"), ExportPrecision("fp16", "int4")], ids=str)
def test_bundles_of_fewer_bits_run_on_engines(
    machine, precision: ExportPrecision, mini_bundle: Path, tmp_path: Path, on_cpu: Understander
) -> None:
    model, projector = reference_model(SMALLEST), reference_projector(SMALLEST["hidden_size"])
    checkpoint = write_checkpoint(tmp_path / "hf", SMALLEST, model, projector)
    bundle = export_quietly(checkpoint, Bundle.open(mini_bundle, TokenizerConfig), tmp_path / "chat", precision)
    with Tokenizer.from_pretrained(mini_bundle, device="cpu") as tokenizer:
        half = replace(FP32, precision="fp16")
        for build_config in (FP32, half):
            with on_engines(bundle, tokenizer=tokenizer, build_config=build_config) as understander:
                assert understander.device == "cuda:0"
                assert len(understander.answer(features(0), "what?", params=FREE).token_ids) == 40


@pytest.mark.parametrize("graph", GRAPHS)
def test_an_engine_that_computes_something_else_is_refused(
    machine, graph: str, mini_understander: Path, mini_bundle: Path
) -> None:
    machine[1].broken.add(graph)
    words = "the likeliest token is the same at only" if graph == "head" else "hidden states have a cosine of"
    with Tokenizer.from_pretrained(mini_bundle, device="cpu") as tokenizer:
        for _ in range(2):
            with pytest.raises(EngineRefusedError, match=rf"fp32 engines of chat on sm89 is refused.*{words}"):
                on_engines(mini_understander, tokenizer=tokenizer)
        assert sorted(machine[1].builds) == GRAPHS
        with Understander.from_pretrained(mini_understander, tokenizer=tokenizer, build_config=FP32) as understander:
            assert understander.device == "cpu"


def test_a_bundle_without_a_reference_says_what_to_do(
    machine, mini_understander: Path, tmp_path: Path, mini_bundle, capsys
) -> None:
    """Before anything is built, and everything else goes on."""
    old = without_reference(mini_understander, tmp_path / "old")
    with Tokenizer.from_pretrained(mini_bundle, device="cpu") as tokenizer:
        with pytest.raises(EngineBuildError, match=r"no reference that its engines could be compared with.*Export it again"):
            on_engines(old, tokenizer=tokenizer)
        with Understander.from_pretrained(old, tokenizer=tokenizer) as understander:
            assert understander.answer(features(0), "what?", max_tokens=3).token_ids
    assert machine[1].builds == []
    assert main(["build", str(old), "--backend", "tensorrt"]) == 2
    assert "Export it again" in capsys.readouterr().err
    found = {way.title: way for way in survey(Bundle.open(old, UnderstanderConfig), RuntimeOptions())}
    assert "no reference that its engines could be compared with" in found["tensorrt"].reason
    assert main(["info", str(old)]) == 0
    assert "runs on onnxruntime, CPU" in capsys.readouterr().out
    assert main(["verify", str(old)]) == 2
    assert "has no 'reference' file" in capsys.readouterr().err


def waiting(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Engines are prepared once this is set."""
    go, prepare = threading.Event(), Engines.prepare
    monkeypatch.setattr(Engines, "prepare", lambda self: (go.wait(60), prepare(self)))
    return go


def test_turns_end_where_they_began_and_chats_go_on(
    machine, mini_understander: Path, on_cpu: Understander, monkeypatch: pytest.MonkeyPatch
) -> None:
    go = waiting(monkeypatch)
    expected, other = on_cpu.answer(features(0), LONG, params=FREE).text, on_cpu.chat(features(1))
    with on_engines(mini_understander, serve_while_building=True) as understander:
        chat = understander.chat(features(1))
        assert chat.ask("what?", params=FREE).text == other.ask("what?", params=FREE).text
        assert (understander.device, understander.wait_for_engines(0)) == ("cpu", False)
        old = understander._runner.model
        assert old.transformer.pool.pages == 70
        begun = understander.stream(features(0), LONG, params=FREE)
        pieces = [next(begun)]
        cancelled = understander.stream(features(2), LONG, params=FREE)
        next(cancelled)
        go.set()
        assert understander.wait_for_engines(120)
        assert (understander.device, old.users) == ("cuda:0", 2)
        assert len(old.scheduler.cache) > 0
        assert len(understander._runner.model.scheduler.cache) == 0
        # Both engines answer side by side for as long as somebody began on the old one.
        answer, again = (asking.ask("and?", params=FREE) for asking in (chat, other))
        assert (answer.text, answer.cached_tokens) == (again.text, 0)
        assert again.cached_tokens > 0
        assert answer.prompt_tokens == again.prompt_tokens
        assert chat.ask("why?", params=FREE).cached_tokens > 0
        cancelled.close()
        assert old.users == 1
        assert "".join([*pieces, *begun]) == expected
        assert comes_true(lambda: old.users == 0)
        assert old.sessions["head"]._session is None  # type: ignore[attr-defined]
        assert pool_is_clean(understander)
        assert understander.answer(features(0), LONG, params=FREE).text == expected


def test_threads_ask_on_while_engines_change(
    machine, mini_understander: Path, on_cpu: Understander, monkeypatch: pytest.MonkeyPatch
) -> None:
    go = waiting(monkeypatch)
    expected = [on_cpu.answer(features(i), "what?", params=FREE).token_ids for i in range(3)]
    found: list[tuple[int, tuple[int, ...]]] = []
    stop = threading.Event()
    with on_engines(mini_understander, serve_while_building=True) as understander:

        def ask(number: int) -> None:
            while not stop.is_set():
                found.append((number, understander.answer(features(number), "what?", params=FREE).token_ids))

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(3)]
        for thread in threads:
            thread.start()
        old = understander._runner.model
        go.set()
        assert understander.wait_for_engines(120)
        seen = len(found)
        assert comes_true(lambda: len(found) >= seen + 6)
        stop.set()
        for thread in threads:
            thread.join()
        assert pool_is_clean(understander)
        assert comes_true(lambda: old.users == 0)
    assert all(tokens == expected[number] for number, tokens in found)


def test_serving_goes_on_without_engines_that_fail(machine, mini_understander: Path, on_cpu: Understander) -> None:
    machine[1].broken.add("transformer")
    with on_engines(mini_understander, serve_while_building=True) as understander:
        with pytest.raises(EngineRefusedError):
            understander.wait_for_engines(120)
        expected = on_cpu.answer(features(0), "what?", params=FREE).token_ids
        assert understander.answer(features(0), "what?", params=FREE).token_ids == expected
        assert understander.device == "cpu"


def test_wrong_options_are_named(machine, mini_understander: Path, mini_bundle: Path) -> None:
    with Tokenizer.from_pretrained(mini_bundle, device="cpu") as tokenizer:
        for options, error, words in (
            ({"backend": "tvm"}, ArgumentError, "no backend 'tvm'"),
            ({"page_size": 4}, ArgumentError, "pages of 16 tokens"),
            ({"serve_while_building": True, "build": False}, ArgumentError, "serve_while_building=True builds TensorRT"),
            ({"build": False, "pages": 33}, BackendError, "no engine yet for embed_text, fp32, sm89.*--pages 33"),
        ):
            with pytest.raises(error, match=words):
                on_engines(mini_understander, tokenizer=tokenizer, **options)
    assert machine[1].builds == []


def test_the_command_line(machine, mini_understander: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    bundle = str(mini_understander)
    assert main(["info", bundle]) == 0
    assert "no engine built yet for embed_text" in " ".join(capsys.readouterr().out.split())
    Path("mine.toml").write_text('backend = "tensorrt"\nprecision = "fp32"\n')
    Image.effect_noise((90, 70), 80).convert("RGB").save("photo.png")
    assert main(["build", bundle, "--config", "mine.toml"]) == 0
    assert "chat certified: hidden states cosine 1.00000, likeliest token the same at 100.0%" in capsys.readouterr().out
    assert main(["verify", bundle]) == 0
    assert "likeliest token the same at 100.0%" in capsys.readouterr().out
    assert main(["verify", bundle, "--backend", "tensorrt", "--config", "mine.toml"]) == 0
    assert "certified" in capsys.readouterr().out
    assert main(["info", bundle]) == 0
    assert "runs on tensorrt" in capsys.readouterr().out
    ask = ["ask", "photo.png", "what?", "--bundle", bundle, "--max-tokens", "12"]
    assert main([*ask, "--backend", "tensorrt", "--config", "mine.toml"]) == 0
    answer = capsys.readouterr().out
    assert main([*ask, "--backend", "onnxruntime"]) == 0
    assert capsys.readouterr().out == answer
