"""A plugin of pytest (`-p tests.support.fake_gpu_plugin`): its GPU and its TensorRTs under a whole run."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec

import pytest

from tests.support.fake_gpu import install


def pytest_configure(config: pytest.Config) -> None:
    cuda, _ = install(pytest.MonkeyPatch())
    cuda.gpus = 2
    for name in ("tensorrt", "tensorrt_rtx"):
        sys.modules[name].__spec__ = ModuleSpec(name, None)
