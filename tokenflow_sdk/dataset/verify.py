"""Checks a job's output: nothing is missing, every file is the one that was written, and a sample encodes to the same codes."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokenflow_sdk.dataset.inputs import Row, Shard, read_shard
from tokenflow_sdk.dataset.job import DoneRecord, Job
from tokenflow_sdk.dataset.outputs import Record
from tokenflow_sdk.dataset.reading import read_records
from tokenflow_sdk.dataset.rows import Picture
from tokenflow_sdk.dataset.shard_run import Encoder, Stages
from tokenflow_sdk.errors import DatasetError, StorageError, TokenFlowError
from tokenflow_sdk.tokenizer import Tokenizer

__all__ = ["VerifyReport", "verify_job"]

SAMPLED_SHARDS, SAMPLED_ROWS = 4, 16
"""How many shards a sample is of, and how many rows of each."""
_ROUNDING = 0.05
"""Largest distance of features that are equal, relative to their length: engines in half precision keep a cosine of 0.999."""


@dataclass(frozen=True)
class VerifyReport:
    """What was checked of a job's output, and what is wrong with it.

    Attributes:
        output: its address.
        shards: that the job has.
        pictures: rows in the output, those with an error included.
        bad: rows with an error.
        sampled: rows that were made again.
        problems: sentences; empty if all is well.
    """

    output: str
    shards: int
    pictures: int
    bad: int
    sampled: int
    problems: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """As `json.dumps` takes it."""
        return asdict(self)

    def sentence(self) -> str:
        """The result in one line."""
        found = f"{self.pictures:,} pictures in {self.shards:,} shards, {self.bad:,} with an error"
        result = "NOT as it should be" if self.problems else "complete and equal"
        return f"{self.output}  {found}, {self.sampled:,} encoded again: {result}"


def verify_job(job: Job, tokenizer: Tokenizer, seed: int = 0) -> VerifyReport:
    """Check a job's output with the tokenizer that made it.

    Args:
        job: as loaded from its output.
        tokenizer: of its bundle.
        seed: of the sample, which is of a few rows of a few shards.

    Raises:
        DatasetError: the tokenizer is of another bundle.
        StorageError, OutputError: the output cannot be read.
    """
    if job.bundle_sha256 != tokenizer.bundle.sha256:
        raise DatasetError(
            f"The job in {job.output.address} was made with another bundle: its bundle.json has the SHA-256 "
            f"{job.bundle_sha256[:16]}..., this one {tokenizer.bundle.sha256[:16]}....",
            "Give the --bundle that the job was made with.",
        )
    problems = [
        f"Shard {shard.index:05d} is not done: {job.output.path(job.file(shard.index))} or its record is missing. "
        "Run the command of the job again."
        for shard in job.shards
        if shard.index not in job.done
    ]
    problems += [
        f"Of shard {record.shard:05d} a storage did not give {record.not_given:,} pictures. Run the command of the job again."
        for record in job.done.values()
        if record.not_given
    ]
    sound = []
    for _, record in sorted(job.done.items()):
        found = _file_problems(job, record)
        problems += found
        sound += [] if found else [record.shard]
    chosen, sampled = random.Random(seed), 0  # noqa: S311
    encoder = Encoder(tokenizer, job.options, workers=1, lanes=1)
    for index in sorted(chosen.sample(sound, min(SAMPLED_SHARDS, len(sound)))):
        rows = job.done[index].rows
        numbers = sorted(chosen.sample(range(rows), min(SAMPLED_ROWS, rows)))
        found = _sample_problems(job, encoder, job.shards[index], numbers)
        problems += found
        sampled += len(numbers)
    records = job.done.values()
    pictures, bad = sum(record.rows for record in records), sum(record.bad for record in records)
    return VerifyReport(job.output.address, len(job.shards), pictures, bad, sampled, tuple(problems))


def _file_problems(job: Job, record: DoneRecord) -> list[str]:
    """What is wrong with a shard's file, compared with its record."""
    name = job.file(record.shard)
    path = job.output.path(name)
    again = f"Delete {path} and run the command of the job again."
    if not job.is_as_written(record):
        return [f"{path} is not the file that was written: its size or SHA-256 differs from its record. {again}"]
    rows, errors = 0, Counter[str]()
    try:
        for row in read_records(job.output, name):
            rows += 1
            if row.error is not None:
                errors[row.error.partition(":")[0]] += 1
    except TokenFlowError as error:
        return [f"{path} cannot be read: {error.message} {again}"]
    count = job.shards[record.shard].count
    if (rows, dict(errors)) != (record.rows, dict(record.errors)) or count not in (None, rows):
        expected = record.rows if count is None else count
        counts = f"{rows:,} rows, {sum(errors.values()):,} with an error, instead of {expected:,} and {record.bad:,}"
        return [f"{path} has {counts}. {again}"]
    return []


def _sample_problems(job: Job, encoder: Encoder, shard: Shard, numbers: Sequence[int]) -> list[str]:
    """What is wrong with some rows of a shard, compared with what its pictures give now."""
    wanted, last = set(numbers), max(numbers, default=-1)
    pictures: list[tuple[Row, None]] = []
    try:
        for number, row in enumerate(read_shard(shard, job.options.reading, reading=_given)):
            pictures += [(row, None)] if number in wanted else []
            if number == last:
                break
    except TokenFlowError as error:
        return [f"The pictures of shard {shard.index:05d} cannot be read: {error}"]
    stored: list[Record] = []
    for number, record in enumerate(read_records(job.output, job.file(shard.index))):
        stored += [record] if number in wanted else []
    made = encoder.records(pictures, Stages())
    return [
        f"{job.output.path(job.file(shard.index))}, row {number:,} ({old.key}): {difference}"
        for number, old, new in zip(numbers, stored, made, strict=False)
        if (difference := _difference(old, new)) is not None
    ]


def _given(read: Callable[[], Picture]) -> Picture:
    try:
        return read()
    except StorageError as error:
        return error


def _difference(old: Record, new: Record) -> str | None:
    """How what is stored differs from what the picture gives; None: it does not."""
    if old.key == new.key:
        # Of the storage on that day or today, which says nothing of the picture.
        if (old.error or "").startswith("StorageError:"):
            return None
        if (new.error or "").startswith("StorageError:"):
            return f"its picture could not be read to compare: {new.error}"
    if old.key != new.key or old.sha256 != new.sha256:
        return "its picture has changed since. Put the inputs back as they were."
    if old.codes is None or new.codes is None:
        return None if old.error == new.error else f"it has {old.error or 'codes'}, and now gives {new.error or 'codes'}."
    if wrong := int((old.codes.indices != new.codes.indices).sum()):
        return f"{wrong:,} of {len(new.codes):,} codes differ from those that the bundle gives here."
    if (old.width, old.height) != (new.width, new.height):
        return f"its width and height are {old.width} x {old.height}, and those of its picture are {new.width} x {new.height}."
    if far := [name for name, column in new.extra.items() if not _is_near(old.extra.get(name), column)]:
        return f"its {' and '.join(far)} differ from those that the bundle gives here."
    return None


def _is_near(old: NDArray[np.float16] | None, new: NDArray[np.float16]) -> bool:
    """Whether features are equal but for the rounding of another device or precision. NaN is near nothing."""
    if old is None or old.shape != new.shape:
        return False
    wanted = new.astype(np.float64)
    return bool(np.linalg.norm(old - wanted) <= _ROUNDING * np.linalg.norm(wanted))
