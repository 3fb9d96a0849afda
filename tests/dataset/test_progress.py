from __future__ import annotations

import pytest

from tokenflow_sdk.dataset.inputs import Shard
from tokenflow_sdk.dataset.job import DoneRecord
from tokenflow_sdk.dataset.progress import FailedShard, Progress

SHARDS = [Shard(i, "tar", f"/{i}.tar", "f" * 64, count=count) for i, count in enumerate((10, 20, None, 40))]


def rows(progress: Progress, shard: int, count: int, bad: int = 0) -> None:
    for i in range(count):
        progress.row(shard, i < bad)


def test_rows_count_once_however_often_a_shard_is_tried() -> None:
    progress = Progress(SHARDS, {"read": 1, "encode": 2})
    progress.begin(0)
    rows(progress, 0, 7, 2)
    assert (progress.snapshot().pictures, progress.snapshot().errors) == (7, 2)
    progress.begin(0)
    rows(progress, 0, 3, 1)
    progress.begin(1)
    rows(progress, 1, 5)
    assert (progress.snapshot().pictures, progress.snapshot().errors) == (8, 1)
    progress.done(DoneRecord(0, 1, "", 10, {"CorruptImageError": 1}))
    progress.fail(FailedShard.of(SHARDS[1], "it is cut"))
    seen = progress.snapshot()
    assert (seen.pictures, seen.errors, seen.done, seen.failed, seen.shards) == (10, 1, 1, 1, 4)
    assert progress.failed == [FailedShard(1, "/1.tar", "it is cut")]


def test_shards_that_nothing_is_known_of_count_as_failed() -> None:
    progress = Progress(SHARDS, {"read": 1})
    progress.done(DoneRecord(0, 1, "", 10))
    progress.fail(FailedShard.of(SHARDS[1], "it is cut"))
    progress.fail_unseen(SHARDS, "not begun")
    assert [(each.shard, each.error) for each in progress.failed] == [(1, "it is cut"), (2, "not begun"), (3, "not begun")]


def test_what_is_left_is_of_the_shards_that_are_known() -> None:
    progress = Progress(SHARDS, {"read": 1, "encode": 2})
    assert progress.snapshot().expected == round(70 / 3 * 4)
    assert progress.snapshot().left is None
    progress.begin(2)
    rows(progress, 2, 50)
    progress.done(DoneRecord(2, 1, "", 50))
    assert progress.snapshot().expected == 120
    assert progress.snapshot().left == pytest.approx(70 * progress.snapshot().seconds / 50, rel=0.5)
    progress.begin(3)
    progress.fail(FailedShard.of(SHARDS[3], "it is cut"))
    assert progress.snapshot().expected == 80
    assert Progress([SHARDS[2]], {"read": 1}).snapshot().expected is None


def test_the_stage_that_is_busiest_for_its_threads_is_the_bottleneck() -> None:
    progress = Progress(SHARDS, {"read": 1, "prepare": 4, "encode": 2, "write": 1})
    progress.begin(0)
    assert progress.snapshot().bottleneck is None
    rows(progress, 0, 1)
    for stage, seconds in (("read", 1.0), ("prepare", 8.0), ("encode", 5.0), ("write", 2.0)):
        progress.stages.seconds[stage] = seconds
    assert progress.snapshot().bottleneck == "encode"
