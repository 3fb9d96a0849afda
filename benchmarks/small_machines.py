"""Measures how little memory and how few cores the runtime needs, under limits that Linux enforces.

Each task runs in a process of its own, in control groups that give it one or more cores and a number of bytes; swap does not
count as memory. A process that needs more is killed by the system, and its row says so. Memory is what the system charges to
the process at most: its own, and the pages of files that it has read, which is why the system's cache of files is dropped
before. Needs to be root, and control groups (version 1 or 2).

    python benchmarks/small_machines.py --bundle tiny
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.common import machine

GROUPS = Path("/sys/fs/cgroup")
NAME = "tokenflow-small-machine"
LIMITS = (
    ("encode", 1, 256),
    ("encode", 1, 512),
    ("encode", 1, 1024),
    ("encode", 1, 2048),
    ("generate", 1, 512),
    ("generate", 1, 1024),
)
"""Tasks, cores, and 2^20 bytes of memory."""
REPEAT = 20


class Groups:
    """Control groups that limit whatever is started in them.

    Args:
        cores: how many processor cores, the first ones.
        limit: bytes of memory.
    """

    def __init__(self, cores: int, limit: int) -> None:
        self.one = (GROUPS / "cgroup.controllers").exists()
        """Whether there is one hierarchy for all controllers (version 2)."""
        parts = [GROUPS] if self.one else [GROUPS / "memory", GROUPS / "cpuset"]
        self.paths = [part / NAME for part in parts]
        if self.one:
            (GROUPS / "cgroup.subtree_control").write_text("+memory +cpuset")
        for path in self.paths:
            path.mkdir(exist_ok=True)
        memory, cpuset = self.paths[0], self.paths[-1]
        (cpuset / "cpuset.cpus").write_text(f"0-{cores - 1}")
        (cpuset / "cpuset.mems").write_text("0")
        (memory / ("memory.max" if self.one else "memory.limit_in_bytes")).write_text(str(limit))
        swap = memory / ("memory.swap.max" if self.one else "memory.memsw.limit_in_bytes")
        with contextlib.suppress(OSError):
            swap.write_text("0" if self.one else str(limit))
        if not self.one:
            (memory / "memory.max_usage_in_bytes").write_text("0")

    def enter(self) -> None:
        """Put this process into the groups."""
        for path in self.paths:
            (path / "cgroup.procs").write_text(str(os.getpid()))

    def peak(self) -> int:
        return int((self.paths[0] / ("memory.peak" if self.one else "memory.max_usage_in_bytes")).read_text())

    def close(self) -> None:
        for path in self.paths:
            for _ in range(50):
                with contextlib.suppress(OSError):
                    path.rmdir()
                    break
                time.sleep(0.1)


@contextlib.contextmanager
def limited(cores: int, limit: int) -> Iterator[Groups]:
    groups = Groups(cores, limit)
    try:
        yield groups
    finally:
        groups.close()


def measure(task: str, bundle: str, cores: int, mebibytes: int) -> dict[str, Any]:
    """Run a task under limits, and report its time and its memory."""
    Path("/proc/sys/vm/drop_caches").write_text("1")
    with limited(cores, mebibytes << 20) as groups:
        command = [sys.executable, __file__, "--bundle", bundle, "--task", task]
        done = subprocess.run(command, preexec_fn=groups.enter, capture_output=True, text=True, check=False)
        row: dict[str, Any] = {"task": task, "cores": cores, "limit_mib": mebibytes}
        if done.returncode == -signal.SIGKILL:
            return row | {"error": "killed: too little memory"}
        if done.returncode:
            return row | {"error": done.stderr.strip().splitlines()[-1]}
        row |= json.loads(done.stdout)
        return row | {"peak_mib": groups.peak() / 2**20}


def run(task: str, bundle: str) -> dict[str, float]:
    """The task itself: seconds to open, and for each call after the first."""
    from tokenflow_sdk import Generator, Tokenizer

    began = time.perf_counter()
    photo = ROOT / "examples" / "chelsea.jpg"
    calls: list[Callable[[], object]]
    if task == "encode":
        model = Tokenizer.from_pretrained(bundle, device="cpu")
        calls = [lambda: model.encode(photo)] * REPEAT
    else:
        generator = Generator.from_pretrained(bundle, device="cpu")
        calls = [lambda: generator.generate("a red apple", seed=0).images] * (REPEAT // 4)
    calls[0]()
    first = time.perf_counter() - began
    began = time.perf_counter()
    for call in calls:
        call()
    return {"first_s": first, "call_s": (time.perf_counter() - began) / len(calls)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", default="tiny", help="default: %(default)s")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--task", choices=("encode", "generate"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.task:
        print(json.dumps(run(arguments.task, arguments.bundle)))
        return
    rows = [measure(task, arguments.bundle, cores, limit) for task, cores, limit in LIMITS]
    for row in rows:
        found = row.get("error") or (
            f"first after {row['first_s']:.2f} s, then {row['call_s'] * 1e3:.0f} ms; {row['peak_mib']:.0f} MiB at most"
        )
        print(f"{row['task']}, {row['cores']} core, {row['limit_mib']} MiB: {found}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine(), "bundle": arguments.bundle, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
