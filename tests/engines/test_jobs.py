"""Which engines a bundle needs, on a machine that is not there (tests/support/fake_gpu.py)."""

from __future__ import annotations

import errno
import json
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from tests.support.fake_graphs import UNDERSTANDER, understander_graphs
from tests.support.fakes import CONFIG, GRAPHS
from tokenflow_export.tracing.onnx_export import file_entry
from tokenflow_sdk.bundle.bundle import Bundle
from tokenflow_sdk.bundle.schema import FileEntry, GraphEntry, TensorSpec
from tokenflow_sdk.engines import jobs
from tokenflow_sdk.engines.annotations import PINNED, RANGES
from tokenflow_sdk.engines.build import BuiltEngine
from tokenflow_sdk.engines.build_config import BuildConfig
from tokenflow_sdk.engines.cache import EngineCache
from tokenflow_sdk.engines.jobs import EngineJob, engine_jobs
from tokenflow_sdk.errors import BackendError, EngineBuildError, OutputError

FULL = BuildConfig("tensorrt")
AHEAD = BuildConfig(targets=("sm120", "SM86", "sm89", "sm86"))
RANGES_OF = {"int8": {"decode": {"a": 1.0}}, "fp8": {"decode": {"a": 1.0}}}
OTHER_RANGES = {"int8": {"decode": {"a": 2.0}}}
FILE = FileEntry("reference.npz", 0, "0" * 64)


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle[Any]:
    """Three graphs that add nothing to what they read."""
    graphs = {}
    for name, entry in GRAPHS.items():
        spec = entry.inputs[0]
        kind = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(spec.dtype))
        ends = [onnx.helper.make_tensor_value_info(end, kind, spec.shape) for end in (spec.name, "copy")]
        node = onnx.helper.make_node("Identity", [spec.name], ["copy"])
        model = onnx.helper.make_model(onnx.helper.make_graph([node], name, ends[:1], ends[1:]))
        onnx.save(model, tmp_path / f"{name}.onnx")
        graphs[name] = GraphEntry((file_entry(tmp_path / f"{name}.onnx"),), entry.inputs, entry.outputs)
    return Bundle(tmp_path, CONFIG, graphs, {"reference": FILE}, {}, {})


def annotated(bundle: Bundle[Any], name: str, content: Mapping[str, object]) -> Bundle[Any]:
    path = bundle.path / f"{name}.json"
    path.write_text(json.dumps(content))
    return replace(bundle, assets=bundle.assets | {name: file_entry(path)})


def rtx() -> Any:
    """The TensorRT-RTX that is not there."""
    return sys.modules["tensorrt_rtx"]


def by_graph(bundle: Bundle[Any], config: BuildConfig, trt: Any) -> dict[str, EngineJob]:
    return {job.key.graph: job for job in engine_jobs(bundle, config, trt)}


def test_one_engine_for_every_graph_holds_all_targets(machine, bundle: Bundle[Any]) -> None:
    found = list(engine_jobs(bundle, AHEAD, rtx()))
    assert [(job.key.target, job.key.graph) for job in found] == [
        ("sm86,sm89,sm120", graph) for graph in ("encode", "decode", "features")
    ]
    assert all(job.cuda is None and job.key.gpu == "" for job in found)
    assert {job.graph.name for job in found} == {"encode.onnx", "decode.onnx", "features.onnx"}
    assert all(job.entry is bundle.graphs[job.key.graph] for job in found)


@pytest.mark.parametrize(("backend", "gpu"), [("tensorrt", "NVIDIA Fake 4090"), ("tensorrt-rtx", "")])
def test_without_a_target_it_is_the_gpu_that_is_there(machine, backend: str, gpu: str, bundle: Bundle[Any]) -> None:
    """Full TensorRT measures kernels on one model of GPU; TensorRT-RTX compiles for an architecture."""
    machine[0].gpus, machine[0].capability = 2, (8, 6)
    trt = rtx() if backend == "tensorrt-rtx" else machine[1]
    for job in engine_jobs(bundle, BuildConfig(backend), trt, device=1):
        assert (job.key.target, job.key.gpu, job.key.flavour) == ("sm86", gpu, backend)
        assert job.cuda is not None
        assert job.cuda.device == 1


