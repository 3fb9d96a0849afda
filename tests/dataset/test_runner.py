from __future__ import annotations

import errno
import io
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.support.dataset_jobs import content, fake_tokenizer, picture, write_pictures
from tests.support.fakes import FakeSession
from tokenflow_sdk import Tokenizer
from tokenflow_sdk.dataset import shard_run
from tokenflow_sdk.dataset.inputs import Row, Shard, find_shards
from tokenflow_sdk.dataset.job import Job
from tokenflow_sdk.dataset.job_lock import Task
from tokenflow_sdk.dataset.job_options import JobOptions
from tokenflow_sdk.dataset.outputs import STATE, Format
from tokenflow_sdk.dataset.progress import Progress, Snapshot
from tokenflow_sdk.dataset.reading import read_records
from tokenflow_sdk.dataset.runner import run_local, shards_to_do, store_summary, summarize
from tokenflow_sdk.dataset.shard_run import Encoder
from tokenflow_sdk.dataset.storage import Storage
from tokenflow_sdk.errors import BackendError, MissingPackageError

FORKS = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")


@pytest.fixture
def fakes() -> Iterator[list[Tokenizer]]:
    with ExitStack() as stack:
        yield [stack.enter_context(fake_tokenizer()) for _ in range(2)]


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("tokenflow")] == []


def run(
    tokenizers: Sequence[Tokenizer],
    inputs: str,
    output: Path,
    size: int = 4,
    task: Task | None = None,
    form: Format = "parquet",
    on_progress: Callable[[Snapshot], None] = lambda seen: None,
    retry: bool = False,
) -> tuple[Job, Progress]:
    options = JobOptions(form, shard_size=size)
    shards = find_shards([inputs], options.reading)
    job = Job.begin(Storage(str(output)), options, tokenizers[0].bundle, [inputs], shards, retry)
    encoders = [Encoder(each, job.options, 1, 2) for each in tokenizers]
    return job, run_local(job, encoders, shards_to_do(job, task, retry), on_progress)


def keys(job: Job) -> list[str]:
    return [row.key for index in sorted(job.done) for row in read_records(job.output, job.file(index))]


def test_every_picture_is_in_the_output_once_and_counts_add_up(fakes: list[Tokenizer], tmp_path: Path) -> None:
    inputs = write_pictures(tmp_path / "in", 30, bad=(0, 13, 29))
    job, progress = run(fakes[:1], str(inputs), tmp_path / "out")
    assert keys(job) == [f"{i:03d}.png" for i in range(30)]
    seen = progress.snapshot()
    assert (seen.pictures, seen.expected, seen.errors, seen.done, seen.failed, seen.shards) == (30, 30, 3, 8, 0, 8)
    summary = summarize(job, progress)
    assert (summary["pictures"], summary["errors"], summary["shards_done"]) == (30, {"CorruptImageError": 3}, 8)
    assert summary["this_run"]["pictures"] == 30
    assert set(summary["this_run"]["stage_seconds"]) == {"read", "prepare", "encode", "write"}
    assert json.loads(job.output.read(store_summary(job, summary))) == summary
    again, progress = run(fakes[:1], str(inputs), tmp_path / "out")
    assert (progress.made, again.done) == ([], job.done)


def test_several_tokenizers_share_the_shards_and_the_output_is_the_same(fakes: list[Tokenizer], tmp_path: Path) -> None:
    inputs = str(write_pictures(tmp_path / "in", 40))
    run(fakes[:1], inputs, tmp_path / "one")
    before = len(fakes[0].graphs.load("encode").calls)  # type: ignore[attr-defined]
    run(fakes, inputs, tmp_path / "two")
    assert content(tmp_path / "one") == content(tmp_path / "two")
    first, second = (len(each.graphs.load("encode").calls) for each in fakes)  # type: ignore[attr-defined]
    assert first - before > 0 < second
    assert first - before + second == 40


def test_tasks_never_overlap_and_together_are_the_whole(fakes: list[Tokenizer], tmp_path: Path) -> None:
    inputs = str(write_pictures(tmp_path / "in", 30))
    run(fakes[:1], inputs, tmp_path / "whole")
    made: list[int] = []
    for number in (2, 3, 1):
        job, progress = run(fakes[:1], inputs, tmp_path / "shared", task=Task(number, 3))
        own = [record.shard for record in progress.made]
        assert all(Task(number, 3).has(index, 8) for index in own)
        made += own
        assert summarize(job, progress, Task(number, 3))["shards_done"] == len(own)
    assert sorted(made) == list(range(8))
    assert content(tmp_path / "shared") == content(tmp_path / "whole")


def tar(path: Path, names: Sequence[str], cut: bool = False) -> None:
    with tarfile.open(path, "w") as archive:
        for i, name in enumerate(names):
            data = picture(i)
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    if cut:
        path.write_bytes(path.read_bytes()[:1500])


