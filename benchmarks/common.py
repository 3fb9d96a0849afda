"""What the benchmarks share: preparing models, measuring memory, describing the machine."""

from __future__ import annotations

import platform
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tokenflow_sdk.backends.cores import processor

ROOT = Path(__file__).resolve().parent.parent


def prepare(variant: str, checkpoint: Path, bundle: Path) -> None:
    """Make the checkpoint, with stand-in weights, and the bundle, if they do not exist."""

    def export(*words: object) -> None:
        subprocess.run([sys.executable, "-m", "tokenflow_export", *map(str, words)], cwd=ROOT, check=True)

    if not checkpoint.exists():
        export("standin", "--variant", variant, "--out", checkpoint)
    if not bundle.exists():
        export("tokenizer", "--checkpoint", checkpoint, "--variant", variant, "--out", bundle)


def random_codes(codebook_size: int, n_codes: int) -> NDArray[np.int32]:
    """Code indices int32 [1, L] of one picture of `n_codes` codes; the same every time."""
    return np.random.default_rng(0).integers(0, codebook_size, (1, n_codes), np.int32)


def peak_resident() -> int:
    """The peak of this process's resident memory in bytes."""
    # Not getrusage, which would include the peak of the parent before this process was executed.
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def watch(command: list[str]) -> dict[str, float]:
    """Run a command, and measure the peaks of its resident memory in bytes: all of it, and without mapped files, whose pages
    the system can drop at any time.

    Raises:
        SystemExit: the command failed.
    """
    process = subprocess.Popen(command, cwd=ROOT)
    peaks, done = {"peak_resident": 0, "peak_anonymous": 0}, threading.Event()

    def sample() -> None:
        while not done.wait(0.2):
            try:
                status = Path(f"/proc/{process.pid}/status").read_text()
            except OSError:
                return
            sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in status.splitlines() if line.endswith("kB")}
            peaks["peak_resident"] = max(peaks["peak_resident"], sizes.get("VmRSS", 0))
            peaks["peak_anonymous"] = max(peaks["peak_anonymous"], sizes.get("RssAnon", 0))

    thread = threading.Thread(target=sample)
    thread.start()
    status = process.wait()
    done.set()
    thread.join()
    if status:
        raise SystemExit(status)
    return dict(peaks)


def machine() -> dict[str, str]:
    """The processor, the system, and the versions of Python, torch and onnxruntime."""
    import onnxruntime
    import torch

    return {
        "cpu": processor(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "onnxruntime": onnxruntime.__version__,
    }