@pytest.mark.parametrize(("backend", "hint"), [("tensorrt-rtx", "--target sm86,sm89,sm120"), ("tensorrt", None)])
def test_without_a_gpu_a_target_must_be_named(machine, backend: str, hint: str | None, bundle: Bundle[Any]) -> None:
    """Where building ahead is possible at all."""
    machine[0].gpus = 0
    with pytest.raises(BackendError) as caught:
        list(engine_jobs(bundle, BuildConfig(backend), machine[1]))
    assert (hint or "") in caught.value.hint
    assert ("--target" in caught.value.hint) == (hint is not None)
    assert len(list(engine_jobs(bundle, AHEAD, rtx()))) == 3


KEYS: list[tuple[str, Any]] = [
    ("precision", lambda b, trt: (b, FULL.with_overrides(precision="fp32"))),
    ("other precision", lambda b, trt: (b, FULL.with_overrides(precision="bf16"))),
    ("usual batch", lambda b, trt: (b, FULL.with_overrides(batch=(1, 2, 8)))),
    ("largest batch", lambda b, trt: (b, FULL.with_overrides(batch=(1, 1, 9)))),
    ("workspace", lambda b, trt: (b, FULL.with_overrides(workspace_gb=1.0))),
    ("backend", lambda b, trt: (b, BuildConfig("tensorrt-rtx"))),
    ("target", lambda b, trt: (b, BuildConfig("tensorrt-rtx", targets=("sm86",)))),
    ("targets", lambda b, trt: (b, BuildConfig("tensorrt-rtx", targets=("sm86", "sm120")))),
    ("version", lambda b, trt: (setattr(trt, "__version__", "12.0"), (b, FULL))[1]),
    ("architecture", lambda b, trt: (setattr(trt.cuda, "capability", (9, 0)), (b, FULL))[1]),
    ("model of GPU", lambda b, trt: (setattr(trt.cuda, "model", b"Other\0"), (b, FULL))[1]),
    ("pinned nodes", lambda b, trt: (annotated(b, PINNED, {"fp16": {"decode": ["a"]}}), FULL)),
    ("other pinned nodes", lambda b, trt: (annotated(b, PINNED, {"fp16": {"decode": ["b"]}}), FULL)),
    ("8 bits", lambda b, trt: (annotated(b, RANGES, RANGES_OF), FULL.with_overrides(decoder="int8"))),
    ("other 8 bits", lambda b, trt: (annotated(b, RANGES, RANGES_OF), FULL.with_overrides(decoder="fp8"))),
    ("other ranges", lambda b, trt: (annotated(b, RANGES, OTHER_RANGES), FULL.with_overrides(decoder="int8"))),
    ("graph", lambda b, trt: (replace(b, graphs=b.graphs | {"decode": with_other_weights(b)}), FULL)),
]


def with_other_weights(bundle: Bundle[Any]) -> GraphEntry:
    entry = bundle.graphs["decode"]
    return replace(entry, files=(replace(entry.files[0], sha256="cd" * 32),))


def decode_digest(machine: Any, bundle: Bundle[Any], number: int | None) -> str:
    config = FULL
    if number is not None:
        bundle, config = KEYS[number][1](bundle, machine[1])
    return by_graph(bundle, config, rtx() if config.backend == "tensorrt-rtx" else machine[1])["decode"].key.digest


@pytest.mark.parametrize("number", range(len(KEYS)), ids=[name for name, _ in KEYS])
def test_any_difference_is_another_engine(machine, number: int, bundle: Bundle[Any]) -> None:
    plain = decode_digest(machine, bundle, None)
    assert decode_digest(machine, bundle, None) == plain
    assert decode_digest(machine, bundle, number) != plain


def test_every_difference_is_an_engine_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, bundle: Bundle[Any]) -> None:
    from tests.support.fake_gpu import install

    digests = {decode_digest(install(monkeypatch), bundle, number) for number in (None, *range(len(KEYS)))}
    assert len(digests) == len(KEYS) + 1