def test_a_shard_that_fails_does_not_stop_the_others_and_is_tried_by_the_next_run(
    fakes: list[Tokenizer], tmp_path: Path
) -> None:
    names = [f"{i}.png" for i in range(4)]
    for i in range(4):
        tar(tmp_path / f"{i}.tar", names, cut=i == 1)
    tar(tmp_path / "2.tar", ["a.png", "b.png", "a.jpg", "a.png"])
    pattern = str(tmp_path / "*.tar")
    job, progress = run(fakes[:1], pattern, tmp_path / "out")
    assert sorted(job.done) == [0, 3]
    first, second = sorted(progress.failed, key=lambda each: each.shard)
    assert (first.shard, Path(first.where).name) == (1, "1.tar")
    assert "1.tar ends half-way, or is damaged" in first.error
    assert second.shard == 2
    assert "a.png" in second.error or "key 'a'" in second.error
    assert list(content(tmp_path / "out")) == ["00000.parquet", "00003.parquet"]
    summary = summarize(job, progress)
    assert [each["shard"] for each in sorted(summary["failed"], key=lambda each: each["shard"])] == [1, 2]
    assert progress.snapshot().pictures == 8
    again, progress = run(fakes[:1], pattern, tmp_path / "out")
    assert (sorted(again.done), len(progress.failed)) == ([0, 3], 2)


