from __future__ import annotations

from pathlib import Path

import pytest

from tokenflow_sdk.backends.session import SessionOptions
from tokenflow_sdk.engines.build_config import BuildConfig
from tokenflow_sdk.engines.options import BACKENDS, RuntimeOptions
from tokenflow_sdk.errors import ArgumentError

CPU = BuildConfig("onnxruntime", precision="fp32", batch=(1, 1, 1))


def test_without_a_word_everything_is_left_to_the_machine() -> None:
    options = RuntimeOptions()
    assert (options.device, options.backend, options.build_config, options.build) == ("auto", "auto", None, True)
    assert not options.wants_onnxruntime()
    assert options.session == SessionOptions()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"device": "tpu"}, "no device 'tpu'.*'auto', 'cpu', 'cuda' or 'cuda:N'"),
        ({"device": "gpu"}, "device='gpu' is Intel's.*backend='openvino'.*device='cuda'"),
        ({"device": "npu", "backend": "onnxruntime"}, "device='npu' is Intel's.*backend='openvino'"),
        ({"device": "cuda:1", "backend": "openvino"}, "device='cuda:1' is an NVIDIA GPU"),
        ({"providers": ["CPUExecutionProvider"], "backend": "openvino"}, "providers= is not for backend='openvino'"),
        ({"build_config": "cpu", "backend": "openvino"}, "build_config= is not for backend='openvino'"),
        ({"device": "cuda:x"}, "no device 'cuda:x'"),
        ({"device": "cpu:1"}, "no device 'cpu:1'"),
        ({"device": "cuda:-1"}, "no device 'cuda:-1'"),
        ({"threads": 0}, "threads=0 cannot run anything"),
        ({"threads": "2"}, "threads='2' cannot run anything"),
        ({"device": None}, "no device None"),
        ({"providers": "CPUExecutionProvider"}, r"'CPUExecutionProvider' is one name.*providers=\['CPUExecutionProvider'\]"),
        ({"execution_contexts": "2"}, "execution_contexts='2' runs nothing"),
        ({"backend": "tvm"}, "no backend 'tvm'. Choose one of: auto, onnxruntime, openvino, tensorrt, tensorrt-rtx"),
        ({"execution_contexts": 0}, "execution_contexts=0 runs nothing"),
        ({"serve_while_building": True}, "serve_while_building=True builds TensorRT engines.*build=True"),
        ({"serve_while_building": True, "backend": "onnxruntime"}, "serve_while_building=True"),
        ({"serve_while_building": True, "backend": "tensorrt", "build": False}, "serve_while_building=True"),
    ],
)
def test_options_that_cannot_work_are_named(values: dict, words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        RuntimeOptions(**values)


def test_engines_may_be_built_while_serving() -> None:
    for backend in ("tensorrt", "tensorrt-rtx"):
        assert RuntimeOptions(backend=backend, serve_while_building=True).backend == backend


def test_sessions_take_device_providers_and_threads() -> None:
    options = RuntimeOptions(device="cuda:1", providers=("A", "B"), threads=2)
    assert options.session == SessionOptions("cuda:1", ("A", "B"), 2)


@pytest.mark.parametrize(("device", "index"), [("auto", 0), ("cpu", 0), ("cuda", 0), ("cuda:0", 0), ("cuda:3", 3)])
def test_the_number_of_the_gpu(device: str, index: int) -> None:
    assert RuntimeOptions(device=device).device_index == index


def test_a_build_config_is_given_or_read(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text('precision = "fp32"\n')
    given = BuildConfig(batch=(1, 2, 3))
    assert RuntimeOptions().loaded_build_config() is None
    assert RuntimeOptions(build_config=given).loaded_build_config() is given
    assert RuntimeOptions(build_config=str(tmp_path / "mine.toml")).loaded_build_config() == BuildConfig(precision="fp32")
    assert RuntimeOptions(build_config="cpu").loaded_build_config() == CPU
    unknown = RuntimeOptions(build_config="abacus")
    for use in (unknown.loaded_build_config, unknown.wants_onnxruntime):
        with pytest.raises(ArgumentError, match="no build config 'abacus'"):
            use()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("build_config", [None, BuildConfig(), CPU, "cpu"])
def test_onnxruntime_is_wanted_by_name_or_by_a_build_config_for_cpus(
    backend: str, build_config: BuildConfig | str | None
) -> None:
    if backend == "openvino" and build_config is not None:
        with pytest.raises(ArgumentError, match="build_config= is not for backend='openvino'"):
            RuntimeOptions(backend=backend, build_config=build_config)
        return
    options = RuntimeOptions(backend=backend, build_config=build_config)
    for_cpus = build_config in (CPU, "cpu")
    if for_cpus and backend.startswith("tensorrt"):
        with pytest.raises(ArgumentError, match=f"for onnxruntime, not for {backend}. Leave backend= or build_config= out"):
            options.wants_onnxruntime()
    elif build_config == BuildConfig() and backend == "onnxruntime":
        with pytest.raises(
            ArgumentError, match="with backend='onnxruntime' none run. Leave build_config= or backend='onnxruntime'"
        ):
            options.wants_onnxruntime()
    else:
        assert options.wants_onnxruntime() == (for_cpus or backend == "onnxruntime")


@pytest.mark.parametrize(
    ("values", "words"), [({"device": "cpu"}, "device='cpu'"), ({"providers": ["CPUExecutionProvider"]}, "providers=")]
)
def test_a_build_config_is_refused_where_no_engine_can_run(values: dict, words: str) -> None:
    assert not RuntimeOptions(**values).wants_onnxruntime()
    with pytest.raises(
        ArgumentError, match=f"for TensorRT engines, and with {words} none run. Leave build_config= or {words} out"
    ):
        RuntimeOptions(build_config="rtx4090", **values).wants_onnxruntime()
    assert RuntimeOptions(build_config="cpu", **values).wants_onnxruntime()
