from __future__ import annotations

import gc
import json
import sys
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.dataset.conftest import PREPARATION
from tokenflow_sdk import Codes
from tokenflow_sdk.dataset import outputs as module
from tokenflow_sdk.dataset.outputs import FORMATS, Format, Record, Stamp, open_writer
from tokenflow_sdk.dataset.reading import read_records
from tokenflow_sdk.dataset.storage import Storage
from tokenflow_sdk.errors import DatasetError, MissingPackageError, OutputError

Records = Callable[[int], list[Record]]


def write(path: Path, stamp: Stamp, rows: list[Record], form: Format) -> Path:
    with open_writer(path, stamp, form) as writer:
        for row in rows:
            writer.add(row)
    return path


@pytest.mark.parametrize("form", FORMATS)
def test_the_same_rows_give_the_same_bytes(
    form: Format, tmp_path: Path, stamp: Stamp, records: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_GROUP_ROWS", 4)
    (tmp_path / "b").write_bytes(b"x" * 100_000)
    written = write(tmp_path / "a", stamp, records(10), form).read_bytes()
    assert write(tmp_path / "b", stamp, records(10), form).read_bytes() == written


def test_a_parquet_file_has_a_column_for_each_thing(tmp_path: Path, stamp: Stamp, records: Records) -> None:
    rows = records(5)
    table = pq.read_table(write(tmp_path / "x.parquet", stamp, rows, "parquet"))
    assert table.schema.names == ["key", "codes", "width", "height", "sha256", "error", "features"]
    assert [str(table.schema.field(name).type) for name in ("codes", "width", "features")] == [
        *("list<element: uint16>", "int32", "list<element: halffloat>"),
    ]
    assert json.loads(table.schema.metadata[b"tokenflow"]) == {
        "version": 1,
        "bundle_sha256": "12" * 32,
        "variant": "demo",
        "codebook_id": "ab" * 8,
        "codebook_size": 32768,
        "patch_nums": [1, 2, 3, 4],
        "scales": 3,
        "preparation": "crop,srgb",
        "shapes": {"features": [3, 2, 2]},
    }
    for row, found in zip(rows, table.to_pylist(), strict=True):
        bad = row.codes is None
        assert found["codes"] == (None if bad else row.codes.indices.tolist())
        assert found["features"] == (None if bad else row.extra["features"].ravel().tolist())
        assert [found[name] for name in module.PLAIN] == [getattr(row, name) for name in module.PLAIN]
    assert sum(error is not None for error in table["error"].to_pylist()) == 1


def test_large_codebooks_and_files_without_rows(tmp_path: Path, stamp: Stamp) -> None:
    large = replace(stamp, codebook_size=2**16 + 1, shapes={})
    row = Record("a", Codes(np.full(14, 2**16), (1, 2, 3, 4), 2**16 + 1, "demo", "ab" * 8))
    table = pq.read_table(write(tmp_path / "a", large, [row], "parquet"))
    assert (table.schema.field("codes").type.value_type, table["codes"][0].as_py()) == (pa.int32(), [2**16] * 14)
    at_limit = replace(stamp, codebook_size=2**16)
    empty = pq.read_table(write(tmp_path / "b", at_limit, [], "parquet"))
    assert (len(empty), empty.schema.field("codes").type.value_type) == (0, pa.uint16())
    with tarfile.open(write(tmp_path / "c", stamp, [], "webdataset")) as archive:
        assert archive.getnames() == []


def test_rows_are_written_as_they_come(tmp_path: Path, stamp: Stamp, records: Records, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_GROUP_ROWS", 4)
    file = pq.ParquetFile(write(tmp_path / "a", stamp, records(10), "parquet"))
    assert [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)] == [4, 4, 2]
    monkeypatch.undo()
    assert stamp.rows_at_once == 1000
    assert replace(stamp, shapes={"semantic": (1024, 16, 16)}).rows_at_once == 2**26 // (4 * 14 + 2 * 1024 * 16 * 16)


def test_webdataset_reads_a_tar(tmp_path: Path, stamp: Stamp, records: Records) -> None:
    from webdataset.tariterators import group_by_keys, tar_file_iterator

    rows = records(4)
    path = write(tmp_path / "x.tar", stamp, rows, "webdataset")
    with path.open("rb") as file:
        samples = list(group_by_keys({**each, "__url__": ""} for each in tar_file_iterator(file)))
    assert [sample["__key__"] for sample in samples] == [f"photos/{i}_v2_jpg" for i in range(4)]
    assert [json.loads(sample["json"])["key"] for sample in samples] == [row.key for row in rows]
    for row, sample in zip(rows, samples, strict=True):
        if row.codes is None:
            assert {name for name in sample if not name.startswith("__")} == {"json"}
            assert json.loads(sample["json"])["error"] == row.error
        else:
            assert Codes.from_bytes(sample["tfc"]) == row.codes
            assert "features.npy" in sample
    with tarfile.open(path) as archive:
        assert {(member.mtime, member.uid, member.mode, member.uname) for member in archive} == {(0, 0, 0o644, "")}


def test_names_in_a_tar_are_safe_and_each_is_its_own(tmp_path: Path, stamp: Stamp) -> None:
    keys = [
        "../../up",
        "/etc/passwd",
        "",
        "..",
        ".",
        "a.b",
        "a_b",
        "a_b_2",
        "x\ny",
        "C:\\x",
        "ß" * 300,
        "ß" * 301,
        "d/.hidden",
        "a/./b",
    ]
    rows = [Record(key, None, error="ImageError: x.") for key in keys]
    with tarfile.open(write(tmp_path / "x.tar", stamp, rows, "webdataset")) as archive:
        names = archive.getnames()
        archive.extractall(tmp_path / "out", filter="data") if sys.version_info >= (3, 12) else None
    assert len(set(names)) == len(keys)
    for name in names:
        assert not name.startswith("/")
        assert ".." not in name.split("/")
        assert name.isprintable()
        assert name.rpartition("/")[2].count(".") == 1
        assert all(len(part.encode()) <= 255 for part in name.split("/"))
    assert names[:3] + names[5:8] == ["up.json", "etc/passwd.json", "_.json", "a_b.json", "a_b_2.json", "a_b_2_2.json"]


@pytest.mark.parametrize("form", FORMATS)
def test_two_rows_with_one_key_are_refused_and_the_file_is_not_whole(
    form: Format, tmp_path: Path, stamp: Stamp, records: Records
) -> None:
    first, *_ = records(1)
    with pytest.raises(DatasetError, match=r"have the key 'photos/0\.v2\.jpg'"):
        write(tmp_path / "x", stamp, [first, first], form)
    gc.collect()
    (tmp_path / "x").rename(tmp_path / f"x{FORMATS[form]}")
    with pytest.raises(DatasetError, match="damaged"):
        list(read_records(Storage(str(tmp_path)), f"x{FORMATS[form]}"))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
@pytest.mark.parametrize("count", [1, 300])
@pytest.mark.parametrize("form", FORMATS)
def test_a_full_disk_is_named(form: Format, count: int, tmp_path: Path, stamp: Stamp, records: Records) -> None:
    (tmp_path / "x").symlink_to("/dev/full")
    with pytest.raises(OutputError, match=r"x cannot be written: No space left on device"):
        write(tmp_path / "x", stamp, records(count), form)
    with pytest.raises(OutputError, match=r"x/y cannot be written: Not a directory"):
        open_writer(tmp_path / "x" / "y", stamp, form)
    gc.collect()


def test_a_stamp_comes_back_from_its_text(stamp: Stamp) -> None:
    assert Stamp.from_json(stamp.to_json()) == stamp
    assert (stamp.length, stamp.preparation) == (14, PREPARATION)
    values = json.loads(stamp.to_json())
    with pytest.raises(DatasetError, match="format version 2; this SDK reads version 1"):
        Stamp.from_json(json.dumps({**values, "version": 2}))
    damaged = ["", "[]", "1", json.dumps({**values, "more": 1}), json.dumps({**values, "preparation": "?"})]
    for text in (*damaged, *(json.dumps({k: v for k, v in values.items() if k != name}) for name in values)):
        with pytest.raises(DatasetError, match="The codes' stamp is damaged"):
            Stamp.from_json(text)


def test_a_missing_pyarrow_is_named(tmp_path: Path, stamp: Stamp, records: Records, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'tokenflow-sdk\[dataset\]'`, or write WebDataset's tars"):
        open_writer(tmp_path / "x", stamp, "parquet")
    write(tmp_path / "x.tar", stamp, records(1), "webdataset")
