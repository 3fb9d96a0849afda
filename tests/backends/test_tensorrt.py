"""The TensorRT session on a TensorRT and a GPU that are not there (tests/support/fake_gpu.py): engines run in onnxruntime,
and every address that they are given is checked. The same calls on the real thing are in test_on_gpu.py."""

from __future__ import annotations

import gc
import hashlib
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import numpy as np
import pytest

from tests.support.fake_cuda import FakeCuda, Status
from tests.support.fake_gpu import MAGIC, FakeContext, FakeEngine, FakeTensorRT, make_plan
from tokenflow_sdk.backends.cuda import Cuda, CudaArray
from tokenflow_sdk.backends.onnxruntime import OnnxRuntimeSession
from tokenflow_sdk.backends.session import SessionOptions
from tokenflow_sdk.backends.tensorrt import TensorRTSession
from tokenflow_sdk.bundle.bundle import Bundle, open_bundle
from tokenflow_sdk.bundle.model_config import TokenizerConfig
from tokenflow_sdk.engines.profiles import Profile
from tokenflow_sdk.errors import ArgumentError, BackendError

Machine = tuple[FakeCuda, FakeTensorRT]
RNG = np.random.default_rng(0)
PROFILES = (Profile({"batch": (1, 2, 8)}),)


def session(
    machine: Machine,
    bundle: Path,
    name: str,
    device: int = 0,
    profiles: Sequence[Profile] = PROFILES,
    **options: object,
) -> TensorRTSession:
    entry = open_bundle(bundle).graph(name)
    shapes = [{spec.name: profile.shapes(spec) for spec in entry.inputs} for profile in profiles]
    plan = make_plan(machine[1], bundle / f"{name}.onnx", shapes)
    return open_plan(plan, name, entry, machine[1], Cuda(device), **options)


def open_plan(plan: bytes, *arguments: object, **options: object) -> TensorRTSession:
    """A session on an engine that is a file until it is loaded."""
    with TemporaryDirectory() as directory:
        path = Path(directory) / "plan.engine"
        path.write_bytes(plan)
        return TensorRTSession(path, hashlib.sha256(plan).hexdigest(), *arguments, **options)  # type: ignore[arg-type]


def settings_of(engine: TensorRTSession) -> SimpleNamespace:
    """What its first context was made with."""
    execution = engine._idle.queue[0]
    assert execution is not None
    found: SimpleNamespace = execution._profiles[0].context.settings
    return found


def images(batch: int) -> dict[str, np.ndarray]:
    return {"images": RNG.integers(0, 256, (batch, 64, 64, 3), np.uint8)}


def test_calls_of_any_batch_give_what_onnxruntime_gives(machine: Machine, mini_bundle: Path) -> None:
    entry = Bundle.open(mini_bundle, TokenizerConfig).graph("encode")
    expected = OnnxRuntimeSession(mini_bundle / "encode.onnx", entry, SessionOptions(device="cpu", threads=1))
    with session(machine, mini_bundle, "encode") as engine:
        assert engine.device == "cuda:0"
        assert (engine.max_size("batch"), engine.max_size("pages")) == (8, None)
        for batch in (1, 3, 2, 3):
            feeds = images(batch)
            found, right = engine.run(feeds), expected.run(feeds)
            for name in right:
                np.testing.assert_array_equal(found[name], right[name])
        assert set(engine.run(images(1), ["latent"])) == {"latent"}


def test_addresses_are_set_only_when_they_change(machine: Machine, mini_bundle: Path) -> None:
    with session(machine, mini_bundle, "encode") as engine:
        engine.run(images(4))
        binds = machine[1].binds
        for batch in (4, 2, 3, 1):
            engine.run(images(batch))
        assert machine[1].binds == binds
        engine.run(images(5))
        assert machine[1].binds > binds


def test_results_can_stay_and_be_fed_on(machine: Machine, mini_bundle: Path) -> None:
    feeds = images(2)
    with session(machine, mini_bundle, "encode") as encode, session(machine, mini_bundle, "decode") as decode:
        kept = encode.run_resident(feeds, ["code_indices"])["code_indices"]
        assert isinstance(kept, CudaArray)
        expected = decode.run({"code_indices": np.asarray(kept)})["images"]
        np.testing.assert_array_equal(decode.run({"code_indices": kept})["images"], expected)
        np.testing.assert_array_equal(decode.run({"code_indices": kept[1:]})["images"], expected[1:])