def test_what_changes_nothing_is_the_same_engine(machine, bundle: Bundle[Any], tmp_path: Path) -> None:
    """Where the bundle lies, what else it holds, the order of pinned nodes, and what other graphs have pinned."""
    plain = decode_digest(machine, bundle, None)
    other = replace(bundle, path=tmp_path / "elsewhere", provenance={"checkpoint": "x"})
    assert decode_digest(machine, other, None) == plain
    pinned = annotated(bundle, PINNED, {"fp16": {"encode": ["a"]}, "fp32": {"decode": ["a"]}})
    assert decode_digest(machine, pinned, None) == plain
    digests = set()
    for names in (["a", "b"], ["b", "a"]):
        digests.add(decode_digest(machine, annotated(bundle, PINNED, {"fp16": {"decode": names}}), None))
    assert len(digests) == 1
    # For TensorRT-RTX the model of GPU is nothing.
    keys = [by_graph(bundle, BuildConfig(), rtx())["decode"].key]
    machine[0].model = b"Other\0"
    assert by_graph(bundle, BuildConfig(), rtx())["decode"].key == keys[0]


def test_a_pool_of_another_size_is_another_engine_where_there_is_one(machine, bundle: Bundle[Any]) -> None:
    graphs = {name: GraphEntry((FILE,), graph.inputs, graph.outputs) for name, graph in understander_graphs().items()}
    model = replace(bundle, config=UNDERSTANDER, graphs=graphs)
    small, large = (by_graph(model, FULL.with_overrides(pages=pages), machine[1]) for pages in (50, 60))
    assert {name for name in graphs if small[name].key != large[name].key} == {"transformer"}
    # A tokenizer has none.
    tokenizer = by_graph(bundle, FULL.with_overrides(pages=50), machine[1])
    assert tokenizer["decode"].key.digest == decode_digest(machine, bundle, None)


def test_precision_is_told_in_words(machine, bundle: Bundle[Any]) -> None:
    """With 8 bits for all graphs alike: one certificate is of all of them together. Only the decoder's job has the ranges."""
    full = annotated(annotated(bundle, PINNED, {"fp16": {"encode": ["a", "b"]}}), RANGES, RANGES_OF)
    found = by_graph(full, FULL.with_overrides(decoder="int8"), machine[1])
    words = {name: job.key.precision for name, job in found.items()}
    (ranges,) = {text.rpartition("(")[2] for text in words.values()}
    assert words["decode"] == words["features"] == f"fp16, int8 decoder ({ranges}"
    assert words["encode"].startswith("fp16, 2 pinned (")
    assert words["encode"].endswith(f"), int8 decoder ({ranges}")
    assert {name: job.pinned for name, job in found.items()} == {"encode": ("a", "b"), "decode": (), "features": ()}
    assert {name: job.ranges is not None for name, job in found.items()} == {"encode": False, "decode": True, "features": False}
    assert {job.key.precision for job in engine_jobs(full, FULL.with_overrides(precision="fp32"), machine[1])} == {"fp32"}


def test_a_bundle_without_a_reference_is_refused(machine, bundle: Bundle[Any]) -> None:
    with pytest.raises(EngineBuildError, match=r"no reference that its engines could be compared with.*Export it again"):
        list(engine_jobs(replace(bundle, assets={}), FULL, machine[1]))


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_a_bundle_in_float16_has_engines_in_any_precision(machine, precision, bundle: Bundle[Any]) -> None:
    spec = TensorSpec("x", "float16", ("batch", 3))
    half = replace(bundle, graphs={"decode": GraphEntry((FILE,), (spec,), (spec,))})
    (job,) = engine_jobs(half, FULL.with_overrides(precision=precision), machine[1])
    assert job.key.precision == precision


def test_a_decoder_in_8_bits_needs_ranges(machine, bundle: Bundle[Any]) -> None:
    with pytest.raises(EngineBuildError, match="does not say which magnitudes its decoder reads.*calibrate"):
        list(engine_jobs(bundle, FULL.with_overrides(decoder="int8"), machine[1]))


