from __future__ import annotations

import subprocess
import sys
import tarfile
import tracemalloc
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.dataset.test_outputs import write
from tokenflow_sdk.dataset import outputs
from tokenflow_sdk.dataset.outputs import FORMATS, STATE, Format, Record, Stamp
from tokenflow_sdk.dataset.reading import code_shards, read_codes, read_records
from tokenflow_sdk.dataset.storage import Storage
from tokenflow_sdk.errors import ArgumentError, DatasetError, MissingPackageError

Records = Callable[[int], list[Record]]


@pytest.fixture
def job(tmp_path: Path, stamp: Stamp, records: Records) -> Callable[..., Storage]:
    """The output of a job at a place: shards of so many rows, of which some are done."""

    def make(place: str | Path, sizes: list[int], done: Iterable[int], form: Format = "parquet") -> Storage:
        storage = Storage(f"{place}/codes")
        for i, size in enumerate(sizes):
            rows = [Record(**{**vars(row), "key": f"{i}/{row.key}"}) for row in records(size)]
            content = write(tmp_path / "file", stamp, rows, form).read_bytes()
            storage.write(f"{i:05}{FORMATS[form]}", content)
        for i in done:
            storage.write(f"{STATE}/done/{i:05}.json", b"{}")
        storage.write(f"{STATE}/job.json", b"{}")
        return storage

    return make


def keys(found: Any) -> list[str]:
    return [key for key, _ in found]


@pytest.mark.parametrize("form", FORMATS)
def test_rows_come_back_as_they_were_written(
    form: Format, tmp_path: Path, stamp: Stamp, records: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outputs, "_GROUP_ROWS", 4)
    written = records(10)
    path = write(tmp_path / f"x{FORMATS[form]}", stamp, written, form)
    for row, found in zip(written, read_records(Storage(str(tmp_path)), path.name), strict=True):
        assert {**vars(found), "extra": None} == {**vars(row), "extra": None}
        assert found.extra.keys() == row.extra.keys()
        for name, array in row.extra.items():
            assert (found.extra[name].dtype, found.extra[name].tolist()) == (np.float16, array.tolist())
    assert all(not row.extra for row in read_records(Storage(str(path)), extra=False))
    good = [(row.key, row.codes) for row in written if row.codes is not None]
    assert list(read_codes(path)) == good
    assert next(read_codes(path))[1].preparation == stamp.preparation


def test_no_more_than_a_few_row_groups_are_in_memory(
    tmp_path: Path, stamp: Stamp, records: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outputs, "_GROUP_ROWS", 4)
    features = np.random.default_rng(0).normal(size=(256, 64, 64)).astype(np.float16)
    rows = [Record(f"{i}", records(1)[0].codes, extra={"features": column}) for i, column in enumerate(features)]
    path = write(tmp_path / "x.parquet", replace(stamp, shapes={"features": (64, 64)}), rows, "parquet")
    tracemalloc.start()
    found = read_records(Storage(str(path)))
    next(found)
    found.close()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < path.stat().st_size // 2


@pytest.mark.parametrize("form", FORMATS)
def test_bad_rows_are_skipped_raised_or_yielded(form: Format, tmp_path: Path, stamp: Stamp, records: Records) -> None:
    path = write(tmp_path / f"x{FORMATS[form]}", stamp, records(4), form)
    assert len(list(read_codes(path))) == 3
    key, error = list(read_codes(path, errors="yield"))[2]
    assert key == "photos/2.v2.jpg"
    assert isinstance(error, DatasetError)
    assert f"{key} of {path} has no codes: CorruptImageError: photos/x.jpg is no picture." in str(error)
    assert "--retry-errors" in error.hint
    found = read_codes(path, errors="raise")
    assert keys([next(found), next(found)]) == ["photos/0.v2.jpg", "photos/1.v2.jpg"]
    with pytest.raises(DatasetError, match="has no codes"):
        next(found)


