"""Jobs on Ray. The slow tests start a Ray of their own on this machine."""

from __future__ import annotations

import json
import os
import pickle
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.conftest import ROOT
from tests.support.dataset_jobs import content, fake_tokenizer, write_pictures
from tokenflow_sdk.dataset import ray_runner
from tokenflow_sdk.dataset.inputs import find_shards
from tokenflow_sdk.dataset.job import DoneRecord, Job
from tokenflow_sdk.dataset.job_options import JobOptions
from tokenflow_sdk.dataset.outputs import STATE
from tokenflow_sdk.dataset.progress import Progress
from tokenflow_sdk.dataset.runner import run_local
from tokenflow_sdk.dataset.shard_run import Encoder
from tokenflow_sdk.dataset.storage import Storage
from tokenflow_sdk.errors import MissingPackageError


def begin(inputs: Path, output: Path, mended: bool = False) -> Job:
    options = JobOptions(shard_size=4)
    shards = find_shards([str(inputs)], options.reading)
    with fake_tokenizer() as tokenizer:
        return Job.begin(Storage(str(output)), options, tokenizer.bundle, [str(inputs)], shards, mended)


def test_an_actor_makes_the_shard_of_its_batch_and_says_what_became_of_it(tmp_path: Path) -> None:
    inputs = write_pictures(tmp_path / "in", 10, bad=(1, 9))
    job, right = begin(inputs, tmp_path / "out"), begin(inputs, tmp_path / "right")
    with fake_tokenizer() as tokenizer:
        run_local(right, [Encoder(tokenizer, right.options, 1, 1)], right.shards)
        # As it reaches another process: without the list of shards, which may be long.
        copy = pickle.loads(pickle.dumps(ray_runner._without_shards(job)))  # noqa: S301
        assert copy.shards == []
        actor, progress = ray_runner._Actor(tokenizer, copy, 1, 1), Progress(job.shards, {"read": 1})
        (inputs / "009.png").unlink()
        for shard in job.shards:
            batch = {"shard": [json.dumps(shard.to_json())], "done": [""]}
            row = {name: values[0] for name, values in actor(batch).items()}
            ray_runner._count(job, progress, row)
    assert sorted(job.done) == [0, 1]
    assert [record.rows for record in progress.made] == [4, 4]
    assert [each.shard for each in progress.failed] == [2]
    assert "has changed since" in progress.failed[0].error
    assert progress.stages.seconds["encode"] > 0
    assert begin(write_pictures(inputs, 10, bad=(1, 9)), tmp_path / "out").done.keys() == {0, 1}
    assert content(tmp_path / "out") == {name: content(tmp_path / "right")[name] for name in ("00000.parquet", "00001.parquet")}


def test_an_actor_keeps_good_rows_of_a_shard_that_is_done(tmp_path: Path) -> None:
    inputs = write_pictures(tmp_path / "in", 4, bad=(1,))
    job = begin(inputs, tmp_path / "out")
    with fake_tokenizer() as tokenizer:
        run_local(job, [Encoder(tokenizer, job.options, 1, 1)], job.shards)
        calls = len(tokenizer.graphs.load("encode").calls)  # type: ignore[attr-defined]
        write_pictures(inputs, 4)
        job = begin(inputs, tmp_path / "out", mended=True)
        batch = {"shard": [json.dumps(job.shards[0].to_json())], "done": [ray_runner._as_text(job.done[0])]}
        found = ray_runner._Actor(tokenizer, ray_runner._without_shards(job), 1, 1)(batch)
        assert len(tokenizer.graphs.load("encode").calls) == calls + 1  # type: ignore[attr-defined]
    assert DoneRecord(**json.loads(found["record"][0])).bad == 0


def test_what_nobody_has_thought_of_is_the_shards_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("a bug")

    job = begin(write_pictures(tmp_path / "in", 1), tmp_path / "out")
    monkeypatch.setattr(ray_runner, "run_shard", fail)
    with fake_tokenizer() as tokenizer:
        actor = ray_runner._Actor(tokenizer, ray_runner._without_shards(job), 1, 1)
        assert actor({"shard": [json.dumps(job.shards[0].to_json())], "done": [""]})["error"] == ["RuntimeError: a bug"]
    assert "please report it" in caplog.text


def test_a_ray_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    job = begin(write_pictures(tmp_path / "in", 1), tmp_path / "out")
    with fake_tokenizer() as tokenizer, pytest.raises(MissingPackageError, match=r"Run `pip install 'ray\[data\]'`"):
        ray_runner.run_on_ray(job, tokenizer, job.shards, "auto")


@pytest.fixture
def ray_environment() -> Iterator[dict[str, str]]:
    pytest.importorskip("ray.data", reason="`pip install 'ray[data]'` runs this")
    # Ray's sockets are below it, and the name of a socket must be short.
    directory = tempfile.mkdtemp(prefix="ray")
    own = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_TMPDIR": directory, "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    yield os.environ | own | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    shutil.rmtree(directory, ignore_errors=True)


def actors(job: psutil.Process) -> list[psutil.Process]:
    """Processes of a job that Ray names after its actors."""
    found = []
    for child in job.children(recursive=True):
        try:
            found += [child] if child.cmdline()[:1] and "MapWorker" in child.cmdline()[0] else []
        except psutil.Error:
            continue
    return found


@pytest.mark.slow
def test_an_actor_that_is_killed_in_mid_job_costs_nothing(
    ray_environment: dict[str, str], mini_bundle: Path, tmp_path: Path
) -> None:
    inputs = write_pictures(tmp_path / "in", 1600, bad=(3, 700))
    words = ["tokenize", str(inputs), "--shard-size", "50", "--bundle", str(mini_bundle)]
    command = [sys.executable, "-m", "tokenflow_sdk.cli", *words]
    subprocess.run([*command, "-o", tmp_path / "right"], cwd=ROOT, check=True, capture_output=True)
    process = psutil.Popen(
        [*command, "-o", tmp_path / "out", "--ray", "local", "--json"],
        env=ray_environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        killed: list[int] = []
        deadline = time.monotonic() + 200
        while len(killed) < 2 and process.poll() is None and time.monotonic() < deadline:
            done = len(list((tmp_path / "out" / STATE / "done").glob("*.json")))
            alive = [each for each in actors(process) if each.pid not in killed]
            # One soon, and one later, when another actor or the restarted one works.
            if alive and done >= (2, 8)[len(killed)]:
                os.kill(alive[0].pid, signal.SIGKILL)
                killed.append(alive[0].pid)
            time.sleep(0.02)
        out, errors = process.communicate(timeout=200)
    finally:
        for left in [*process.children(recursive=True), process] if process.is_running() else []:
            left.kill()
    assert process.returncode == 0, errors
    assert len(killed) == 2
    summary = json.loads(out.splitlines()[-1])
    assert (summary["pictures"], summary["failed"], summary["errors"]) == (1600, [], {"CorruptImageError": 2})
    assert content(tmp_path / "out") == content(tmp_path / "right")
