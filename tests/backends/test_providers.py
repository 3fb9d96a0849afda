from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest

from tokenflow_sdk.backends import providers
from tokenflow_sdk.backends.providers import CPU, CUDA, TENSORRT, preload_cuda, require_active, select_providers
from tokenflow_sdk.backends.session import SessionOptions
from tokenflow_sdk.errors import ArgumentError, BackendError

ALL = [TENSORRT, CUDA, CPU]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A driver that can be taken away: `problem`."""
    driver = SimpleNamespace(problem=None)
    monkeypatch.setattr(providers, "driver_problem", lambda: driver.problem)
    return driver


def test_cuda_computes_float32_in_float32(gpu: SimpleNamespace) -> None:
    """TF32 rounds what products read to 10 bits, and is on by default."""
    for options in (SessionOptions(), SessionOptions("cuda"), SessionOptions("cuda:0", (CUDA, CPU))):
        (name, settings), cpu = select_providers(ALL, options)
        assert (name, settings["use_tf32"], settings["device_id"], cpu) == (CUDA, "0", "0", (CPU, {}))
    assert select_providers(ALL, SessionOptions("cuda:2"))[0][1]["device_id"] == "2"
    assert select_providers(ALL, SessionOptions("auto", (TENSORRT, CPU))) == [(TENSORRT, {"device_id": "0"}), (CPU, {})]


def test_cuda_takes_the_memory_and_time_that_it_needs(gpu: SimpleNamespace) -> None:
    """The arena grows by what is asked for, and convolutions are not tried in all ways at each new shape."""
    settings = select_providers(ALL, SessionOptions("cuda"))[0][1]
    assert settings["arena_extend_strategy"] == "kSameAsRequested"
    assert settings["cudnn_conv_algo_search"] == "HEURISTIC"


def test_openvino_is_a_backend_and_no_provider() -> None:
    """The provider ended, and would compute in bfloat16 on recent processors."""
    with pytest.raises(ArgumentError, match=r"ended with 1.24.*backend='openvino'.*tokenflow-sdk\[openvino\]"):
        select_providers([*ALL, "OpenVINOExecutionProvider"], SessionOptions("auto", ("OpenVINOExecutionProvider", CPU)))
    with pytest.raises(ArgumentError, match="device='gpu' is Intel's"):
        select_providers(ALL, SessionOptions("gpu"))


def test_cuda_is_not_tried_without_a_gpu(gpu: SimpleNamespace) -> None:
    gpu.problem = "there is no NVIDIA driver here"
    assert select_providers(ALL, SessionOptions()) == [(CPU, {})]
    assert select_providers(ALL, SessionOptions("cpu")) == [(CPU, {})]
    for options, wish in ((SessionOptions("cuda"), "device='cuda'"), (SessionOptions("auto", (TENSORRT,)), "providers=")):
        with pytest.raises(BackendError, match=f"{wish}.*, but there is no NVIDIA driver here.*nvidia-smi"):
            select_providers(ALL, options)


def test_what_is_not_built_in_is_named(gpu: SimpleNamespace) -> None:
    assert select_providers([CPU], SessionOptions()) == [(CPU, {})]
    with pytest.raises(BackendError, match=r"no CUDA provider.*tokenflow-sdk\[gpu\]"):
        select_providers([CPU], SessionOptions("cuda"))
    with pytest.raises(ArgumentError, match=f"no provider {CUDA} here. It has: {CPU}"):
        select_providers([CPU], SessionOptions("auto", (CUDA, CPU)))


def test_a_provider_that_did_not_start_is_named() -> None:
    require_active([(CUDA, {}), (CPU, {})], [CUDA, CPU])
    with pytest.raises(BackendError, match=rf"could not start {CUDA} .*tokenflow-sdk\[gpu\]"):
        require_active([(CUDA, {}), (CPU, {})], [CPU])


def test_libraries_from_pip_are_loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    ort = SimpleNamespace(preload_dlls=lambda: calls.append(1))
    monkeypatch.setattr(providers, "_preloaded", False)
    monkeypatch.setattr(providers.importlib.util, "find_spec", lambda name: None)
    preload_cuda(ort)
    assert calls == []
    nvidia = ModuleType("nvidia")
    monkeypatch.setitem(sys.modules, "nvidia", nvidia)
    monkeypatch.setattr(providers.importlib.util, "find_spec", lambda name: nvidia)
    preload_cuda(SimpleNamespace())
    preload_cuda(ort)
    preload_cuda(ort)
    assert calls == [1]