def test_of_a_job_only_shards_that_are_done_are_read(job: Callable[..., Storage], place: str) -> None:
    storage = job(place, [2, 2, 2, 2], [3, 0])
    storage.write(".00002.parquet-12ab.partial", b"half")
    storage.write(f"{STATE}/done/.00001.json-{'0' * 12}", b"{")
    assert code_shards(storage.address) == [storage.path("00000.parquet"), storage.path("00003.parquet")]
    assert keys(read_codes(storage.address)) == [f"{i}/photos/{j}.v2.jpg" for i in (0, 3) for j in (0, 1)]
    storage.delete("00003.parquet")
    with pytest.raises(DatasetError, match=r"lacks the file of shard 00003, which is done\. Copy it again"):
        read_codes(storage.address)
    with pytest.raises(DatasetError, match=r"holds no codes\. .* once a shard is done"):
        read_codes(job(f"{place}/other", [2], []).address)


def test_files_without_a_job_are_all_read_in_the_order_of_their_numbers(place: str, tmp_path: Path, stamp: Stamp) -> None:
    content = write(tmp_path / "x", stamp, [], "webdataset").read_bytes()
    storage = Storage(f"{place}/files")
    for number in (100000, 99999, 3):
        storage.write(f"{number:05}.tar", content)
    storage.write("notes.txt", b"")
    assert code_shards(storage.address) == [storage.path(f"{name}.tar") for name in ("00003", "99999", "100000")]
    assert code_shards(storage.path("00003.tar")) == [storage.path("00003.tar")]
    assert list(read_codes(storage.address)) == []


@pytest.mark.parametrize(("sizes", "readers"), [([3, 4, 2, 5, 1], 2), ([3, 4, 2], 3), ([3, 4], 5), ([1], 4)])
def test_several_readers_get_each_row_once(sizes: list[int], readers: int, job: Callable[..., Storage], tmp_path: Path) -> None:
    storage = job(tmp_path, sizes, range(len(sizes)))
    every = keys(read_codes(storage.address, errors="yield"))
    shares = [keys(read_codes(storage.address, errors="yield", rank=i, world_size=readers)) for i in range(readers)]
    assert sorted(key for share in shares for key in share) == sorted(every)
    assert len(every) == sum(sizes)
    backwards = keys(read_codes(code_shards(storage.address)[::-1], errors="yield"))
    assert [key[0] for key in backwards] == [key[0] for key in every][::-1]
    if len(sizes) < readers:
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"errors": "ignore"}, "errors='ignore' is no way"),
        ({"errors": ["skip"]}, "is no way"),
        ({"world_size": 0}, "world_size=0 is no number of readers"),
        ({"rank": 2, "world_size": 2}, r"rank=2 is none of 2 readers\. Give 0 \.\. 1"),
        ({"rank": -1}, "rank=-1 is none of 1 readers"),
    ],
)
def test_arguments_are_checked_at_once(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=said):
        read_codes(tmp_path, **options)
    with pytest.raises(ArgumentError, match="path cannot be of type int"):
        read_codes(3)  # type: ignore[call-overload]


def test_what_is_missing_or_foreign_is_named(place: str, tmp_path: Path, records: Records, stamp: Stamp) -> None:
    storage = Storage(f"{place}/x")
    with pytest.raises(DatasetError, match="x does not exist. Give the output of `tokenflow tokenize`"):
        read_codes(storage.address)
    storage.write("x.txt", b"")
    with pytest.raises(DatasetError, match="x holds no codes"):
        read_codes(storage.address)
    pq.write_table(pa.table({"codes": [[1]]}), tmp_path / "foreign.parquet")
    storage.write("foreign.parquet", (tmp_path / "foreign.parquet").read_bytes())
    for name, content in (("a.json", b"[]"), ("a.json", b"no"), ("a.json", b'{"key": "a"}'), ("a.tfc", b"")):
        with tarfile.open(tmp_path / "x.tar", "w") as archive:
            (tmp_path / "a").write_bytes(content)
            archive.add(tmp_path / "a", name)
        storage.write("foreign.tar", (tmp_path / "x.tar").read_bytes())
        for file in ("foreign.parquet", "foreign.tar"):
            with pytest.raises(DatasetError, match=rf"{file} was not written by `tokenflow tokenize`"):
                list(read_codes(storage.path(file)))


