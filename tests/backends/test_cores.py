from __future__ import annotations

import os
import platform
from pathlib import Path

import pytest

from tokenflow_sdk.backends import cores
from tokenflow_sdk.backends.cores import available_cores, instruction_sets, processor


@pytest.fixture
def cgroups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Eight cores, no quota, and nothing in the environment."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(cores, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(cores, "OWN_CGROUP", tmp_path / "own")
    (tmp_path / "cgroup" / "cpu" / "a" / "b").mkdir(parents=True)
    (tmp_path / "cgroup" / "a" / "b").mkdir(parents=True)
    return tmp_path / "cgroup"


def test_without_a_quota_the_affinity_counts(cgroups: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert available_cores() == 8
    (cgroups / "cpu.max").write_text("max 100000\n")
    (cgroups / "cpu" / "cpu.cfs_quota_us").write_text("-1\n")
    (cgroups / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    assert available_cores() == 8
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert available_cores() == 1


@pytest.mark.parametrize(
    ("quota", "expected"), [("200000 100000", 2), ("150000 100000", 2), ("10000 100000", 1), ("9e9 100000", 8)]
)
def test_the_quota_of_a_container_counts(cgroups: Path, quota: str, expected: int) -> None:
    (cgroups / "cpu.max").write_text(quota + "\n")
    assert available_cores() == expected


def test_the_smallest_quota_of_the_cgroups_around_the_process_counts(cgroups: Path) -> None:
    (cgroups.parent / "own").write_text("0::/a/b\n")
    (cgroups / "a" / "cpu.max").write_text("300000 100000")
    (cgroups / "a" / "b" / "cpu.max").write_text("500000 100000")
    assert available_cores() == 3


def test_version_1_has_two_files(cgroups: Path) -> None:
    (cgroups.parent / "own").write_text("5:cpu,cpuacct:/a\n4:memory:/elsewhere\n")
    (cgroups / "cpu" / "a" / "cpu.cfs_quota_us").write_text("400000")
    (cgroups / "cpu" / "a" / "cpu.cfs_period_us").write_text("100000")
    assert available_cores() == 4


@pytest.mark.parametrize("text", ["", "what", "0 0", "-1 100000", "nan 1", "1"])
def test_what_cannot_be_read_as_a_quota_is_none(cgroups: Path, text: str) -> None:
    (cgroups / "cpu.max").write_text(text)
    (cgroups.parent / "own").write_text("not a cgroup\n" if text else "")
    assert available_cores() == 8


@pytest.mark.parametrize(
    ("value", "expected"), [("3", 3), ("3,2", 3), (" 5 ", 5), ("0", 8), ("-1", 8), ("", 8), ("all", 8), ("²", 8)]
)
def test_the_environment_decides(cgroups: Path, monkeypatch: pytest.MonkeyPatch, value: str, expected: int) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    assert available_cores() == expected


@pytest.mark.parametrize(
    ("text", "name", "sets"),
    [
        ("model name\t: A CPU\nflags\t\t: fpu avx2 avx512f avx512_vnni\n", "A CPU", ["AVX2", "AVX-512", "AVX-512 VNNI"]),
        ("processor\t: 0\nFeatures\t: fp asimd asimddp i8mm\n", None, ["dot product", "int8 matrix product"]),
        ("", None, []),
    ],
)
def test_the_processor_and_its_instruction_sets(
    text: str, name: str | None, sets: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(cores, "CPUINFO", tmp_path / "cpuinfo")
    assert processor() == (name or platform.processor() or platform.machine())
    assert instruction_sets() == sets
