from __future__ import annotations

import errno
import hashlib
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image

from tests.support.dataset_jobs import content, fake_tokenizer, picture, write_pictures
from tokenflow_sdk import Tokenizer
from tokenflow_sdk.dataset import shard_run
from tokenflow_sdk.dataset.inputs import Row, Shard, find_shards
from tokenflow_sdk.dataset.job import DoneRecord, Job
from tokenflow_sdk.dataset.job_options import JobOptions
from tokenflow_sdk.dataset.outputs import DONE, Record
from tokenflow_sdk.dataset.reading import read_records
from tokenflow_sdk.dataset.runner import shards_to_do
from tokenflow_sdk.dataset.shard_run import STAGES, Encoder, ShardStopped, Stages, Watch, run_shard
from tokenflow_sdk.dataset.storage import Storage
from tokenflow_sdk.dataset.verify import verify_job
from tokenflow_sdk.errors import DatasetError, ImageReadError, OutputError, StorageError
from tokenflow_sdk.pictures.preparation import Preparation


@pytest.fixture
def fake() -> Iterator[Tokenizer]:
    with fake_tokenizer() as tokenizer:
        yield tokenizer


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("tokenflow")] == []


def begin(tokenizer: Tokenizer, inputs: Path, output: Path, **options: Any) -> Job:
    shards = find_shards([str(inputs)])
    return Job.begin(Storage(str(output)), JobOptions(**options), tokenizer.bundle, [str(inputs)], shards)


def made(tokenizer: Tokenizer, inputs: Path, output: Path, workers: int = 2, lanes: int = 2, **options: Any) -> list[Record]:
    job = begin(tokenizer, inputs, output, **options)
    run_shard(Encoder(tokenizer, job.options, workers, lanes), job, job.shards[0])
    return list(read_records(job.output, job.file(0)))