@pytest.mark.parametrize("form", FORMATS)
def test_damaged_files_are_named(form: Format, tmp_path: Path, stamp: Stamp, records: Records) -> None:
    path = write(tmp_path / f"x{FORMATS[form]}", stamp, records(6), form)
    whole = path.read_bytes()
    for cut in (0, 100, len(whole) // 3, len(whole) // 2 - 512 * 9):
        path.write_bytes(whole[: max(cut, 0)])
        with pytest.raises(DatasetError, match=r"x\.\w+ (is damaged|ends half-way)"):
            list(read_codes(path))


@pytest.mark.parametrize(
    ("codes", "said"), [([[40000] * 14] * 2, "40000 .*outside the codebook"), ([[1] * 13, [1] * 15], "does not have 14 values")]
)
def test_codes_that_cannot_be_are_damage(
    codes: list[list[int]], said: str, tmp_path: Path, stamp: Stamp, records: Records
) -> None:
    table = pq.read_table(write(tmp_path / "x.parquet", stamp, records(2), "parquet"))
    column = pa.array(codes, table.schema.field("codes").type)
    pq.write_table(table.set_column(1, table.schema.field("codes"), column), tmp_path / "x.parquet")
    with pytest.raises(DatasetError, match=f"damaged.* {said}"):
        list(read_codes(tmp_path / "x.parquet"))


def test_pandas_and_duckdb_read_the_parquet_files(job: Callable[..., Storage], tmp_path: Path) -> None:
    import duckdb
    import pandas as pd

    storage = job(tmp_path, [4, 5], [0, 1])
    rows = [row for file in code_shards(storage.address) for row in read_records(Storage(file))]
    frame = pd.read_parquet(storage.address)
    assert frame["key"].tolist() == [row.key for row in rows]
    assert frame["codes"].isna().tolist() == [row.codes is None for row in rows]
    good = frame.dropna(subset="codes")
    assert np.stack(list(good["codes"])).tolist() == [row.codes.indices.tolist() for row in rows if row.codes is not None]
    assert good["features"].iloc[0].dtype == np.float16
    query = f"SELECT key, codes, width, error, features FROM '{storage.address}/*.parquet' ORDER BY key"  # noqa: S608
    for found, row in zip(duckdb.sql(query).fetchall(), sorted(rows, key=lambda row: row.key), strict=True):
        codes, features = (
            (None, None) if row.codes is None else (row.codes.indices.tolist(), row.extra["features"].ravel().tolist())
        )
        assert (found[0], None if found[1] is None else list(found[1])) == (row.key, codes)
        assert found[2:4] == (row.width, row.error)
        assert (None if found[4] is None else list(found[4])) == features


@pytest.mark.slow
def test_datasets_reads_the_parquet_files_of_a_job(job: Callable[..., Storage], tmp_path: Path) -> None:
    """Of the whole directory, in which it passes by the job's own records. Importing it takes seconds."""
    from datasets import load_dataset

    storage = job(tmp_path, [4, 5], [0, 1])
    rows = [row for file in code_shards(storage.address) for row in read_records(Storage(file))]
    for where in ({"path": storage.address}, {"path": "parquet", "data_dir": storage.address}):
        found = load_dataset(**where, split="train", cache_dir=str(tmp_path / "cache"))
        assert found["key"][:] == [row.key for row in rows]
        assert found["codes"][:] == [None if row.codes is None else row.codes.indices.tolist() for row in rows]


def test_reading_is_at_the_top_level_and_needs_pyarrow_only_for_parquet(
    tmp_path: Path, stamp: Stamp, records: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "x.tar", stamp, records(2), "webdataset")
    write(tmp_path / "x.parquet", stamp, records(2), "parquet")
    script = (
        "import sys, tokenflow_sdk\n"
        "assert len(list(tokenflow_sdk.read_codes(sys.argv[1]))) == 2\n"
        "print(sorted({'pyarrow', 'fsspec', 'pandas'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script, tmp_path / "x.tar"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'tokenflow-sdk\[dataset\]'"):
        next(read_codes(tmp_path / "x.parquet"))
