from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest

from tokenflow_sdk.backends import onnxruntime as backend
from tokenflow_sdk.backends.cuda import CudaArray
from tokenflow_sdk.backends.onnxruntime import OnnxRuntimeSession
from tokenflow_sdk.backends.session import SessionOptions
from tokenflow_sdk.bundle.bundle import Bundle
from tokenflow_sdk.bundle.model_config import TokenizerConfig
from tokenflow_sdk.errors import ArgumentError, BackendError, MissingPackageError

HAS_CUDA = "CUDAExecutionProvider" in onnxruntime.get_available_providers()


def open_graph(bundle: Path, name: str, **options: object) -> OnnxRuntimeSession:
    entry = Bundle.open(bundle, TokenizerConfig).graph(name)
    return OnnxRuntimeSession(bundle / entry.files[0].name, entry, SessionOptions(**options))  # type: ignore[arg-type]


def test_runs_a_graph(mini_bundle: Path) -> None:
    with open_graph(mini_bundle, "features", device="cpu", threads=1) as session:
        assert session.device == "cpu"
        found = session.run({"code_indices": np.zeros((3, 30), np.int32)})
        assert found["features"].shape == (3, 16, 40)
    session.close()


@pytest.mark.parametrize("names", [["CPUExecutionProvider"], ["CUDAExecutionProvider", "CPUExecutionProvider"]])
def test_only_the_cpu_gets_graphs_rewritten_for_its_kernels(
    mini_bundle: Path, monkeypatch: pytest.MonkeyPatch, names: list[str]
) -> None:
    opened: list[object] = []

    def record(model: object, *_: object, **__: object) -> None:
        opened.append(model)
        raise RuntimeError("not opened")

    monkeypatch.setattr(backend, "select_providers", lambda *_: [(name, {}) for name in names])
    monkeypatch.setattr(backend, "preload_cuda", lambda _: None)
    monkeypatch.setattr(onnxruntime, "InferenceSession", record)
    with pytest.raises(BackendError, match=r"cannot load decode\.onnx: not opened"):
        open_graph(mini_bundle, "decode")
    assert (opened == [str(mini_bundle / "decode.onnx")]) == (len(names) > 1)


@pytest.mark.parametrize(
    ("sets", "exact"),
    [
        (["AVX2"], False),
        (["AVX2", "AVX-512"], False),
        (["AVX2", "AVX-512", "AVX-512 VNNI", "AMX int8"], True),
        (["AVX2", "AVX-VNNI"], True),
        (["AVX2", "AVX-512", "AVX-VNNI"], False),
        ([], False),
    ],
)
def test_slow_exact_products_are_asked_for_where_fast_ones_overflow(
    mini_bundle: Path, monkeypatch: pytest.MonkeyPatch, sets: list[str], exact: bool
) -> None:
    monkeypatch.setattr(backend, "instruction_sets", lambda: sets)
    with open_graph(mini_bundle, "features", device="cpu") as session:
        options = session._session.get_session_options()
    if exact:
        with pytest.raises(RuntimeError, match="x64quantprecision"):
            options.get_session_config_entry("session.x64quantprecision")
    else:
        assert options.get_session_config_entry("session.x64quantprecision") == "1"


def test_binding_gives_what_running_gives(mini_bundle: Path) -> None:
    """The path taken on a GPU, here with the CPU as the bound device."""
    images = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), np.uint8)
    with open_graph(mini_bundle, "encode", device="cpu", threads=1) as session:
        plain = session.run({"images": images})
        session._bound_device = ("cpu", 0)
        bound = session.run({"images": images}, ["latent", "code_indices"])
        assert np.array_equal(bound["latent"], plain["latent"])
        assert np.array_equal(bound["code_indices"], plain["code_indices"])


def test_results_stay_where_they_are_bound(mini_bundle: Path) -> None:
    """The same, with results left in place and fed on by their address."""
    images = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), np.uint8)
    memory = SimpleNamespace(
        active=nullcontext, copy_from_device=lambda array, pointer: ctypes.memmove(array.ctypes.data, pointer, array.nbytes)
    )
    with open_graph(mini_bundle, "encode", threads=1) as encode, open_graph(mini_bundle, "decode", threads=1) as decode:
        expected = encode.run({"images": images})["code_indices"]
        picture = decode.run({"code_indices": expected[1:]})["images"]
        for session in (encode, decode):
            session._bound_device, session._cuda = ("cpu", 0), memory
        kept = encode.run_resident({"images": images}, ["code_indices"])["code_indices"]
        assert isinstance(kept, CudaArray)
        assert np.array_equal(np.asarray(kept), expected)
        assert np.array_equal(decode.run({"code_indices": kept[1:]})["images"], picture)