def test_calls_whose_shapes_repeat_are_captured_once(machine: Machine, mini_bundle: Path) -> None:
    """The GPU that is not there finds it out where a graph is recorded or launched after anything changed."""
    cuda, codes = machine[0], RNG.integers(0, 500, (2, 30), np.int32)
    with session(machine, mini_bundle, "features", cuda_graphs=True) as engine:
        first = engine.run({"code_indices": codes})["features"]
        # The second call gets a context, and the third a graph.
        for launches in (0, 1, 2):
            np.testing.assert_array_equal(engine.run({"code_indices": codes})["features"], first)
            assert (cuda.launches, cuda.captures) == (launches, min(launches, 1))
        other = engine.run({"code_indices": codes[::-1]})["features"]
        np.testing.assert_array_equal(other, first[::-1])
        for batch in (1, 2, 1, 1, 2, 2, 2, 1):
            found = engine.run({"code_indices": codes[:batch]})["features"]
            np.testing.assert_array_equal(found, first[:batch])
        assert (cuda.launches, cuda.captures, len(cuda.graphs)) == (3 + 4 + 2, 2, 2)
    assert cuda.graphs == {}


def test_few_graphs_are_kept(machine: Machine, mini_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that were used last. Without memory for a context there is none."""
    monkeypatch.setattr("tokenflow_sdk.backends.tensorrt_context.MOST_GRAPHS", 2)
    cuda, trt = machine

    def run(engine: TensorRTSession, *batches: int) -> int:
        before = cuda.captures
        for batch in batches:
            np.testing.assert_array_equal(engine.run({"code_indices": codes[:batch]})["features"], expected[:batch])
        return cuda.captures - before

    codes = RNG.integers(0, 500, (8, 30), np.int32)
    with session(machine, mini_bundle, "features", cuda_graphs=True) as engine:
        expected = engine.run({"code_indices": codes})["features"]
        assert run(engine, 1, 1, 1, 2, 2, 2) == 2
        assert (run(engine, 1, 3), len(cuda.graphs)) == (0, 1)
        assert run(engine, 1, 2, 1, 2, 2, 2) == 1
        there = engine.run_resident({"code_indices": codes[:1]})["features"]
        assert isinstance(there, CudaArray)
        trt.contexts_left = 0
        assert run(engine, 4, 4, 4, 4) == 0
    assert cuda.graphs == {}


def test_sizes_are_padded_to_few(machine: Machine, mini_understander: Path) -> None:
    """Two sizes of rows and four of block tables from one power of two to the next; no more than the engine takes."""
    profiles = [Profile({"batch": (1, 2, 11), "queries": (1, 1, 100)})]
    with session(machine, mini_understander, "embed_text", profiles=profiles) as engine:
        rows = [engine.padded("batch", size) for size in range(1, 13)]
        assert rows == [1, 2, 3, 4, 6, 6, 8, 8, 11, 11, 11, 12]
        queries = {size: engine.padded("queries", size) for size in (1, 7, 9, 16, 17, 33, 64, 65, 97, 100)}
        assert queries == {1: 1, 7: 7, 9: 10, 16: 16, 17: 20, 33: 40, 64: 64, 65: 80, 97: 100, 100: 100}
        assert engine.padded("table", 5) == 5


@pytest.mark.parametrize("refused", ["enqueue", "cudaStreamEndCapture", "cudaGraphInstantiate"])
def test_where_nothing_can_be_captured_calls_go_on(
    machine: Machine, refused: str, mini_bundle: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cuda, trt = machine
    trt.capturable = refused != "enqueue"
    if refused != "enqueue":
        plain = getattr(cuda, refused)
        monkeypatch.setattr(cuda, refused, lambda *arguments: (plain(*arguments), (Status(901), None))[1])
    codes = RNG.integers(0, 500, (2, 30), np.int32)
    with session(machine, mini_bundle, "features", cuda_graphs=True) as engine:
        found = [engine.run({"code_indices": codes})["features"] for _ in range(4)]
    for again in found[1:]:
        np.testing.assert_array_equal(again, found[0])
    assert cuda.launches == 0
    assert caplog.text.count("Going on without CUDA graphs") == 1


def test_lanes_run_at_once(machine: Machine, mini_bundle: Path) -> None:
    codes = [RNG.integers(0, 500, (1, 30), np.int32) for _ in range(12)]
    with session(machine, mini_bundle, "features", execution_contexts=3) as engine:
        expected = [engine.run({"code_indices": row})["features"] for row in codes]
        found: dict[int, np.ndarray] = {}

        def work(number: int) -> None:
            for i in range(number, len(codes), 4):
                found[i] = engine.run({"code_indices": codes[i]})["features"]

        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for i, row in enumerate(expected):
            np.testing.assert_array_equal(found[i], row)


def test_each_call_runs_by_a_profile_that_it_fits(machine: Machine, mini_understander: Path) -> None:
    """One token of many texts, or many tokens of one; nothing in between."""
    profiles = [Profile({"batch": (1, 2, 4), "queries": (1, 1, 1)}), Profile({"batch": (1, 1, 1), "queries": (1, 8, 9)})]
    entry = open_bundle(mini_understander).graph("embed_text")
    expected = OnnxRuntimeSession(mini_understander / "embed_text.onnx", entry, SessionOptions(device="cpu", threads=1))

    def texts(batch: int, queries: int) -> dict[str, np.ndarray]:
        return {"token_ids": RNG.integers(0, 200, (batch, queries), np.int32)}

    with session(machine, mini_understander, "embed_text", profiles=profiles) as engine:
        assert (engine.max_size("batch"), engine.max_size("queries"), engine.max_size("pages")) == (4, 9, None)
        assert machine[1].contexts_left == 1000 - 2
        assert [size for _, size in machine[0].device_memory.values()] == [FakeEngine.device_memory_size_v2]
        for batch, queries in ((1, 9), (4, 1), (1, 1), (1, 5), (3, 1), (1, 9)):
            feeds = texts(batch, queries)
            right = expected.run(feeds)["embeddings"]
            np.testing.assert_array_equal(engine.run(feeds)["embeddings"], right)
            np.testing.assert_array_equal(np.asarray(engine.run_resident(feeds)["embeddings"]), right)
        with pytest.raises(ArgumentError, match="built for batch from 1 to 4, not 5"):
            engine.run(texts(5, 1))
        with pytest.raises(ArgumentError, match="built for queries from 1 to 9, not 10"):
            engine.run(texts(1, 10))
        with pytest.raises(ArgumentError, match="built for queries from 1 to 1, not 2"):
            engine.run(texts(2, 2))
    machine[1].profiles_taken = 1
    with pytest.raises(BackendError, match="does not take the shapes.*tokenflow build"):
        session(machine, mini_understander, "embed_text", profiles=profiles)


def test_closing_waits_for_calls_and_refuses_later_ones(machine: Machine, mini_bundle: Path) -> None:
    codes = {"code_indices": RNG.integers(0, 500, (1, 30), np.int32)}
    engine = session(machine, mini_bundle, "features", execution_contexts=2)
    entered, go, found = threading.Event(), threading.Event(), []
    plain = FakeContext.execute_async_v3

    def slow(context: FakeContext, stream: int) -> bool:
        entered.set()
        go.wait(60)
        return plain(context, stream)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FakeContext, "execute_async_v3", slow)
        calling = threading.Thread(target=lambda: found.append(engine.run(codes)["features"]))
        calling.start()
        assert entered.wait(60)
        closing = threading.Thread(target=engine.close)
        closing.start()
        closing.join(0.1)
        assert closing.is_alive()
        go.set()
        closing.join(60)
        calling.join(60)
    assert len(found) == 1
    for _ in range(2):
        with pytest.raises(BackendError, match="features was closed.*Open the bundle again"):
            engine.run(codes)
        engine.close()
    gc.collect()
    assert machine[0].device_memory == {}


def test_closing_frees_everything(machine: Machine, mini_bundle: Path) -> None:
    engine = session(machine, mini_bundle, "encode", execution_contexts=2)
    engine.run(images(2))
    engine.close()
    engine.close()
    del engine
    gc.collect()
    assert (machine[0].device_memory, machine[0].host_memory, machine[0].streams) == ({}, {}, set())


def test_what_does_not_work_is_named(machine: Machine, mini_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trt = machine[1]
    with session(machine, mini_bundle, "encode") as engine:
        with pytest.raises(ArgumentError, match="encode was built for batch from 1 to 8, not 9.*batch_limit= of at most 8"):
            engine.run(images(9))
        monkeypatch.setattr("tests.support.fake_gpu.FakeContext.execute_async_v3", lambda self, stream: False)
        with pytest.raises(BackendError, match="TensorRT failed to run encode"):
            engine.run(images(1))
    trt.contexts_left = 0
    with pytest.raises(BackendError, match="no 1 MB left that encode works in"):
        session(machine, mini_bundle, "encode")
    trt.contexts_left, machine[0].memory = 1000, machine[0].used() + FakeEngine.device_memory_size_v2 - 1
    with pytest.raises(BackendError, match="GPU 0 has no 1 MB left"):
        session(machine, mini_bundle, "encode")
    trt.__version__ = "12.0"
    plan = MAGIC + b"11.0.fake\n{}\n"
    entry = Bundle.open(mini_bundle, TokenizerConfig).graph("encode")
    with pytest.raises(BackendError, match="does not load in tensorrt 12.0: the plan is of another version.*tokenflow build"):
        open_plan(plan, "encode", entry, trt, Cuda())


def test_kernels_are_compiled_once_for_all_starts(machine: Machine, mini_bundle: Path, tmp_path: Path) -> None:
    """TensorRT-RTX compiles at a context's first run; what it compiled is kept beside the engine."""
    rtx, path = sys.modules["tensorrt_rtx"], tmp_path / "features.kernels"
    codes = {"code_indices": RNG.integers(0, 500, (2, 30), np.int32)}

    def run() -> int:
        before = rtx.compiled
        with session((machine[0], rtx), mini_bundle, "features", execution_contexts=2, kernels=path) as engine:  # type: ignore[arg-type]
            engine.run(codes)
        return rtx.compiled - before

    assert [run(), run()] == [1, 0]
    stored = path.stat().st_mtime_ns
    assert run() == 0
    assert path.stat().st_mtime_ns == stored
    path.write_bytes(b"damaged")
    assert [run(), run()] == [1, 0]
    rtx.__version__ = "1.8.fake"
    assert [run(), run()] == [1, 0]
    path.unlink()
    path.mkdir()
    assert run() == 1


def test_full_tensorrt_keeps_no_kernels(machine: Machine, mini_bundle: Path, tmp_path: Path) -> None:
    with session(machine, mini_bundle, "features", kernels=tmp_path / "features.kernels") as engine:
        engine.run({"code_indices": np.zeros((1, 30), np.int32)})
    assert list(tmp_path.iterdir()) == []


def test_tensorrt_rtx_replays_by_itself(machine: Machine, mini_bundle: Path) -> None:
    rtx = sys.modules["tensorrt_rtx"]
    with session((machine[0], rtx), mini_bundle, "features", cuda_graphs=True) as engine:  # type: ignore[arg-type]
        for _ in range(3):
            engine.run({"code_indices": np.zeros((1, 30), np.int32)})
        assert machine[0].launches == 0
        assert settings_of(engine).cuda_graph_strategy == "whole"


def test_tensorrt_rtx_changes_no_kernels_behind_calls(machine: Machine, mini_bundle: Path, mini_understander: Path) -> None:
    """What was certified is what runs. Shapes get kernels of their own where they are few: not pieces of a prompt."""
    rtx = machine[0], sys.modules["tensorrt_rtx"]
    answers, scales = Profile({"batch": (1, 1, 2), "queries": (1, 1, 1)}), Profile({"batch": (1, 1, 2), "queries": (1, 1, 9)})
    pieces = Profile({"batch": (1, 1, 1), "queries": (1, 1, 9)})
    with session(rtx, mini_bundle, "features") as engine:  # type: ignore[arg-type]
        assert settings_of(engine).dynamic_shapes_kernel_specialization_strategy == "eager"
        assert settings_of(engine).cuda_graph_strategy == "disabled"
    for profile, strategy in ((answers, "eager"), (scales, "eager"), (pieces, "none")):
        with session(rtx, mini_understander, "embed_text", profiles=[profile]) as engine:  # type: ignore[arg-type]
            assert settings_of(engine).dynamic_shapes_kernel_specialization_strategy == strategy


def test_a_session_runs_on_its_gpu_and_leaves_the_callers_alone(machine: Machine, mini_bundle: Path) -> None:
    machine[0].gpus, used = 2, []
    plain = machine[0].cudaMemcpyAsync
    machine[0].cudaMemcpyAsync = lambda *arguments: (used.append(machine[0].current), plain(*arguments))[1]  # type: ignore[method-assign]
    with session(machine, mini_bundle, "features", device=1) as engine:
        assert machine[0].current == 0
        engine.run({"code_indices": np.zeros((1, 30), np.int32)})
        assert engine.device == "cuda:1"
    assert set(used) == {1}
    assert machine[0].current == 0


def test_a_tensorrt_that_does_not_start_is_named(machine: Machine, mini_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bindings then raise a TypeError about a factory function."""

    def nothing(log) -> None:
        log.log(machine[1].Severity.ERROR, "CUDA initialization failure with error: 35")
        raise TypeError("pybind11::init(): factory function returned nullptr")

    monkeypatch.setattr(machine[1], "Runtime", nothing)
    with pytest.raises(BackendError, match=r"does not start here: CUDA initialization failure.*Update the NVIDIA driver"):
        session(machine, mini_bundle, "features")