def test_rows_stand_in_their_places_and_bad_pictures_are_rows(fake: Tokenizer, tmp_path: Path) -> None:
    inputs = write_pictures(tmp_path / "in", 9, bad=(0, 4, 8))
    job = begin(fake, inputs, tmp_path / "out", format="webdataset")
    record = run_shard(Encoder(fake, job.options, 2, 2), job, job.shards[0])
    rows = list(read_records(job.output, job.file(0)))
    assert [row.key for row in rows] == [f"{i:03d}.png" for i in range(9)]
    assert [i for i, row in enumerate(rows) if row.error is not None] == [0, 4, 8]
    assert str(rows[4].error).startswith("CorruptImageError: <10 bytes> is not a picture in a known format")
    for row in rows:
        data = (inputs / row.key).read_bytes()
        assert row.sha256 == hashlib.sha256(data).hexdigest()
        if row.codes is None:
            assert (row.width, row.height) == (None, None)
        else:
            assert (row.width, row.height) == (9, 8)
            assert row.codes == fake.encode(data)
            # As `tokenflow encode` writes them.
            assert row.codes.preparation == Preparation("crop", "srgb", source=row.sha256[:16])
    data = (tmp_path / "out" / "00000.tar").read_bytes()
    assert job.done == {0: record}
    assert (record.rows, record.errors, record.bad) == (9, {"CorruptImageError": 3}, 3)
    assert (record.bytes, record.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert set(record.seconds) == set(STAGES)


def test_a_picture_that_cannot_be_read_is_a_row(fake: Tokenizer) -> None:
    row = Row("a.png", ImageReadError("a.png may not be read.", "Check its permissions."))
    encoder = Encoder(fake, JobOptions().complete(fake.config), 1, 1)
    (found,) = encoder.records([(row, None)], Stages())
    assert found == Record("a.png", None, error="ImageReadError: a.png may not be read.")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_lane_is_free_again_before_a_row_is_made_of_what_the_engine_gave(
    workers: int, fake: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder, plain, free = Encoder(fake, JobOptions().complete(fake.config), workers, 1), fake.codes, []

    def codes(*arguments: Any) -> Any:
        free.append(encoder._free.acquire(blocking=False))
        encoder._free.release()
        return plain(*arguments)

    monkeypatch.setattr(fake, "codes", codes)
    assert [row.key for row in encoder.records([(Row("a.png", picture(0)), None)], Stages())] == ["a.png"]
    assert free == [True]


@pytest.mark.parametrize("form", ["parquet", "webdataset"])
def test_the_bytes_are_the_same_however_it_runs(form: str, tmp_path: Path) -> None:
    inputs, outputs = write_pictures(tmp_path / "in", 11, bad=(3,)), []
    for i, (batch, workers, lanes) in enumerate(((1, 1, 1), (4, 3, 2), (2, 1, 3), (1, 0, 2))):
        with fake_tokenizer(batch) as tokenizer:
            made(tokenizer, inputs, tmp_path / f"{i}", workers, lanes, format=form, also=("features",))
        outputs.append(content(tmp_path / f"{i}"))
    assert all(each == outputs[0] for each in outputs)


def test_features_and_coarse_scales_are_those_of_the_stored_codes(tokenizer: Tokenizer, tmp_path: Path) -> None:
    inputs = write_pictures(tmp_path / "in", 2)
    for row in made(tokenizer, inputs, tmp_path / "out", also=("semantic", "features"), scales=3):
        codes = tokenizer.encode(inputs / row.key).truncate(3)
        assert row.codes == codes
        assert list(row.extra) == ["features", "semantic"]
        for name, value in row.extra.items():
            assert np.array_equal(value, getattr(tokenizer, name)(codes).astype(np.float16))


def test_sizes_are_those_of_the_upright_picture_also_where_less_is_decoded(fake: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    wide = Image.new("RGB", (203, 100), "teal")
    wide.save(tmp_path / "in" / "a.jpg")
    wide.save(tmp_path / "in" / "b.jpg", exif=exif)
    wide.save(tmp_path / "in" / "c.png", exif=exif)
    Image.new("RGB", (100, 100)).save(tmp_path / "in" / "d.jpg", exif=exif)
    sizes = [(203, 100), (100, 203), (100, 203), (100, 100)]
    for fast in (False, True):
        rows = made(fake, tmp_path / "in", tmp_path / f"{fast}", fast=fast)
        assert [(row.width, row.height) for row in rows] == sizes
        assert [row.codes for row in rows] == [fake.encode(path, fast=fast) for path in sorted((tmp_path / "in").iterdir())]


class FailingReads:
    """`read_shard` whose storage fails in the middle, some times."""

    def __init__(self, times: int) -> None:
        self.left, self.calls, self.plain = times, 0, shard_run.read_shard

    def __call__(self, shard: Shard, *arguments: Any, **options: Any) -> Iterator[Row]:
        self.calls += 1
        for i, row in enumerate(self.plain(shard, *arguments, **options)):
            if i == 3 and self.left:
                self.left -= 1
                raise StorageError("The bucket does not answer.", "Try again.")
            yield row


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_run, "DELAYS", (0.001, 0.001, 0.001))


@pytest.mark.usefixtures("at_once")
def test_a_storage_that_fails_gets_three_more_tries(fake: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = write_pictures(tmp_path / "in", 6)
    made(fake, inputs, tmp_path / "right")
    monkeypatch.setattr(shard_run, "read_shard", failing := FailingReads(3))
    made(fake, inputs, tmp_path / "out")
    assert failing.calls == 4
    assert content(tmp_path / "out") == content(tmp_path / "right")
    monkeypatch.setattr(shard_run, "read_shard", FailingReads(4))
    with pytest.raises(StorageError, match="does not answer"):
        made(fake, inputs, tmp_path / "none")
    assert content(tmp_path / "none") == {}


class BadFiles:
    """Files of some names, which a storage does not give. `tries` counts how often each was asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names, self.tries, self.plain = set[str](), Counter[str](), Storage.read
        self.cause: Exception | None = None
        monkeypatch.setattr(Storage, "read", lambda *arguments: self.read(*arguments))

    def read(self, storage: Storage, name: str = "", *arguments: Any) -> bytes:
        last = storage.path(name).rpartition("/")[2]
        self.tries[last] += 1
        if last in self.names:
            raise StorageError(f"{last} cannot be read: 500.", "Try again.") from self.cause
        return self.plain(storage, name, *arguments)


@pytest.fixture
def bad(monkeypatch: pytest.MonkeyPatch) -> BadFiles:
    return BadFiles(monkeypatch)


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("kind", ["local", "memory", "paths"])
def test_a_file_that_its_storage_does_not_give_is_a_row_that_can_be_tried_again(
    kind: str, fake: Tokenizer, tmp_path: Path, memory: str, bad: BadFiles
) -> None:
    place = Storage(memory if kind == "memory" else str(tmp_path / "in"))
    names = [f"{i:03d}.png" for i in range(5)]
    for i, name in enumerate(names):
        place.write(name, picture(i))
    if kind == "paths":
        pq.write_table(pa.table({"image": names, "id": names}), tmp_path / "in" / "x.parquet")
    options = JobOptions(format="webdataset", key_column="id" if kind == "paths" else None)
    where = place.path("x.parquet") if kind == "paths" else place.address
    output, tries = Storage(str(tmp_path / "out")), Counter[str]()

    def run(errors: dict[str, int]) -> list[Record]:
        job = Job.begin(output, options, fake.bundle, [where], find_shards([where], options.reading))
        assert run_shard(Encoder(fake, job.options, 1, 1), job, job.shards[0]).errors == errors
        tries.update(bad.tries)
        return list(read_records(output, job.file(0)))

    bad.names = {"001.png", "002.png"}
    rows = run({"StorageError": 2})
    assert [row.key for row in rows] == names
    assert [row.error for row in rows[1:3]] == [f"StorageError: {name} cannot be read: 500." for name in names[1:3]]
    assert tries["001.png"] == tries["002.png"] == 4
    bad.names = set()
    not_given = "Of shard 00000 a storage did not give 2 pictures. Run the command of the job again."
    assert verify_job(Job.load(output), fake).problems == (not_given,)
    assert shards_to_do(job := Job.load(output)) == job.shards
    assert [row.error for row in run({})] == [None] * 5
    assert shards_to_do(Job.load(output)) == []
    bad.names = {"003.png"}
    (problem,) = verify_job(Job.load(output), fake).problems
    assert problem.endswith("(003.png): its picture could not be read to compare: StorageError: 003.png cannot be read: 500.")


@pytest.mark.usefixtures("at_once")
def test_what_is_not_permitted_is_not_tried_again(fake: Tokenizer, tmp_path: Path, memory: str, bad: BadFiles) -> None:
    place = Storage(memory)
    for i in range(3):
        place.write(f"{i:03d}.png", picture(i))
    bad.names, bad.cause = {"001.png"}, PermissionError("403")
    output = Storage(str(tmp_path / "out"))
    job = Job.begin(output, JobOptions(), fake.bundle, [memory], find_shards([memory]))
    assert run_shard(Encoder(fake, job.options, 1, 1), job, job.shards[0]).not_given == 1
    assert bad.tries["001.png"] == 1


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize(("good", "fails"), [(0, 3), (30, 16), (30, 15)])
def test_a_storage_that_gives_no_files_any_more_fails_the_shard(
    good: int, fails: int, fake: Tokenizer, tmp_path: Path, bad: BadFiles
) -> None:
    inputs = write_pictures(tmp_path / "in", good + fails)
    bad.names = {f"{good + i:03d}.png" for i in range(fails)}
    if fails == 15:
        assert [row.error is None for row in made(fake, inputs, tmp_path / "out")] == [True] * good + [False] * fails
        return
    with pytest.raises(DatasetError, match=rf"^{fails} pictures in a row could not be read\. The last: 0.*png cannot be read"):
        made(fake, inputs, tmp_path / "out")
    assert content(tmp_path / "out") == {}
    assert sum(bad.tries[name] for name in bad.names) == fails + 3 * 3


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("name", ["put_file", "rm_file", "pipe_file"])
def test_what_is_sent_is_sent_again_without_encoding_it_again(
    name: str, fake: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = write_pictures(tmp_path / "in", 3)
    output, failures = Storage(f"memory://{tmp_path}/out"), [ConnectionResetError("reset")] * 3
    job = Job.begin(output, JobOptions(), fake.bundle, [str(inputs)], find_shards([str(inputs)]))
    output.write(f"{DONE}/00000.json", b"")
    plain: Callable[..., Any] = getattr(MemoryFileSystem, name)

    def failing(*arguments: Any, **options: Any) -> Any:
        if failures:
            raise failures.pop()
        return plain(*arguments, **options)

    monkeypatch.setattr(MemoryFileSystem, name, failing)
    run_shard(Encoder(fake, job.options, 1, 1), job, job.shards[0])
    assert [row.key for row in read_records(output, job.file(0))] == ["000.png", "001.png", "002.png"]
    assert (failures, list(Job.load(output).done)) == ([], [0])
    assert len(fake.graphs.load("encode").calls) == 3  # type: ignore[attr-defined]
    failures += [ConnectionResetError("reset")] * 4
    with pytest.raises(OutputError, match="ConnectionResetError: reset"):
        run_shard(Encoder(fake, job.options, 1, 1), job, job.shards[0])


@pytest.mark.parametrize("address", ["{}/out", "memory://{}/out"])
def test_a_local_disk_that_is_full_is_not_tried_again(
    address: str, fake: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, calls = write_pictures(tmp_path / "in", 3), []
    output = Storage(address.format(tmp_path))
    job = Job.begin(output, JobOptions(), fake.bundle, [str(inputs)], find_shards([str(inputs)]))

    def full(path: Path, *arguments: Any) -> Any:
        calls.append(path)
        raise OutputError(f"{path} cannot be written: No space left on device.", "Free some space.")

    monkeypatch.setattr(shard_run, "open_writer", full)
    with pytest.raises(OutputError, match="No space left"):
        run_shard(Encoder(fake, job.options, 1, 1), job, job.shards[0])
    assert (job.done, len(calls)) == ({}, 1)
    assert output.find("00000.parquet") is None


def test_good_rows_of_a_shard_that_is_done_are_not_encoded_again(fake: Tokenizer, tmp_path: Path) -> None:
    inputs = write_pictures(tmp_path / "in", 6, bad=(1, 4))
    made(fake, inputs, tmp_path / "out")
    calls: list[Any] = fake.graphs.load("encode").calls  # type: ignore[attr-defined]
    assert len(calls) == 4
    (inputs / "001.png").write_bytes(picture(1))
    (inputs / "002.png").write_bytes(picture(77))
    job = Job.begin(Storage(str(tmp_path / "out")), JobOptions(), fake.bundle, ["in"], find_shards([str(inputs)]), mended=True)
    record = run_shard(Encoder(fake, job.options, 1, 1), job, job.shards[0])
    assert len(calls) == 6
    assert record.errors == {"CorruptImageError": 1}
    made(fake, inputs, tmp_path / "anew")
    assert content(tmp_path / "out") == content(tmp_path / "anew")


def test_rows_of_a_file_that_was_changed_are_encoded_again(fake: Tokenizer, tmp_path: Path) -> None:
    inputs, path = write_pictures(tmp_path / "in", 6, bad=(1,)), tmp_path / "out" / "00000.tar"
    made(fake, inputs, tmp_path / "out", format="webdataset")
    right, wrong = path.read_bytes(), bytearray(path.read_bytes())
    wrong[wrong.index(b'"width": 9') + 9] = ord("7")
    path.write_bytes(wrong)
    made(fake, inputs, tmp_path / "out", format="webdataset")
    assert path.read_bytes() == right


def test_a_record_never_stands_beside_another_file_than_its_own(
    fake: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = write_pictures(tmp_path / "in", 3, bad=(1,))
    made(fake, inputs, tmp_path / "out")
    job = begin(fake, inputs, tmp_path / "out")

    def killed(self: Job, record: DoneRecord) -> None:
        raise OSError(errno.EIO, "killed before the record")

    monkeypatch.setattr(Job, "finish", killed)
    with pytest.raises(OSError, match="killed"):
        run_shard(Encoder(fake, job.options, 1, 1), job, job.shards[0])
    assert begin(fake, inputs, tmp_path / "out").done == {}


def test_a_shard_that_is_stopped_leaves_nothing(fake: Tokenizer, tmp_path: Path) -> None:
    job = begin(fake, write_pictures(tmp_path / "in", 30), tmp_path / "out")

    class Stopping(Watch):
        rows = 0

        def wrote(self, record: Record) -> None:
            self.rows += 1
            if self.rows == 5:
                self.stop.set()

    with pytest.raises(ShardStopped):
        run_shard(Encoder(fake, job.options, 1, 1), job, job.shards[0], Stopping())
    assert (content(tmp_path / "out"), job.done) == ({}, {})


def test_what_is_read_ahead_counts_with_the_columns_of_an_earlier_run() -> None:
    row, column = Row("a", b"123"), np.zeros((4, 5), np.float16)
    before = Record("a", None, extra={"features": column, "semantic": column})
    assert shard_run._size((row, before)) == shard_run._size((row, None)) + 80


def test_memory_does_not_grow_with_the_number_of_pictures(
    fake: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 100 MB of pictures no more are in memory than the limit of those that are read ahead, and a few that are worked on."""
    monkeypatch.setattr(shard_run, "_AHEAD", 2**21)
    alive, most, png = [0], [0], picture(0)

    class Counted(bytes):
        def __del__(self) -> None:
            alive[0] -= 1

    def rows(shard: Shard, *arguments: Any, **options: Any) -> Iterator[Row]:
        for i in range(200):
            alive[0] += 1
            most[0] = max(most[0], alive[0])
            yield Row(str(i), Counted(png + bytes(2**19)))

    monkeypatch.setattr(shard_run, "read_shard", rows)
    assert len(made(fake, write_pictures(tmp_path / "in", 1), tmp_path / "out")) == 200
    assert most[0] < 30
