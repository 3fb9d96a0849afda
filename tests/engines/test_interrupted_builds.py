"""Builds by the real TensorRT-RTX that are interrupted, killed, or left behind by their program."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tokenflow_sdk.bundle.bundle import Bundle, find_bundle
from tokenflow_sdk.bundle.model_config import TokenizerConfig
from tokenflow_sdk.engines.build_config import BuildConfig
from tokenflow_sdk.engines.cache import EngineCache
from tokenflow_sdk.engines.jobs import engine_jobs


@pytest.fixture(scope="module")
def trt():
    return pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is for Linux and Windows on x86-64")


BUILD = """
import signal, sys
# A shell's background jobs ignore Ctrl-C, and so would the build.
signal.signal(signal.SIGINT, signal.default_int_handler)
from pathlib import Path
from tokenflow_sdk.bundle.bundle import Bundle, find_bundle
from tokenflow_sdk.bundle.model_config import TokenizerConfig
from tokenflow_sdk.engines.cache import EngineCache
from tokenflow_sdk.engines.jobs import engine_jobs
from tokenflow_sdk.engines.build_config import BuildConfig
from tokenflow_sdk.backends.tensorrt_module import import_tensorrt
bundle = Bundle.open(find_bundle("tiny", "tokenizer"), TokenizerConfig)
trt = import_tensorrt("tensorrt-rtx")
job = next(job for job in engine_jobs(bundle, BuildConfig(targets=("sm86",)), trt) if job.key.graph == "decode")
cache = EngineCache(Path(sys.argv[1]))
def begun(name, share):
    print("building", flush=True)
"""
"""The real builder at work on a graph that takes it seconds."""


def stop(script: str, directory: Path, number: int | None) -> tuple[int, str]:
    """Run a script in a process, send it a signal as soon as the build makes progress; its status, and what it said at last."""
    command = [sys.executable, "-c", BUILD + script, str(directory)]
    environment = os.environ | {"TMPDIR": str(directory.parent)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, text=True, **pipes)  # type: ignore[call-overload]
    assert process.stdout.readline() == "building\n"
    if number is not None:
        process.send_signal(number)
    said = process.communicate(timeout=120)[1]
    return process.returncode, said


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_a_build_can_be_interrupted(trt, tmp_path: Path) -> None:
    """TensorRT swallows the KeyboardInterrupt of a callback and would build on."""
    cache = tmp_path / "cache"
    status, said = stop("job.run(trt, cache, begun)", cache, signal.SIGINT)
    assert status == -signal.SIGINT
    assert said.endswith("KeyboardInterrupt\n")
    assert list(cache.glob("*.engine")) == []
    assert list(tmp_path.iterdir()) == [cache]


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_a_build_that_is_killed_leaves_a_cache_that_works(trt, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    assert stop("job.run(trt, cache, begun)", cache, signal.SIGKILL)[0] == -signal.SIGKILL
    assert list(cache.glob("*.engine")) == []
    bundle = Bundle.open(find_bundle("tiny", "tokenizer"), TokenizerConfig)
    jobs = {job.key.graph: job for job in engine_jobs(bundle, BuildConfig(targets=("sm86",)), trt)}
    assert jobs["decode"].run(trt, EngineCache(cache))[1]
    assert EngineCache(cache).get(jobs["decode"].key) is not None


def test_a_program_does_not_wait_for_a_build_behind_it(trt, tmp_path: Path) -> None:
    """It ends while engines are being built on a thread: the build is given up, and nothing is torn off inside TensorRT."""
    script = """
import threading
from tokenflow_sdk.engines.hot_swap import EngineSwap
started = threading.Event()
swap = EngineSwap(lambda: job.run(trt, cache, lambda name, share: started.set()), lambda: None)
started.wait()
print("building", flush=True)
"""
    assert stop(script, tmp_path / "cache", None)[0] == 0
    assert list((tmp_path / "cache").glob("*.engine")) == []
