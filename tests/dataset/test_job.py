from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.fakes import fake_bundle
from tokenflow_sdk.dataset import job_lock
from tokenflow_sdk.dataset.inputs import Shard
from tokenflow_sdk.dataset.job import DoneRecord, Job
from tokenflow_sdk.dataset.job_options import JobOptions
from tokenflow_sdk.dataset.outputs import STATE
from tokenflow_sdk.dataset.storage import Entry, Storage
from tokenflow_sdk.errors import DatasetError

BUNDLE = replace(fake_bundle(), sha256="ab" * 32)
SHARDS = [Shard(i, "files", "/photos", f"{i:064x}", first=f"{i}0.png", count=10) for i in range(3)]


def begin(
    output: Path, options: JobOptions | None = None, shards: list[Shard] = SHARDS, bundle: str = "ab" * 32, mended: bool = False
) -> Job:
    made = replace(BUNDLE, sha256=bundle)
    return Job.begin(Storage(str(output)), options or JobOptions(), made, ["/photos"], iter(shards), mended)


def finish(job: Job, index: int, errors: dict[str, int] | None = None) -> None:
    Path(job.output.path(job.file(index))).write_bytes(b"codes")
    job.finish(DoneRecord(index, 5, "cd" * 32, 10, errors or {}, {"read": 0.5}, "cpu"))


def test_the_same_command_goes_on_with_what_is_done(tmp_path: Path) -> None:
    job = begin(tmp_path / "deep" / "out")
    assert (job.done, job.shards) == ({}, SHARDS)
    finish(job, 1, {"CorruptImageError": 2})
    again = begin(tmp_path / "deep" / "out")
    assert again.done == job.done == {1: DoneRecord(1, 5, "cd" * 32, 10, {"CorruptImageError": 2}, {"read": 0.5}, "cpu")}
    loaded = Job.load(again.output)
    assert (loaded.done, loaded.shards, loaded.options) == (job.done, SHARDS, again.options)
    assert (again.options.scales, again.options.preprocess) == (2, "crop")


def test_a_shard_without_its_file_or_with_a_cut_record_is_not_done(tmp_path: Path) -> None:
    job = begin(tmp_path)
    for index in range(3):
        finish(job, index)
    (tmp_path / "00001.parquet").unlink()
    (tmp_path / STATE / "done" / "00002.json").write_text('{"shard": 2, "by')
    assert sorted(begin(tmp_path).done) == [0]
    job.forget(0)
    job.forget(0)
    assert begin(tmp_path).done == {}


@pytest.mark.parametrize("where", ["local", "memory"])
def test_a_shard_whose_file_was_cut_or_swapped_is_not_done(
    where: str, tmp_path: Path, memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = Storage(memory if where == "memory" else str(tmp_path))
    job = Job.begin(output, JobOptions(), BUNDLE, ["/photos"], iter(SHARDS))
    for index, content in enumerate((b"cut", b"codes", b"a longer one")):
        output.write(job.file(index), content)
        job.finish(DoneRecord(index, 5, "cd" * 32, 10))
    job.forget_changed(SHARDS[1:])
    assert sorted(job.done) == sorted(Job.load(output).done) == [0, 1]
    with monkeypatch.context() as patched:  # a service that does not say how large its objects are
        patched.setattr(Storage, "find", lambda storage, name="": Entry(name, False, None))
        patched.setattr(Storage, "scan", lambda storage: [Entry(job.file(i), False, None) for i in range(3)])
        job.forget_changed(SHARDS)
    assert sorted(job.done) == [0, 1]
    job.forget_changed(SHARDS)
    assert sorted(job.done) == sorted(Job.load(output).done) == [1]


def test_the_state_is_the_same_bytes_whoever_begins(tmp_path: Path) -> None:
    def state(directory: Path) -> dict[str, bytes]:
        begin(directory)
        return {path.name: path.read_bytes() for path in (directory / STATE).iterdir() if path.is_file()}

    assert state(tmp_path / "a") == state(tmp_path / "b")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (JobOptions(scales=1), "another --scales: it was 2, and now it is 1."),
        (JobOptions(also=("semantic",)), "another --also: it was nothing, and now it is semantic."),
        (JobOptions(format="webdataset"), "another --format: it was parquet, and now it is webdataset."),
        (JobOptions(shard_size=7), "another --shard-size: it was 10000, and now it is 7."),
        (JobOptions(key_column="id"), "another --key-column: it was not given, and now it is id."),
        (JobOptions(preprocess="pad"), "another --preprocess: it was crop, and now it is pad."),
        (JobOptions(fast=True), "another --fast: it was not given, and now it is given."),
    ],
    ids=lambda value: value.split(":")[0] if isinstance(value, str) else "",
)
def test_another_option_is_refused_by_name(options: JobOptions, said: str, tmp_path: Path) -> None:
    begin(tmp_path)
    with pytest.raises(DatasetError) as caught:
        begin(tmp_path, options)
    assert f"The job in {tmp_path} began with {said}" in str(caught.value)
    assert "or choose another -o" in caught.value.hint
    begin(tmp_path, JobOptions(scales=2, preprocess="crop"))