def test_a_disk_that_is_full_fails_the_shards_that_it_is_full_for(
    fakes: list[Tokenizer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = os.fsync
    calls: list[int] = []

    def full(handle: int) -> None:
        # Of the files that appear: those of two shards, one after the other.
        calls.append(handle)
        if len(calls) in (3, 5):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        plain(handle)

    inputs = str(write_pictures(tmp_path / "in", 20))
    run(fakes[:1], inputs, tmp_path / "right")
    monkeypatch.setattr(os, "fsync", full)
    job, progress = run(fakes[:1], inputs, tmp_path / "out")
    assert len(progress.failed) in (1, 2)
    assert all("No space left on device" in each.error for each in progress.failed)
    assert {record.shard for record in progress.made}.isdisjoint(each.shard for each in progress.failed)
    assert len(job.done) + len(progress.failed) == 5
    run(fakes[:1], inputs, tmp_path / "out")
    assert content(tmp_path / "out") == content(tmp_path / "right")


class Panic(BaseException):
    """As pyo3's."""


@pytest.mark.parametrize("kind", [RuntimeError, Panic])
def test_what_nobody_has_thought_of_fails_its_shard_and_is_logged(
    kind: type[BaseException],
    fakes: list[Tokenizer],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    plain = shard_run.read_shard

    def read(shard: Shard, *arguments: Any, **options: Any) -> Iterator[Row]:
        if shard.index == 1:
            raise kind("a bug")
        return plain(shard, *arguments, **options)

    monkeypatch.setattr(shard_run, "read_shard", read)
    job, progress = run(fakes[:1], str(write_pictures(tmp_path / "in", 12)), tmp_path / "out")
    assert (sorted(job.done), [each.error for each in progress.failed]) == ([0, 2], [f"{kind.__name__}: a bug"])
    assert "please report it" in caplog.text


def test_a_device_that_fails_leaves_the_other_shards_to_the_others(fakes: list[Tokenizer], tmp_path: Path) -> None:
    class Gone(FakeSession):
        def _infer(self, feeds: Any, outputs: tuple[str, ...]) -> Any:
            raise BackendError("The GPU has fallen off the bus.", "Restart the machine.")

    inputs = str(write_pictures(tmp_path / "in", 60))
    with fake_tokenizer(open_session=Gone) as gone:
        job, progress = run([gone, fakes[0]], inputs, tmp_path / "out")
        assert len(job.done) + len(progress.failed) == 15
        assert len(progress.failed) <= 2
        alone, progress = run([gone], inputs, tmp_path / "alone")
    assert (alone.done, len(progress.failed)) == ({}, 15)
    assert sum("fallen off the bus" in each.error for each in progress.failed) == 2
    assert sum("It was not begun" in each.error for each in progress.failed) == 13


def test_a_package_that_is_missing_ends_the_run(
    fakes: list[Tokenizer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*arguments: Any, **options: Any) -> Iterator[Row]:
        raise MissingPackageError("pyarrow is not installed.", "Install it.")

    monkeypatch.setattr(shard_run, "read_shard", read)
    with pytest.raises(MissingPackageError):
        run(fakes, str(write_pictures(tmp_path / "in", 12)), tmp_path / "out")


def test_the_next_shard_is_read_while_the_last_pictures_of_one_are_encoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine has work throughout: the last picture of each shard waits until the first of the next was read."""
    read_next, plain = threading.Event(), shard_run.read_shard
    waited: list[bool] = []

    class LastWaits(FakeSession):
        def _infer(self, feeds: Any, outputs: tuple[str, ...]) -> Any:
            if self.calls and len(self.calls) == 3:
                waited.append(read_next.wait(10))
            return super()._infer(feeds, outputs)

    def read(shard: Shard, *arguments: Any, **options: Any) -> Iterator[Row]:
        for row in plain(shard, *arguments, **options):
            if shard.index == 1:
                read_next.set()
            yield row

    monkeypatch.setattr(shard_run, "read_shard", read)
    with fake_tokenizer(open_session=LastWaits) as tokenizer:
        job, _ = run([tokenizer], str(write_pictures(tmp_path / "in", 8)), tmp_path / "out")
    assert waited[0]
    assert len(job.done) == 2


def test_ctrl_c_ends_at_once_and_leaves_whole_shards_only(fakes: list[Tokenizer], tmp_path: Path) -> None:
    inputs = str(write_pictures(tmp_path / "in", 60))
    run(fakes[:1], inputs, tmp_path / "right")

    def press(seen: Snapshot) -> None:
        if seen.done:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tokenflow_sdk.dataset.runner._POLL", 0.001)
        with pytest.raises(KeyboardInterrupt):
            run(fakes, inputs, tmp_path / "out", on_progress=press)
    found = content(tmp_path / "out")
    assert all(found[name] == content(tmp_path / "right")[name] for name in found)
    done = {path.stem for path in (tmp_path / "out" / STATE / "done").iterdir()}
    assert {Path(name).stem for name in found} == done
    run(fakes, inputs, tmp_path / "out")
    assert content(tmp_path / "out") == content(tmp_path / "right")


@pytest.mark.skipif(os.name == "nt", reason="signals are sent")
def test_ctrl_c_waits_for_calls_of_the_engine_and_what_they_began_is_deleted(tmp_path: Path) -> None:
    pressed = threading.Lock()

    class Slow(FakeSession):
        def _infer(self, feeds: Any, outputs: tuple[str, ...]) -> Any:
            if pressed.acquire(blocking=False):
                os.kill(os.getpid(), signal.SIGINT)
            threading.Event().wait(0.5)
            return super()._infer(feeds, outputs)

    inputs = str(write_pictures(tmp_path / "in", 2))
    with fake_tokenizer(open_session=Slow) as tokenizer:
        with pytest.raises(KeyboardInterrupt):
            run([tokenizer], inputs, tmp_path / "out")
        assert [path.name for path in (tmp_path / "out").iterdir()] == [STATE]


def killed(output: Path, points: Sequence[str], *words: object) -> list[str]:
    """What became of processes that run a job and are killed at points, and of the last one."""
    command = [sys.executable, "-m", "tests.support.dataset_jobs", *points, "--"]
    command += ["tokenize", *map(str, words), "-o", str(output)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return [line.rpartition(" ")[2] for line in done.stdout.splitlines() if line.split(" ")[0] in (*points, "None")]


@FORKS
def test_killed_at_any_moment_the_same_command_goes_on_to_the_same_bytes(fakes: list[Tokenizer], tmp_path: Path) -> None:
    inputs = str(write_pictures(tmp_path / "in", 30, bad=(3, 17)))
    # Tars, because processes start more quickly without pyarrow.
    run(fakes[:1], inputs, tmp_path / "right", form="webdataset")
    # Among the rows of the third shard, and between the file of a shard and its record.
    points = ["row:10", "record:2"]
    assert killed(tmp_path / "out", points, inputs, "--shard-size", 4, "--format", "webdataset") == ["-9", "-9", "0"]
    assert content(tmp_path / "out") == content(tmp_path / "right")


@FORKS
@pytest.mark.slow
@pytest.mark.parametrize("form", ["parquet", "webdataset"])
def test_ten_kills_at_random_moments_change_nothing(form: str, mini_bundle: Path, tmp_path: Path) -> None:
    inputs = write_pictures(tmp_path / "in", 400, bad=(3, 250))
    words = [inputs, "--shard-size", 8, "--format", form, "--bundle", mini_bundle, "--also", "semantic", "--quiet"]
    assert killed(tmp_path / "right", [], *words) == ["0"]
    rng = random.Random(0)
    # By rows first, which leave something to do however fast the machine is, and then by time.
    points = [f"row:{rng.randint(1, 50)}" for _ in range(6)] + [f"after:{rng.uniform(0.2, 2.0):.3f}" for _ in range(4)]
    statuses = killed(tmp_path / "out", points, *words)
    assert statuses[-1] == "0"
    assert statuses.count("-9") >= 5
    assert content(tmp_path / "out") == content(tmp_path / "right")
    job = Job.load(Storage(str(tmp_path / "out")))
    assert keys(job) == [f"{i:03d}.png" for i in range(400)]
