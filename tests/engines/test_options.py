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
    assert options.wanted() == "auto"
    assert options.session == SessionOptions()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"device": "tpu"}, "no device 'tpu'.*'auto', 'cpu', 'cuda' or 'cuda:N'"),
        ({"device": "gpu"}, "device='gpu' is Intel's.*backend='openvino'.*device='cuda'"),
        ({"device": "npu", "backend": "onnxruntime"}, "device='npu' is Intel's.*backend='openvino'"),
        ({"device": "cuda:1", "backend": "openvino"}, "device='cuda:1' is an NVIDIA GPU"),
        ({"providers": ["CPUExecutionProvider"], "backend": "openvino"}, "providers= is not for backend='openvino'"),
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
    for use in (unknown.loaded_build_config, unknown.wanted):
        with pytest.raises(ArgumentError, match="no build config 'abacus'"):
            use()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("build_config", [None, BuildConfig(), CPU, "cpu", "cpu-bf16"])
def test_a_backend_is_wanted_by_name_or_by_a_build_config_for_cpus(
    backend: str, build_config: BuildConfig | str | None
) -> None:
    options = RuntimeOptions(backend=backend, build_config=build_config)
    config = options.loaded_build_config()
    wanted = config.backend if config is not None and config.backend in ("onnxruntime", "openvino") else None
    if wanted is not None and backend not in ("auto", wanted):
        with pytest.raises(ArgumentError, match=f"for {wanted}, not for {backend}. Leave backend= or build_config= out"):
            options.wanted()
    elif config == BuildConfig() and backend in ("onnxruntime", "openvino"):
        with pytest.raises(
            ArgumentError, match=f"with backend='{backend}' none run. Leave build_config= or backend='{backend}'"
        ):
            options.wanted()
    else:
        assert options.wanted() == (wanted or backend)


@pytest.mark.parametrize("values", [{"device": "cuda"}, {"providers": ["CPUExecutionProvider"]}])
def test_a_build_config_for_openvino_is_for_the_cpu(values: dict) -> None:
    option = f"{next(iter(values))}="
    with pytest.raises(
        ArgumentError, match=f"OpenVINO on a CPU, and {option} names something else. Leave build_config= or {option}"
    ):
        RuntimeOptions(build_config="cpu-bf16", **values).wanted()


@pytest.mark.parametrize(
    ("values", "words"), [({"device": "cpu"}, "device='cpu'"), ({"providers": ["CPUExecutionProvider"]}, "providers=")]
)
def test_a_build_config_is_refused_where_no_engine_can_run(values: dict, words: str) -> None:
    assert RuntimeOptions(**values).wanted() == "auto"
    with pytest.raises(
        ArgumentError, match=f"for TensorRT engines, and with {words} none run. Leave build_config= or {words} out"
    ):
        RuntimeOptions(build_config="rtx4090", **values).wanted()
    assert RuntimeOptions(build_config="cpu", **values).wanted()
