from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from tests.support.dataset_jobs import fake_tokenizer, write_pictures
from tokenflow_sdk.dataset.inputs import find_shards, read_shard
from tokenflow_sdk.dataset.job import Job, JobOptions
from tokenflow_sdk.dataset.outputs import Format, Record
from tokenflow_sdk.dataset.records import read_records
from tokenflow_sdk.dataset.shard_run import Encoder, Stages, run_shard
from tokenflow_sdk.dataset.storage import Storage
from tokenflow_sdk.errors import DatasetError


def same(one: Record, other: Record) -> bool:
    plain = all(getattr(one, f.name) == getattr(other, f.name) for f in fields(Record) if f.name != "extra")
    extras = all(np.array_equal(value, other.extra[name]) and value.dtype == np.float16 for name, value in one.extra.items())
    preparations = [None if each.codes is None else each.codes.preparation for each in (one, other)]
    return plain and extras and one.extra.keys() == other.extra.keys() and preparations[0] == preparations[1]


@pytest.mark.parametrize("form", ["parquet", "webdataset"])
def test_what_is_read_back_is_what_was_written(form: Format, tmp_path: Path) -> None:
    (tmp_path / "in" / "2024.05").mkdir(parents=True)
    write_pictures(tmp_path / "in", 12, bad=(0, 3, 11))
    write_pictures(tmp_path / "in" / "2024.05", 2)
    shards = list(find_shards([str(tmp_path / "in")]))
    with fake_tokenizer() as tokenizer:
        options = JobOptions(form, also=("features",), scales=1)
        job = Job.begin(Storage(str(tmp_path / "out")), options, tokenizer.bundle, ["in"], shards)
        encoder = Encoder(tokenizer, job.options, 1, 1)
        run_shard(encoder, job, shards[0])
        rows = [(row, None) for row in read_shard(shards[0])]
        made = list(encoder.records(rows, Stages()))
    found = list(read_records(job.output, job.file(0)))
    assert len(found) == 14
    assert [record.codes is None for record in found].count(True) == 3
    assert all(same(one, other) for one, other in zip(made, found, strict=True))
    path = tmp_path / "out" / job.file(0)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DatasetError, match=job.file(0)):
        list(read_records(job.output, job.file(0)))