def test_all_of_a_bound_call_is_on_its_gpu(mini_bundle: Path) -> None:
    """Binding copies to the thread's current GPU, which may be another one."""
    active, steps = [False], []

    @contextmanager
    def make_active():
        active[0] = True
        yield
        active[0] = False

    class Binding:
        def __getattr__(self, name: str):
            return lambda *arguments: steps.append((name, active[0]))

    fake = SimpleNamespace(io_binding=Binding, run_with_iobinding=lambda binding: steps.append(("run", active[0])))
    with open_graph(mini_bundle, "features", device="cpu", threads=1) as session:
        session._bound_device, session._cuda = ("cuda", 1), SimpleNamespace(active=make_active)
        session._run_bound(fake, {"code_indices": np.zeros((1, 30), np.int32)}, ("features",), "cuda")
    assert dict(steps).keys() == {"bind_cpu_input", "bind_output", "run", "synchronize_outputs"}
    assert all(here for _, here in steps)
    assert not active[0]


def test_missing_onnxruntime_says_how_to_install_it(mini_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'tokenflow-sdk\[cpu\]'"):
        open_graph(mini_bundle, "features")


@pytest.mark.parametrize("providers", [("NoSuchExecutionProvider",), ()])
def test_unknown_providers_are_named(mini_bundle: Path, providers: tuple[str, ...]) -> None:
    with pytest.raises(ArgumentError, match="It has: .*CPUExecutionProvider"):
        open_graph(mini_bundle, "features", providers=providers)


def test_providers_override_the_device(mini_bundle: Path) -> None:
    with open_graph(mini_bundle, "features", providers=("CPUExecutionProvider",)) as session:
        assert session.device == "cpu"


@pytest.mark.skipif(HAS_CUDA, reason="this onnxruntime has a CUDA provider")
def test_cuda_without_a_cuda_build_says_what_to_install(mini_bundle: Path) -> None:
    with pytest.raises(BackendError, match=r"no CUDA provider.*tokenflow-sdk\[gpu\]"):
        open_graph(mini_bundle, "features", device="cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_CUDA, reason="onnxruntime has no CUDA provider here")
def test_cuda_agrees_with_the_cpu(mini_bundle: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), np.uint8)
    with open_graph(mini_bundle, "encode", device="cpu") as cpu, open_graph(mini_bundle, "encode", device="cuda") as cuda:
        expected, found = cpu.run({"images": images}), cuda.run({"images": images})
    assert np.abs(expected["latent"] - found["latent"]).max() < 1e-2


def test_a_file_that_is_no_graph_is_named(bundle_copy: Path) -> None:
    entry = Bundle.open(bundle_copy, TokenizerConfig).graph("features")
    (bundle_copy / "features.onnx").write_bytes(b"nonsense")
    with pytest.raises(BackendError, match=r"cannot load features\.onnx"):
        OnnxRuntimeSession(bundle_copy / "features.onnx", entry, SessionOptions())


def test_an_engines_failure_is_a_backend_error(mini_bundle: Path) -> None:
    with open_graph(mini_bundle, "features") as session, pytest.raises(BackendError, match="onnxruntime failed"):
        session._infer({"code_indices": np.zeros((1, 7), np.int32)}, ("features",))


class SoftTimeLimitError(Exception):
    """As an application's signal handler raises it, in the middle of a run."""


@pytest.mark.parametrize("error", [SoftTimeLimitError("0.3 s are over"), MemoryError(), TimeoutError("its own")])
def test_exceptions_of_the_application_pass(mini_bundle: Path, error: Exception) -> None:
    with open_graph(mini_bundle, "features") as session:
        plain = session._session

        class Interrupted:
            def run(self, *_: object) -> None:
                raise error

        session._session = Interrupted()
        with pytest.raises(type(error)) as caught:
            session.run({"code_indices": np.zeros((1, 30), np.int32)})
        assert caught.value is error
        session._session = plain


def test_a_closed_session_says_so(mini_bundle: Path) -> None:
    session = open_graph(mini_bundle, "features")
    session.close()
    session.close()
    with pytest.raises(ArgumentError, match="This session is closed"):
        session.run({"code_indices": np.zeros((1, 30), np.int32)})


def test_an_application_with_an_arena_of_its_own_keeps_it(mini_bundle: Path) -> None:
    script = (
        "import onnxruntime as ort, sys\n"
        "info = ort.OrtMemoryInfo('Cpu', ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)\n"
        "ort.create_and_register_allocator(info, None)\n"
        "from tokenflow_sdk import Tokenizer\n"
        "print(Tokenizer.from_pretrained(sys.argv[1]).load('features').device)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, mini_bundle], capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("cpu\n", 0), done.stderr


def test_importing_the_backend_does_not_import_the_engine() -> None:
    script = f"import sys, {backend.__name__}; sys.exit('onnxruntime' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_onnxruntime_sends_no_telemetry_unless_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    for before, after in ((None, "1"), ("0", "0")):
        with monkeypatch.context() as patch:
            patch.delenv("ORT_DISABLE_TELEMETRY", raising=False)
            if before is not None:
                patch.setenv("ORT_DISABLE_TELEMETRY", before)
            backend.import_onnxruntime()
            assert os.environ["ORT_DISABLE_TELEMETRY"] == after
