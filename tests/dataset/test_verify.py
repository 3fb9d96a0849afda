from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.support.dataset_jobs import fake_tokenizer, picture, write_pictures
from tokenflow_sdk import Tokenizer
from tokenflow_sdk.dataset.inputs import find_shards
from tokenflow_sdk.dataset.job import Job
from tokenflow_sdk.dataset.job_options import JobOptions
from tokenflow_sdk.dataset.outputs import STATE, open_writer
from tokenflow_sdk.dataset.reading import read_records
from tokenflow_sdk.dataset.runner import run_local
from tokenflow_sdk.dataset.shard_run import Encoder
from tokenflow_sdk.dataset.storage import Storage
from tokenflow_sdk.dataset.verify import VerifyReport, verify_job
from tokenflow_sdk.errors import DatasetError
from tokenflow_sdk.files import file_sha256


@pytest.fixture
def fake() -> Iterator[Tokenizer]:
    with fake_tokenizer() as tokenizer:
        yield tokenizer


@pytest.fixture
def output(fake: Tokenizer, tmp_path: Path) -> Path:
    inputs, options = str(write_pictures(tmp_path / "in", 12, bad=(2, 7))), JobOptions(shard_size=4, also=("features",))
    job = Job.begin(Storage(str(tmp_path / "out")), options, fake.bundle, [inputs], find_shards([inputs], options.reading))
    run_local(job, [Encoder(fake, job.options, 1, 1)], job.shards)
    return tmp_path / "out"


@pytest.fixture
def verified(fake: Tokenizer, output: Path) -> Callable[[], VerifyReport]:
    return lambda: verify_job(Job.load(Storage(str(output))), fake)


def test_what_is_whole_and_equal_has_no_problems(verified: Callable[[], VerifyReport], output: Path) -> None:
    report = verified()
    assert report == VerifyReport(str(output), 3, 12, 2, 12, ())
    assert report.sentence() == (f"{output}  12 pictures in 3 shards, 2 with an error, 12 encoded again: complete and equal")


def test_a_shard_that_is_missing_is_found(verified: Callable[[], VerifyReport], output: Path) -> None:
    (output / "00001.parquet").unlink()
    (output / STATE / "done" / "00002.json").unlink()
    report = verified()
    assert [problem.split(":")[0] for problem in report.problems] == ["Shard 00001 is not done", "Shard 00002 is not done"]
    assert "NOT as it should be" in report.sentence()


def test_a_byte_that_changed_is_found(verified: Callable[[], VerifyReport], output: Path) -> None:
    data = bytearray((output / "00001.parquet").read_bytes())
    data[len(data) // 2] ^= 1
    (output / "00001.parquet").write_bytes(data)
    (problem,) = verified().problems
    assert "00001.parquet is not the file that was written" in problem


def forge(output: Path, fake: Tokenizer, change: str) -> None:
    """Write a shard anew with something wrong in its second row, and a record that fits it."""
    job = Job.load(Storage(str(output)))
    records = list(read_records(job.output, job.file(1)))
    with open_writer(output / "00001.parquet", job.options.stamp(fake.bundle), "parquet") as writer:
        for number, record in enumerate(records):
            if number == 1 and change == "codes":
                assert record.codes is not None
                wrong = replace(record.codes, indices=(record.codes.indices + np.array([0, 0, 1, 0, 0])) % 256)
                record = replace(record, codes=wrong)
            if number == 1 and change == "size":
                record = replace(record, height=9)
            if number == 1 and change in ("features", "nan"):
                wrong_features = record.extra["features"] + np.float16(np.nan if change == "nan" else 100)
                record = replace(record, extra={"features": wrong_features})
            if number == 1 and change == "rounding":
                record = replace(record, extra={"features": record.extra["features"] * np.float16(1.002)})
            if number != 1 or change != "lost":
                writer.add(record)
    path = output / "00001.parquet"
    job.finish(replace(job.done[1], bytes=path.stat().st_size, sha256=file_sha256(path)))


def test_a_wrong_code_in_a_sound_file_is_found(verified: Callable[[], VerifyReport], output: Path, fake: Tokenizer) -> None:
    forge(output, fake, "codes")
    (problem,) = verified().problems
    assert problem.endswith("00001.parquet, row 1 (005.png): 1 of 5 codes differ from those that the bundle gives here.")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("size", ["its width and height are 9 x 9, and those of its picture are 9 x 8."]),
        ("features", ["its features differ from those that the bundle gives here."]),
        ("nan", ["its features differ from those that the bundle gives here."]),
        ("rounding", []),
    ],
)
def test_every_column_is_compared(
    change: str, said: list[str], verified: Callable[[], VerifyReport], output: Path, fake: Tokenizer
) -> None:
    forge(output, fake, change)
    assert [problem.partition("row 1 (005.png): ")[2] for problem in verified().problems] == said


def test_rows_that_do_not_add_up_are_found(verified: Callable[[], VerifyReport], output: Path, fake: Tokenizer) -> None:
    forge(output, fake, "lost")
    (problem,) = verified().problems
    assert "00001.parquet has 3 rows, 1 with an error, instead of 4 and 1." in problem


def test_pictures_that_changed_or_went_are_said(verified: Callable[[], VerifyReport], tmp_path: Path) -> None:
    data = (tmp_path / "in" / "000.png").read_bytes()
    other = next(found for seed in range(100, 400) if len(found := picture(seed)) == len(data))
    (tmp_path / "in" / "000.png").write_bytes(other)
    (tmp_path / "in" / "004.png").unlink()
    changed, gone = verified().problems
    assert "row 0 (000.png): its picture has changed since" in changed
    assert gone.startswith("The pictures of shard 00001 cannot be read: ")


def test_another_bundle_is_refused(output: Path) -> None:
    with fake_tokenizer(sha256="cd" * 32) as other, pytest.raises(DatasetError, match="made with another bundle"):
        verify_job(Job.load(Storage(str(output))), other)
