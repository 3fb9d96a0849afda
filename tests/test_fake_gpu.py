"""The suite for GPUs is run where there is one, perhaps once. That it runs at all is seen here, on a GPU that is not there."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from tests.conftest import ROOT


@pytest.mark.slow
@pytest.mark.parametrize("words", ["tensorrt-rtx", "not tensorrt-rtx"])
def test_the_suite_for_gpus_runs(words: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.fake_gpu_plugin", "-m", "gpu", "-k", words]
    done = subprocess.run([*command, "tests/test_on_gpu.py"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) >= 12
    assert set(re.findall(r"SKIPPED.*: (.*)", done.stdout)) <= {
        "this onnxruntime has no CUDA provider; install onnxruntime-gpu"
    }
