"""The processor, and how many of its cores the process may use: affinity, the container's quota, and `OMP_NUM_THREADS`."""

from __future__ import annotations

import math
import os
import platform
from contextlib import suppress
from pathlib import Path

__all__ = ["available_cores", "instruction_sets", "processor"]

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUP = Path("/proc/self/cgroup")
CPUINFO = Path("/proc/cpuinfo")
_SETS = {
    "avx2": "AVX2", "avx512f": "AVX-512", "avx_vnni": "AVX-VNNI", "avx512_vnni": "AVX-512 VNNI",
    "avx512_bf16": "AVX-512 BF16", "avx512_fp16": "AVX-512 FP16", "amx_int8": "AMX int8", "amx_bf16": "AMX bfloat16",
    "asimddp": "dot product", "i8mm": "int8 matrix product", "bf16": "bfloat16", "sve": "SVE", "sve2": "SVE2",
}  # fmt: skip
"""Names of Linux for the instruction sets that neural networks are computed with, on x86-64 and ARM, and usual names."""


def available_cores() -> int:
    """Number of cores that the process may use, at least 1.

    `OMP_NUM_THREADS` decides where it is set. Else it is the cores of the affinity mask, where the system has one, but no more
    than the CPU quota of the container (cgroup v2 or v1), rounded up: more threads than that are stopped for a part of each
    period.
    """
    wanted = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if wanted.isascii() and wanted.isdecimal() and int(wanted) > 0:
        return int(wanted)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([cores, *(math.ceil(quota) for quota in _quotas())]))


def _quotas() -> list[float]:
    """CPU quotas in cores, of the process's cgroup and of those around it."""
    found = []
    for directory in _cgroups():
        # Version 2: "200000 100000", or "max 100000" without a quota. Version 1: two files, -1 without a quota.
        with suppress(OSError, ValueError, ZeroDivisionError):
            quota, period = (directory / "cpu.max").read_text().split()
            found.append(float(quota) / float(period))
        with suppress(OSError, ValueError, ZeroDivisionError):
            quota, period = ((directory / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
            found.append(float(quota) / float(period))
    return [cores for cores in found if math.isfinite(cores) and cores > 0]


def _cgroups() -> list[Path]:
    """Directories of the process's cgroup and of all around it. In a container the root is usually the container's own."""
    found = {CGROUPS, CGROUPS / "cpu"}
    with suppress(OSError, ValueError):
        for line in OWN_CGROUP.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            root = CGROUPS if not controllers else CGROUPS / "cpu"
            if not controllers or "cpu" in controllers.split(","):
                own = Path(path.lstrip("/"))
                found |= {root / part for part in (own, *own.parents)}
    return sorted(found)


def processor() -> str:
    """The processor's model, as the system names it; else its architecture."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def instruction_sets() -> list[str]:
    """Names of the processor's instruction sets for neural networks, older ones first; empty where the system does not say."""
    flags = (_cpuinfo("flags") or _cpuinfo("Features")).split()
    return [name for flag, name in _SETS.items() if flag in flags]


def _cpuinfo(field: str) -> str:
    """A field of the first processor in `/proc/cpuinfo`; empty if it is not there.

    The file has a part for each core, and is read as far as the field: sessions ask when they open.
    """
    with suppress(OSError), CPUINFO.open() as file:
        for line in file:
            name, _, value = line.partition(":")
            if name.strip() == field:
                return value.strip()
    return ""
