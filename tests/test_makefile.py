"""The targets for GPUs, with a Python that only takes notes in the place of the environment's own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

NOTES = """#!/bin/sh
echo "$TOKENFLOW_NEED_GPU$NVIDIA_TF32_OVERRIDE|$*" >> notes
case "$*" in *"$FAILING"*) exit "$STATUS";; esac
"""


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    python = tmp_path / ".venv-gpu" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(NOTES)
    python.chmod(0o755)
    return tmp_path


def make(
    directory: Path, target: str, failing: str = "nothing", status: int = 0, python: str = sys.executable
) -> tuple[str, bool]:
    """What it printed, and whether it succeeded."""
    words = ["make", target, f"PYTHON={python}"]
    env = {**os.environ, "FAILING": failing, "STATUS": str(status)}
    for name in ("TOKENFLOW_NEED_GPU", "NVIDIA_TF32_OVERRIDE"):
        env.pop(name, None)
    done = subprocess.run(words, cwd=directory, env=env, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr, done.returncode == 0


def notes(directory: Path) -> list[str]:
    return (directory / "notes").read_text().splitlines()


def test_the_environment_is_pinned_and_made_once(directory: Path) -> None:
    _, passed = make(directory, ".venv-gpu/.tensorrt")
    assert passed
    steps = notes(directory)
    assert len(steps) == 4
    assert "uninstall" in steps[1]
    assert steps[2].endswith("onnxruntime-gpu[cuda,cudnn]")
    assert steps[3].endswith("tensorrt")
    assert all("--constraint constraints.txt" in step for step in (steps[0], *steps[2:]))
    make(directory, ".venv-gpu/.tensorrt")
    assert len(notes(directory)) == 4


def test_tensorrt_may_be_out_of_reach_and_is_tried_again(directory: Path) -> None:
    for times in (1, 2):
        printed, passed = make(directory, ".venv-gpu/.tensorrt", failing="constraints.txt tensorrt", status=1)
        assert passed
        assert "tensorrt could not be installed" in printed
        assert len(notes(directory)) == 3 + times


@pytest.mark.parametrize(("failing", "status"), [("nothing", 0), ("not tensorrt-rtx", 3), ("-k tensorrt-rtx", 4)])
def test_both_runs_are_made_and_the_worst_counts(directory: Path, failing: str, status: int) -> None:
    printed, passed = make(directory, "test-gpu", failing, status)
    assert [note for note in notes(directory) if "pytest" in note] == [
        "10|-m pytest -m gpu -k not tensorrt-rtx",
        "10|-m pytest -m gpu -k tensorrt-rtx",
    ]
    assert passed == (status == 0)
    assert status == 0 or f"Error {status}" in printed


@pytest.mark.parametrize("failing", ["nothing", "on_gpu.py --variant", "benchmarks/on_gpu.py"])
def test_all_benchmarks_are_run(directory: Path, failing: str) -> None:
    _, passed = make(directory, "bench-gpu", failing, 2)
    runs = [note for note in notes(directory) if "on_gpu.py" in note]
    assert (len(set(runs)), sum("tensorrt-rtx" in run for run in runs)) == (4, 2)
    assert passed == (failing == "nothing")


def test_an_old_python_is_refused(directory: Path) -> None:
    shutil.rmtree(directory / ".venv-gpu")
    old = directory / "old"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.10.1" && exit\nexit 1\n')
    old.chmod(0o755)
    printed, passed = make(directory, "test-gpu", python=str(old))
    assert not passed
    assert (
        "Python 3.10.1 is too old for the GPU's packages; use Python 3.11 or newer: make PYTHON=python3.12 test-gpu" in printed
    )