def test_fp8_needs_a_gpu_that_has_it(machine, bundle: Bundle[Any]) -> None:
    full = annotated(bundle, RANGES, RANGES_OF)
    config = BuildConfig(targets=("sm80", "sm89", "sm86"), decoder="fp8")
    with pytest.raises(EngineBuildError, match="sm80, sm86 has no fp8 arithmetic; GPUs from sm89 on have.*--decoder int8"):
        list(engine_jobs(full, config, rtx()))
    for allowed in (config.with_overrides(decoder="int8"), config.with_overrides(targets=("sm89", "sm120"))):
        assert len(list(engine_jobs(full, allowed, rtx()))) == 3


def test_an_engine_is_built_once_and_then_found(machine, bundle: Bundle[Any], tmp_path: Path) -> None:
    cache, job = EngineCache(tmp_path / "cache"), by_graph(bundle, FULL, machine[1])["decode"]
    shares: list[tuple[str, float]] = []
    engine, built = job.run(machine[1], cache, lambda phase, share: shares.append((phase, share)))
    assert (built, shares) == (True, [("building", 1.0)])
    assert engine.key == job.key
    assert engine.build_config == FULL.to_json()
    assert job.run(machine[1], cache, lambda *_: pytest.fail("built again")) == (engine, False)
    assert machine[1].builds == ["decode"]
    engine.path.write_bytes(b"damaged")
    assert job.run(machine[1], cache)[1]


def test_two_who_ask_for_an_engine_build_it_once(machine, bundle: Bundle[Any], tmp_path: Path, monkeypatch) -> None:
    plain = jobs.build_engine

    def slow(*arguments: Any) -> bytes:
        time.sleep(0.2)
        return plain(*arguments)

    monkeypatch.setattr(jobs, "build_engine", slow)
    job, found = by_graph(bundle, FULL, machine[1])["decode"], []
    begin = threading.Barrier(3)

    def ask() -> None:
        begin.wait()
        found.append(job.run(machine[1], EngineCache(tmp_path / "cache")))

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(built for _, built in found) == [False, False, True]
    assert len({engine.path for engine, _ in found}) == 1
    assert machine[1].builds == ["decode"]


def test_what_the_builder_is_told(machine, bundle: Bundle[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ahead: the targets, and no GPU. Here: the GPU, and no targets. In float32 the graph is the bundle's own."""
    told: list[tuple[Any, ...]] = []
    monkeypatch.setattr(jobs, "build_engine", lambda *arguments: told.append(arguments) or BuiltEngine(b"engine", {}))
    ahead = BuildConfig(targets=("sm86",), precision="fp32", workspace_gb=0.5)
    here = FULL.with_overrides(precision="fp16")
    for config, trt in ((ahead, rtx()), (here, machine[1])):
        by_graph(bundle, config, trt)["encode"].run(trt, EngineCache(tmp_path / "cache"))
    (first, second) = told
    profile = (first[3][0].sizes, second[3][0].sizes)
    assert profile == ({"batch": (1, 1, 8)},) * 2
    assert (first[1], first[4:6], first[7]) == (bundle.path / "encode.onnx", (("sm86",), 2**29), None)
    assert (second[4:6], second[7].device) == (((), None), 0)
    assert second[1].name == "encode.onnx"
    assert second[1].parent != bundle.path
    # What was prepared for the builder is gone.
    assert not second[1].parent.exists()


def test_no_room_for_the_graph_is_named(machine, bundle: Bundle[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(jobs.tempfile, "TemporaryDirectory", full)
    job = by_graph(bundle, FULL, machine[1])["decode"]
    with pytest.raises(OutputError, match=rf"graph of {job.key.title} cannot be prepared: No space left.*\$TMPDIR"):
        job.run(machine[1], EngineCache(tmp_path / "cache"))
    assert EngineCache(tmp_path / "cache").get(job.key) is None


def test_a_build_that_fails_leaves_no_engine_and_no_lock(machine, bundle: Bundle[Any], tmp_path: Path, monkeypatch) -> None:
    cache, job = EngineCache(tmp_path / "cache"), by_graph(bundle, FULL, machine[1])["decode"]
    with monkeypatch.context() as patch:
        patch.setattr(jobs, "build_engine", lambda *_: (_ for _ in ()).throw(EngineBuildError("No.", "Never.")))
        with pytest.raises(EngineBuildError, match="No"):
            job.run(machine[1], cache)
    assert cache.entries() == []
    assert job.run(machine[1], cache)[1]