def test_another_bundle_is_refused(tmp_path: Path) -> None:
    begin(tmp_path)
    with pytest.raises(DatasetError, match=r"began with another bundle: .* SHA-256 abab.*, this one cdcd.* same --bundle"):
        begin(tmp_path, bundle="cd" * 32)


def test_tasks_that_begin_together_agree_on_one_job(tmp_path: Path) -> None:
    """One may list for minutes, while another begins with other words."""
    for i, (options, shards) in enumerate(((JobOptions(scales=1), SHARDS), (JobOptions(), SHARDS[:2]), (JobOptions(), SHARDS))):
        output = tmp_path / f"{i}"

        def listing(output: Path = output, options: JobOptions = options, shards: list[Shard] = shards) -> Iterator[Shard]:
            yield from SHARDS
            finish(begin(output, options, shards), 0)

        def slow(output: Path = output, found: Callable[[], Iterator[Shard]] = listing) -> Job:
            return Job.begin(Storage(str(output)), JobOptions(), BUNDLE, ["/photos"], found())

        if i == 2:
            assert list(slow().done) == [0]
        else:
            with pytest.raises(DatasetError, match="began with"):
                slow()
        assert len(Job.load(Storage(str(output))).shards) == len(shards)


def test_the_job_is_stored_while_nobody_else_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, store = list[bool](), Job._store
    lock = tmp_path / STATE / "locks" / "start.lock"
    monkeypatch.setattr(Job, "_store", lambda job: (seen.append(job_lock._is_held(lock)), store(job))[1])
    begin(tmp_path)
    assert seen == [True]
    assert not job_lock._is_held(lock)


@pytest.mark.parametrize(
    ("shards", "said"),
    [
        (SHARDS[:2], "there were 3 shards and there are 2"),
        ([SHARDS[0], replace(SHARDS[1], fingerprint="f" * 64), SHARDS[2]], r"shard 00001 \(/photos from 10.png on\) has other"),
        ([SHARDS[0], *(replace(s, count=9) for s in SHARDS[1:])], "has other files or other sizes, and 1 more shards differ"),
    ],
    ids=["fewer", "other", "counts"],
)
def test_other_inputs_are_refused(shards: list[Shard], said: str, tmp_path: Path) -> None:
    finish(begin(tmp_path), 1)
    for mended in (False, True):
        with pytest.raises(DatasetError, match=said):
            begin(tmp_path, shards=shards, mended=mended)
    begin(tmp_path, shards=[replace(shard, where="/moved") for shard in SHARDS])


