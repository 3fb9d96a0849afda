from __future__ import annotations

import errno
import os
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from tokenflow_sdk.dataset.job_lock import Task, job_lock
from tokenflow_sdk.dataset.outputs import STATE
from tokenflow_sdk.dataset.storage import Storage
from tokenflow_sdk.errors import ArgumentError, DatasetError, MissingPackageError, OutputError


@pytest.fixture(params=["local", "remote"])
def output(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Storage:
    monkeypatch.setattr("platformdirs.user_cache_path", lambda: tmp_path / "cache")
    return Storage("memory://bucket/codes" if request.param == "remote" else str(tmp_path / "codes"))


def held(output: Storage, stack: ExitStack, task: str | None = None) -> None:
    stack.enter_context(job_lock(output, STATE, None if task is None else Task.parse(task)))


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        (None, None, "Another run writes {} already."),
        (None, "1/2", "Another run writes all of {}."),
        ("2/16", None, "A process with --shard 2/16 writes {}."),
        ("2/16", "2/16", "A process with --shard 2/16 writes {} already."),
        ("2/16", "2/8", "A process with --shard 2/16 writes {}. All tasks of a job are of the same number: give --shard 2/16."),
    ],
)
def test_two_that_would_write_the_same_are_refused_by_name(
    first: str | None, second: str | None, said: str, output: Storage
) -> None:
    with ExitStack() as stack:
        held(output, stack, first)
        with pytest.raises(DatasetError) as caught, ExitStack() as other:
            held(output, other, second)
        assert str(caught.value).startswith(said.format(output.address))
    for again in (second, first):
        with ExitStack() as stack:
            held(output, stack, again)


def test_tasks_of_the_same_number_and_other_outputs_run_beside_each_other(output: Storage) -> None:
    with ExitStack() as stack:
        for number in range(1, 4):
            held(output, stack, f"{number}/3")
        held(Storage(f"{output.address}-other"), stack)


def test_a_directory_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "codes").write_bytes(b"a file")
    with pytest.raises(OutputError, match=r"cannot be written: Not a directory. Choose another -o"), ExitStack() as stack:
        held(Storage(str(tmp_path / "codes")), stack)


@pytest.mark.skipif(sys.platform == "win32", reason="its locks are others")
@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP])
def test_a_file_system_without_locks_is_written_without(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And without the files that other machines could take for locks."""

    def refuse(*arguments: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", refuse)
    for _ in range(2):
        with ExitStack() as stack:
            held(Storage(str(tmp_path / "codes")), stack)
            held(Storage(str(tmp_path / "codes")), stack)
    assert all(path.stat().st_size == 0 for path in tmp_path.rglob("*.lock"))


def test_locks_of_a_bucket_need_no_home_that_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "home").write_bytes(b"")
    monkeypatch.setattr("platformdirs.user_cache_path", lambda: tmp_path / "home" / ".cache")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with ExitStack() as stack:
        held(Storage("memory://bucket/codes"), stack)
        held(Storage("memory://bucket/other"), stack)
        with pytest.raises(DatasetError, match="Another run writes memory://bucket/codes already"):
            held(Storage("memory://bucket/codes"), stack)


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "filelock", None)
    with pytest.raises(MissingPackageError, match=r"filelock is not installed. Run `pip install 'tokenflow-sdk\[dataset\]'`"):
        held(Storage(str(tmp_path / "codes")), ExitStack())


def test_tasks_share_shards_out_without_a_rest() -> None:
    tasks = [Task.parse(f"{number}/3") for number in (1, 2, 3)]
    for shards in (1, 2, 3, 20, 100):
        # In order, so that a directory is walked on from one shard to the next.
        owners = [[task.has(index, shards) for task in tasks].index(True) for index in range(shards)]
        assert owners == sorted(owners)
        assert max(map(owners.count, owners)) - min(map(owners.count, owners)) <= 1
        assert all([task.has(index, shards) for task in tasks].count(True) == 1 for index in range(shards))
    assert str(tasks[1]) == "2/3"
    assert Task.parse("1/1").has(5, 9)


@pytest.mark.parametrize("text", ["", "3", "0/2", "3/2", "-1/2", "1/2/3", "a/b", "1/", "²/3"])
def test_what_is_no_part_of_a_job_is_refused(text: str) -> None:
    with pytest.raises(ArgumentError, match="is no part of a job. Write it as --shard 1/16"):
        Task.parse(text)
