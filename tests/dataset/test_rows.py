from __future__ import annotations

import gzip
import io
import struct
import sys
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from tokenflow_sdk.dataset import rows as module
from tokenflow_sdk.dataset.rows import Cell, Row, parquet_cells, read_picture, tar_rows
from tokenflow_sdk.dataset.storage import Storage
from tokenflow_sdk.errors import DatasetError, ImageReadError, MissingPackageError, StorageError


def tar(members: Iterable[Any], form: int = tarfile.PAX_FORMAT) -> bytes:
    """A tar of files, given as names and contents, and of other members."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", format=form, encoding="utf-8", errors="surrogateescape") as archive:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                archive.addfile(info, io.BytesIO(member[1]))
    return content.getvalue()


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., list[Row]]:
    def read(content: bytes, name: str = "x.tar") -> list[Row]:
        (tmp_path / name).write_bytes(content)
        return list(tar_rows(Storage(str(tmp_path / name))))

    return read


PHOTOS = (("a/1.jpg", b"one"), ("a/1.json", b"{}"), ("a/2.v1.JPG", b"two"), ("zero.png", b""))
ROWS = [Row("a/1", b"one"), Row("a/2", b"two"), Row("zero", b"")]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_tar_gives_its_pictures_as_webdataset_names_them(form: int, read: Callable[..., list[Row]]) -> None:
    assert read(tar(PHOTOS, form)) == ROWS
    assert read(gzip.compress(tar(PHOTOS, form)), "x.tar.gz") == ROWS
    assert read(gzip.compress(tar(PHOTOS, form)), "misnamed.tar") == ROWS
    assert read(tar([])) == []


def test_the_first_picture_of_a_key_is_taken(read: Callable[..., list[Row]]) -> None:
    members = [("1.txt", b""), ("1.jpg", b"photo"), ("1.mask.png", b"mask"), ("1.png", b""), (".x.jpg", b""), ("x/.y.png", b"")]
    assert read(tar(members)) == [Row("1", b"photo")]


@pytest.mark.parametrize("name", ["/etc/passwd.jpg", "../../up.jpg", "a/../b.jpg", "x\ny.jpg", "C:\\x.jpg", "ß" * 200 + ".jpg"])
def test_names_are_keys_and_nothing_is_unpacked(name: str, read: Callable[..., list[Row]], tmp_path: Path) -> None:
    assert read(tar([(name, b"1")])) == [Row(name.removesuffix(".jpg"), b"1")]
    assert [path.name for path in tmp_path.iterdir()] == ["x.tar"]
    assert read(tar([(f"./{name.lstrip('/')}", b"1")])) == [Row(name.lstrip("/").removesuffix(".jpg"), b"1")]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT])
def test_names_that_are_no_utf8_become_text(form: int, read: Callable[..., list[Row]]) -> None:
    assert read(tar([("caf\udce9.jpg", b"1")], form)) == [Row("caf\\xe9", b"1")]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_rows_with_an_error(kind: bytes, read: Callable[..., list[Row]]) -> None:
    member = tarfile.TarInfo("link.jpg")
    member.type, member.linkname = kind, "/etc/passwd"
    directory = tarfile.TarInfo("directory.jpg")
    directory.type = tarfile.DIRTYPE
    (link, photo) = read(tar([directory, member, ("photo.jpg", b"1")]))
    assert link.key == "link"
    assert isinstance(link.data, ImageReadError)
    assert "link.jpg in " in str(link.data)
    assert photo == Row("photo", b"1")


def test_a_huge_picture_is_a_row_with_an_error(read: Callable[..., list[Row]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_BYTES", 10)
    huge, photo = read(tar([("huge.jpg", b"x" * 11), ("photo.jpg", b"x" * 10)]))
    assert isinstance(huge.data, ImageReadError)
    assert "huge.jpg in " in str(huge.data)
    assert "larger than 10 bytes" in str(huge.data)
    assert photo == Row("photo", b"x" * 10)


@pytest.mark.parametrize("ending", ["tar", "tgz"])
def test_a_tar_that_ends_anywhere_is_named(ending: str, read: Callable[..., list[Row]]) -> None:
    """Also where it ends between two members, which `tarfile` takes for the end."""
    whole = tar([("a.jpg", b"x" * 600), ("b.jpg", b"y")])
    whole = gzip.compress(whole, 0) if ending == "tgz" else whole
    # The end is marked by one block of zeros; what follows may be missing.
    marked = 512 + 1024 + 512 + 512 + 512
    for cut in range(0, len(whole) if ending == "tgz" else marked, 100 if ending == "tgz" else 256):
        with pytest.raises(DatasetError, match=r"x\.t.* ends half-way, or is damaged"):
            read(whole[:cut], f"x.{ending}")
    if ending == "tar":
        assert len(read(whole[:marked])) == 2


def test_damage_is_named_and_comes_after_the_rows_before_it(read: Callable[..., list[Row]], tmp_path: Path) -> None:
    whole = bytearray(tar([("a.jpg", b"x" * 600), ("b.jpg", b"y")]))
    whole[1536 + 3] ^= 1
    (tmp_path / "x.tar").write_bytes(whole)
    found = tar_rows(Storage(str(tmp_path / "x.tar")))
    assert next(found) == Row("a", b"x" * 600)
    with pytest.raises(DatasetError, match="damaged: bad checksum"):
        next(found)
    for content in (b"", b"no tar at all", bytes(range(256)) * 8):
        with pytest.raises(DatasetError, match="damaged"):
            read(content)
    packed = bytearray(gzip.compress(tar(PHOTOS)))
    packed[-6] ^= 1  # of the checksum
    with pytest.raises(DatasetError, match=r"x\.tar\.gz .*damaged: CRC"):
        read(packed, "x.tar.gz")


def test_a_header_that_would_fill_memory_is_refused(read: Callable[..., list[Row]]) -> None:
    header = tarfile.TarInfo("PaxHeaders/x")
    header.type, header.size = tarfile.XHDTYPE, 2**33
    with pytest.raises(DatasetError, match="damaged: a header of 8,589,934,592 bytes"):
        read(header.tobuf(tarfile.GNU_FORMAT) + b"1" * 4096)


def test_two_members_of_one_name_are_refused(read: Callable[..., list[Row]]) -> None:
    with pytest.raises(DatasetError, match=r"x\.tar holds a\.jpg twice"):
        read(tar([("a.jpg", b"1"), ("a.jpg", b"2")]))


def test_a_tar_without_pictures_is_refused(read: Callable[..., list[Row]]) -> None:
    with pytest.raises(DatasetError, match=r"x\.tar holds 2 files, but no pictures\. Known endings: .*\.jpg"):
        read(tar([("a.txt", b"1"), ("b", b"2")]))


@pytest.mark.parametrize("name", ["x.tar", "x.tgz", "x.parquet"])
def test_a_storage_that_fails_is_no_damage(name: str, memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class File(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            raise ConnectionResetError("reset")

    monkeypatch.setattr(MemoryFileSystem, "open", lambda *_: File(b"x" * 1000))
    storage = Storage(f"{memory}/{name}")
    with pytest.raises(StorageError, match=f"{name} cannot be read: ConnectionResetError: reset"):
        list(parquet_cells(storage, "image", None) if name == "x.parquet" else tar_rows(storage))


def test_only_the_picture_is_at_fault_where_its_file_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = Storage(str(tmp_path))
    storage.write("a", b"12345")
    assert read_picture(storage, "a") == b"12345"
    monkeypatch.setattr(module, "MAX_BYTES", 4)
    problems = [read_picture(storage, name) for name in ("a", "b", "")]
    assert all(isinstance(problem, ImageReadError) for problem in problems)
    said = [str(problem).split("cannot")[-1].split("does")[-1] for problem in problems]
    assert [text.split(". ")[0] for text in said] == [
        *(" be read: larger than 4 bytes", " not exist"),
        " be read: not a regular file",
    ]


@pytest.fixture
def cells(tmp_path: Path) -> Callable[..., list[Cell]]:
    def cells(columns: Any, image: str = "image", key: str | None = None, **options: Any) -> list[Cell]:
        path = tmp_path / "some.v1.parquet"
        table = columns if isinstance(columns, pa.Table) else pa.table(columns)
        pq.write_table(table, path, **options)
        return list(parquet_cells(Storage(str(path)), image, key))

    return cells


BYTES = (b"1", b"", b"\xff" * 100)


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.dictionary(pa.int8(), pa.binary())])
def test_a_column_of_bytes(kind: Any, cells: Callable[..., list[Cell]]) -> None:
    images = pa.array(BYTES, pa.binary()).cast(kind)
    assert cells({"image": images}) == [Cell(f"some.v1/{i}", value) for i, value in enumerate(BYTES)]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
def test_a_column_of_paths(kind: Any, cells: Callable[..., list[Cell]]) -> None:
    found = cells({"file": pa.array(["a.jpg", "/b.jpg"], kind), "id": [7, 8]}, "file", "id")
    assert found == [Cell("7", "a.jpg"), Cell("8", "/b.jpg")]
    assert cells({"file": pa.array(["a.jpg"], kind)}, "file", "file") == [Cell("a.jpg", "a.jpg")]


def test_a_column_as_datasets_writes_it(cells: Callable[..., list[Cell]]) -> None:
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    values = [{"bytes": b"1", "path": "x.jpg"}, {"bytes": None, "path": "y.jpg"}, {"bytes": None, "path": None}, None]
    found = cells({"image": pa.array(values, kind), "label": [1, 2, 3, 4]})
    assert [cell.value for cell in found[:2]] == [b"1", "y.jpg"]
    assert all(isinstance(cell.value, ImageReadError) for cell in found[2:])
    assert [str(cell.value) for cell in found[2:]] == [str(found[i].value).replace("Row 2", f"Row {i}") for i in (2, 3)]
    assert "has no picture" in str(found[3].value)


def test_keys_are_texts_or_integers_and_may_be_missing(cells: Callable[..., list[Cell]]) -> None:
    assert [cell.key for cell in cells({"image": BYTES, "id": ["x", None, "ü/y"]}, key="id")] == ["x", "some.v1/1", "ü/y"]
    assert [cell.key for cell in cells({"image": BYTES, "id": [b"x", b"\xe9", b""]}, key="id")] == ["x", "\\xe9", ""]
    assert [cell.key for cell in cells({"image": BYTES, "id": pa.array([1, None, 2**63], pa.uint64())}, key="id")] == [
        *("1", "some.v1/1", str(2**63))
    ]


def test_row_groups_of_any_size_give_all_rows(cells: Callable[..., list[Cell]], monkeypatch: pytest.MonkeyPatch) -> None:
    values = [bytes([i]) * 50 for i in range(100)]
    monkeypatch.setattr(module, "_BATCH_BYTES", 500)
    for options in ({}, {"row_group_size": 1}, {"row_group_size": 7}, {"use_dictionary": False, "data_page_size": 100}):
        found = cells({"image": values}, **options)
        assert [cell.value for cell in found] == values
        assert [cell.key for cell in found] == [f"some.v1/{i}" for i in range(100)]
    assert cells({"image": pa.array([], pa.binary())}) == []


def test_a_huge_picture_in_a_column_is_a_row_with_an_error(
    cells: Callable[..., list[Cell]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_BYTES", 10)
    huge, small = cells({"image": [b"x" * 11, b"x" * 10]})
    assert "larger than 10 bytes" in str(huge.value)
    assert small.value == b"x" * 10


@pytest.mark.parametrize(
    ("columns", "image", "key", "said"),
    [
        ({"picture": BYTES, "id": [1, 2, 3]}, "image", None, r"no column 'image'\. Choose of 'picture', 'id'"),
        ({"image": BYTES}, "image", "id", r"no column 'id'\. Choose of 'image'"),
        ({"image": [1, 2, 3]}, "image", None, "'image' of .* holds int64. Pictures are bytes, paths"),
        ({"image": [[b"1"], [], []]}, "image", None, "'image' of .* holds list"),
        ({"image": [{"width": 3}] * 3}, "image", None, "'image' of .* holds struct"),
        ({"image": [{"bytes": 3}] * 3}, "image", None, "'image' of .* holds struct"),
        ({"image": BYTES, "id": [1.0, 2.0, 3.0]}, "image", "id", "'id' of .* holds double. Keys are texts or integers"),
        (pa.table([BYTES, BYTES], ["image", "image"]), "image", None, "two columns 'image'"),
    ],
)
def test_columns_that_will_not_do_are_named(
    columns: Any, image: str, key: str | None, said: str, cells: Callable[..., list[Cell]]
) -> None:
    with pytest.raises(DatasetError, match=said):
        cells(columns, image, key)


def test_damaged_parquet_is_named(cells: Callable[..., list[Cell]], tmp_path: Path) -> None:
    path = tmp_path / "some.v1.parquet"
    cells({"image": [bytes([i]) * 1000 for i in range(200)]}, compression="zstd", use_dictionary=False)
    whole = path.read_bytes()
    middle = bytearray(whole)
    middle[20:60] = bytes(40)
    text = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(struct.pack("<ii", 0, 1)), pa.py_buffer(b"\xff")])
    for content in (b"", b"PAR1", whole[:-1], whole[: len(whole) // 2], bytes(middle), b"x" * 100):
        path.write_bytes(content)
        with pytest.raises(DatasetError, match=r"some\.v1\.parquet is damaged, or no Parquet file"):
            list(parquet_cells(Storage(str(path)), "image", None))
    with pytest.raises(DatasetError, match=r"some\.v1\.parquet is damaged, or no Parquet file"):
        cells({"image": text})


def test_a_missing_pyarrow_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'tokenflow-sdk\[dataset\]'"):
        next(parquet_cells(Storage(str(tmp_path / "x.parquet")), "image", None))
