"""Runs a job on this machine: two shards at once on each tokenizer, so that its engine has work where one shard ends."""

from __future__ import annotations

import json
import logging
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from tokenflow_sdk.dataset.inputs import Shard
from tokenflow_sdk.dataset.job import Job
from tokenflow_sdk.dataset.job_lock import Task
from tokenflow_sdk.dataset.outputs import STATE, Record
from tokenflow_sdk.dataset.progress import FailedShard, Progress, Snapshot
from tokenflow_sdk.dataset.shard_run import Encoder, ShardStopped, Watch, run_shard
from tokenflow_sdk.errors import BackendError, MissingPackageError, TokenFlowError

__all__ = ["run_local", "shards_of", "shards_to_do", "store_summary", "summarize"]

_logger = logging.getLogger("tokenflow_sdk")
_POLL = 0.2
"""Seconds between looks at how far it is, and at most before Ctrl-C is seen."""


def shards_of(job: Job, task: Task | None) -> list[Shard]:
    """The shards of a task; None: all."""
    return [shard for shard in job.shards if task is None or task.has(shard.index, len(job.shards))]


def shards_to_do(job: Job, task: Task | None = None, retry_errors: bool = False) -> list[Shard]:
    """The shards that a run makes: those of its task that are not done, or of which a storage did not give all pictures.

    With `retry_errors` also those that have rows with another error.
    """
    return [
        shard
        for shard in shards_of(job, task)
        if (record := job.done.get(shard.index)) is None or record.not_given or (retry_errors and record.bad)
    ]


def run_local(
    job: Job,
    encoders: Sequence[Encoder],
    shards: Sequence[Shard],
    on_progress: Callable[[Snapshot], None] = lambda snapshot: None,
) -> Progress:
    """Make shards. One that fails does not stop the others.

    Args:
        job: whose shards they are.
        encoders: one for each device.
        shards: to make; of those that are done, the rows without an error stay.
        on_progress: called a few times a second.

    Raises:
        MissingPackageError: a package is not installed, which no shard can do without.
        KeyboardInterrupt: shards in the making are given up, and what they wrote is deleted.
    """
    workers, lanes = sum(each.workers or each.lanes for each in encoders), sum(each.lanes for each in encoders)
    progress = Progress(shards, {"read": len(encoders), "prepare": workers, "encode": lanes, "write": len(encoders)})
    run = _Run(job, shards, progress)
    threads = []
    for encoder in encoders:
        turn = threading.Lock()
        threads += [
            threading.Thread(target=run.work, args=(encoder, turn), name=f"tokenflow-shard-{i}", daemon=True) for i in range(2)
        ]
    run.working, ended = len(threads), False
    try:
        for thread in threads:
            thread.start()
        while not ended:
            # Not `join`: up to Python 3.12, an interrupted one takes its thread for ended.
            ended = run.ended.wait(_POLL)
            on_progress(progress.snapshot())
    finally:
        run.stop.set()
        for thread in threads:
            if thread.ident is not None:
                thread.join()
    if run.fatal is not None:
        raise run.fatal
    progress.fail_unseen(shards, "It was not begun, because the device failed at others.")
    return progress


class _Run:
    """What the threads of a run share."""

    def __init__(self, job: Job, shards: Sequence[Shard], progress: Progress) -> None:
        self.job, self.progress = job, progress
        self.stop, self.ended, self.working = threading.Event(), threading.Event(), 0
        self.fatal: BaseException | None = None
        self._shards, self._lock = iter(shards), threading.Lock()

    def work(self, encoder: Encoder, turn: threading.Lock) -> None:
        """Make one shard after the other, until the encoder fails. The last thread to end says so."""
        try:
            self._make_shards(encoder, turn)
        finally:
            with self._lock:
                self.working -= 1
            if not self.working:
                self.ended.set()

    def _make_shards(self, encoder: Encoder, turn: threading.Lock) -> None:
        """The thread that has the turn reads; the other encodes the end of its shard."""
        while True:
            watch = _Turn(self, turn)
            try:
                with self._lock:
                    shard = None if self.stop.is_set() else next(self._shards, None)
                if shard is None:
                    return
                watch.shard = shard.index
                if not self._make(encoder, shard, watch):
                    return
            except ShardStopped:
                return
            finally:
                watch.idle()

    def _make(self, encoder: Encoder, shard: Shard, watch: _Turn) -> bool:
        """Make a shard. Returns whether the encoder can make others."""
        try:
            self.progress.done(run_shard(encoder, self.job, shard, watch))
        except MissingPackageError as error:
            self.fatal = error
            self.stop.set()
        except (TokenFlowError, OSError) as error:
            self.progress.fail(FailedShard.of(shard, str(error)))
            # Of a device that has gone all other shards would fail as well.
            return not isinstance(error, BackendError)
        except ShardStopped:
            raise
        except BaseException as error:  # panics of Rust's libraries are no Exceptions
            _logger.exception("Shard %05d failed in a way that nobody has thought of; please report it.", shard.index)
            self.progress.fail(FailedShard.of(shard, f"{type(error).__name__}: {error}"))
        return True


class _Turn(Watch):
    """Counts a shard's rows, and holds the turn to read from its beginning until it reads no more."""

    def __init__(self, run: _Run, turn: threading.Lock) -> None:
        super().__init__(run.stop, run.progress.stages)
        self.shard = -1
        self._progress, self._turn = run.progress, turn
        turn.acquire()
        self._held = True

    def begun(self) -> None:
        if not self._held:
            self._turn.acquire()
            self._held = True
        self._progress.begin(self.shard)

    def wrote(self, record: Record) -> None:
        self._progress.row(self.shard, record.error is not None)

    def idle(self) -> None:
        if self._held:
            self._held = False
            self._turn.release()


def summarize(job: Job, progress: Progress, task: Task | None = None) -> dict[str, Any]:
    """What a run did and how far the job is, as stored in `summary.json` beside its state."""
    mine = shards_of(job, task)
    records = [job.done[shard.index] for shard in mine if shard.index in job.done]
    errors = sum((Counter(record.errors) for record in records), Counter[str]())
    seen = progress.snapshot()
    return {
        "output": job.output.address,
        "task": None if task is None else str(task),
        "shards": len(mine),
        "shards_done": len(records),
        "pictures": sum(record.rows for record in records),
        "errors": dict(sorted(errors.items())),
        "failed": [{"shard": each.shard, "where": each.where, "error": each.error} for each in progress.failed],
        "this_run": {
            "shards": seen.done,
            "pictures": seen.pictures,
            "seconds": round(seen.seconds, 3),
            "pictures_per_second": round(seen.rate, 3),
            "stage_seconds": {stage: round(value, 3) for stage, value in progress.stages.seconds.items()},
            "bottleneck": seen.bottleneck,
        },
    }


def store_summary(job: Job, summary: dict[str, Any], task: Task | None = None) -> str:
    """Write it beside the job's state. Returns its name there. Raises OutputError, StorageError."""
    name = f"{STATE}/summary.json" if task is None else f"{STATE}/summary-{task.number}-of-{task.total}.json"
    job.output.write(name, json.dumps(summary, indent=2).encode())
    return name
