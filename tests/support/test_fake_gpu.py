"""The suite for GPUs is run where there is one, perhaps once. That it runs at all is seen here, on a GPU that is not there."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from tests.conftest import ROOT


@pytest.mark.slow
@pytest.mark.parametrize("words", ["tensorrt-rtx", "not tensorrt-rtx"])
def test_the_suite_for_gpus_runs(words: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.support.fake_gpu_plugin", "-m", "gpu", "-k", words]
    env = {**os.environ, "TOKENFLOW_TEST_SHARE": "10"}
    done = subprocess.run([*command, "tests/test_on_gpu.py"], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) >= 12
    assert set(re.findall(r"SKIPPED.*: (.*)", done.stdout)) <= {
        "this onnxruntime has no CUDA provider; install onnxruntime-gpu"
    }


@pytest.mark.slow
@pytest.mark.parametrize("needed", [False, True])
def test_a_gpu_that_is_missing_is_a_failure_where_it_is_needed(needed: bool) -> None:
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "TOKENFLOW_NEED_GPU": "1" if needed else ""}
    command = [sys.executable, "-m", "pytest", "-q", "-k", "memory_that_is_not_there", "tests/test_on_gpu.py"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == int(needed), done.stdout[-3000:]
    # With what mends it.
    assert re.search(r"no usable GPU here.*device='cpu'|pip install cuda-bindings", done.stdout)