def test_pictures_of_shards_with_errors_may_be_mended(tmp_path: Path) -> None:
    finish(begin(tmp_path), 1, {"CorruptImageError": 1})
    mended = [SHARDS[0], replace(SHARDS[1], fingerprint="f" * 64), SHARDS[2]]
    with pytest.raises(DatasetError, match="Where bad pictures were mended, give --retry-errors"):
        begin(tmp_path, shards=mended)
    assert begin(tmp_path, shards=mended, mended=True).done[1].bad == 1
    begin(tmp_path, shards=mended)


@pytest.mark.parametrize("mended", [False, True])
def test_shards_of_which_nothing_was_made_may_change(mended: bool, tmp_path: Path) -> None:
    """As a tar that ended half-way, and was fetched again."""
    finish(begin(tmp_path), 1)
    again = [replace(SHARDS[0], fingerprint="f" * 64), *SHARDS[1:]]
    assert list(begin(tmp_path, shards=again, mended=mended).done) == [1]
    assert Job.load(Storage(str(tmp_path))).shards == again


@pytest.mark.parametrize("number", [2, 4])
def test_mended_pictures_are_of_as_many_shards(number: int, tmp_path: Path) -> None:
    """A picture that was deleted moves all after it: where the last shard goes, its file would stay."""
    for index in range(3):
        finish(job := begin(tmp_path), index, {"CorruptImageError": 1})
    other = [replace(SHARDS[0], index=i, fingerprint="f" * 64) for i in range(number)]
    with pytest.raises(DatasetError, match="Put them back as they were, or choose another -o.$"):
        begin(tmp_path, shards=other, mended=True)
    job.shards = SHARDS[:2]
    job._store()
    assert sorted(Job.load(job.output).done) == [0, 1]


def test_what_is_no_output_of_a_job_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "photos.tar").write_bytes(b"")
    with pytest.raises(DatasetError, match=r"holds photos.tar and is not the output of a job. Choose another -o"):
        begin(tmp_path)
    with pytest.raises(DatasetError, match="holds no output of `tokenflow tokenize`"):
        Job.load(Storage(str(tmp_path)))
    assert [path.name for path in tmp_path.iterdir()] == ["photos.tar"]


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": 1, "options": {}}'])
def test_a_damaged_state_is_an_error_that_says_what_to_do(content: str, tmp_path: Path) -> None:
    begin(tmp_path)
    (tmp_path / STATE / "job.json").write_text(content)
    with pytest.raises(DatasetError, match=r"is damaged: .* Empty /.* and begin again, or choose another -o"):
        begin(tmp_path)
    (tmp_path / STATE / "job.json").write_text('{"format": 2, "sdk": "9.0"}')
    with pytest.raises(DatasetError, match=r"written by tokenflow-sdk 9.0, which is newer"):
        begin(tmp_path)


def test_a_list_of_shards_that_is_cut_is_noticed(tmp_path: Path) -> None:
    begin(tmp_path)
    lines = (tmp_path / STATE / "shards.jsonl").read_text().splitlines()
    assert [Shard.from_json(json.loads(line)) for line in lines] == SHARDS
    (tmp_path / STATE / "shards.jsonl").write_text("\n".join(lines[:2]))
    with pytest.raises(DatasetError, match="2 of 3 shards"):
        begin(tmp_path)


def test_ten_thousand_shards_begin_and_go_on_at_once(tmp_path: Path) -> None:
    """What 10 million pictures take of a disk and of memory: the benchmark measures the times."""
    shards = [Shard(i, "tar", f"/bucket/laion/{i:05d}.tar", f"{i:064x}") for i in range(2000)]
    job = begin(tmp_path, shards=shards)
    for index in range(0, 2000, 100):
        finish(job, index, {"CorruptImageError": 3})
    assert len(begin(tmp_path, shards=shards).done) == 20
    size = sum(path.stat().st_size for path in (tmp_path / STATE).rglob("*.jsonl"))
    assert size < 2000 * 250
