"""How far a run is: counted by the threads that make shards, and read as one snapshot."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter

from tokenflow_sdk.dataset.inputs import Shard
from tokenflow_sdk.dataset.job import DoneRecord, place
from tokenflow_sdk.dataset.shard_run import Stages

__all__ = ["FailedShard", "Progress", "Snapshot"]


@dataclass(frozen=True)
class FailedShard:
    """A shard that was not made, and why."""

    shard: int
    where: str
    error: str

    @classmethod
    def of(cls, shard: Shard, error: str) -> FailedShard:
        """Of a shard, and what is said of it."""
        return cls(shard.index, place(shard), error)


@dataclass(frozen=True)
class Snapshot:
    """How far a run is.

    Attributes:
        pictures: rows that this run has written, those with an error included.
        errors: how many of them have an error.
        shards, done, failed: that this run is to make, has made, and could not make.
        seconds: since it began.
        expected: about how many pictures the run has; None: not known yet.
        bottleneck: the stage that is busiest, for which the others wait; None before the first picture.
    """

    pictures: int
    errors: int
    shards: int
    done: int
    failed: int
    seconds: float
    expected: int | None
    bottleneck: str | None

    @property
    def rate(self) -> float:
        """Pictures a second."""
        return self.pictures / self.seconds if self.seconds else 0.0

    @property
    def left(self) -> float | None:
        """About how many seconds are left; None: not known yet."""
        return None if self.expected is None or not self.rate else max(0, self.expected - self.pictures) / self.rate


class Progress:
    """Counts what a run does. Safe to use from several threads.

    Args:
        shards: that the run is to make.
        threads: how many threads work at each stage, for the bottleneck.
    """

    def __init__(self, shards: Sequence[Shard], threads: Mapping[str, int]) -> None:
        self.stages = Stages()
        self.failed: list[FailedShard] = []
        self.made: list[DoneRecord] = []
        self._count, self._threads = len(shards), dict(threads)
        # Of shards whose number of pictures is known, also because they are made.
        self._known = {shard.index: shard.count for shard in shards if shard.count is not None}
        self._known_pictures = sum(self._known.values())
        self._live: dict[int, tuple[int, int]] = {}
        self._rows = self._bad = 0
        self._began = perf_counter()
        self._lock = threading.Lock()

    def begin(self, shard: int) -> None:
        """A try of a shard begins."""
        with self._lock:
            self._set(shard, 0, 0)

    def row(self, shard: int, bad: bool) -> None:
        """A row of a shard is written."""
        with self._lock:
            rows, errors = self._live.get(shard, (0, 0))
            self._set(shard, rows + 1, errors + bad)

    def done(self, record: DoneRecord) -> None:
        """A shard is made."""
        with self._lock:
            self._set(record.shard, record.rows, record.bad)
            del self._live[record.shard]
            self._known_pictures += record.rows - self._known.get(record.shard, 0)
            self._known[record.shard] = record.rows
            self.made.append(record)

    def fail(self, failed: FailedShard) -> None:
        """A shard cannot be made: its rows do not count."""
        with self._lock:
            self._set(failed.shard, 0, 0)
            del self._live[failed.shard]
            self._known_pictures -= self._known.pop(failed.shard, 0)
            self.failed.append(failed)

    def fail_unseen(self, shards: Iterable[Shard], error: str) -> None:
        """Count shards that were neither made nor failed as failed."""
        seen = {record.shard for record in self.made} | {each.shard for each in self.failed}
        for shard in shards:
            if shard.index not in seen:
                self.fail(FailedShard.of(shard, error))

    def _set(self, shard: int, rows: int, errors: int) -> None:
        before = self._live.get(shard, (0, 0))
        self._rows += rows - before[0]
        self._bad += errors - before[1]
        self._live[shard] = rows, errors

    def snapshot(self) -> Snapshot:
        """How far the run is now."""
        with self._lock:
            seconds = perf_counter() - self._began
            busy = {stage: self.stages.seconds[stage] / threads for stage, threads in self._threads.items()}
            return Snapshot(
                pictures=self._rows,
                errors=self._bad,
                shards=self._count,
                done=len(self.made),
                failed=len(self.failed),
                seconds=seconds,
                expected=self._expected(),
                bottleneck=max(busy, key=lambda stage: busy[stage]) if self._rows else None,
            )

    def _expected(self) -> int | None:
        if not self._known:
            return None
        # Shards that are not known yet are taken for as large as the others.
        return round(self._known_pictures / len(self._known) * (self._count - len(self.failed)))
