from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import GeneratorType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from tests.support.mutations import no_hang
from tokenflow_sdk.dataset import inputs as module
from tokenflow_sdk.dataset import storage as storage_module
from tokenflow_sdk.dataset.inputs import InputOptions, Row, Shard, find_shards, read_shard
from tokenflow_sdk.dataset.storage import Storage
from tokenflow_sdk.errors import ArgumentError, DatasetError, ImageReadError, StorageError

PHOTOS = ("a/1.png", "a/2.png", "a.jpg", "b/c/3.webp", "d.jpg")


@pytest.fixture
def photos(place: str) -> Storage:
    """Five pictures, each with its path as content, and what is no picture."""
    storage = Storage(f"{place}/photos")
    for name in (*PHOTOS, "notes.txt", ".hidden.jpg", "a/._1.png"):
        storage.write(name, name.encode())
    return storage


def tar(*names: str) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = len(name)
            archive.addfile(info, io.BytesIO(name.encode()))
    return content.getvalue()


def parquet(columns: Any) -> bytes:
    content = io.BytesIO()
    pq.write_table(pa.table(columns), content)
    return content.getvalue()


def read(inputs: Sequence[str], options: InputOptions | None = None, threads: int = 2) -> list[list[Row]]:
    """The rows of each shard, which goes through JSON first."""
    shards = list(find_shards(inputs, options))
    assert [shard.index for shard in shards] == list(range(len(shards)))
    copies = [Shard.from_json(json.loads(json.dumps(shard.to_json()))) for shard in shards]
    assert copies == shards
    return [list(read_shard(shard, options, threads)) for shard in copies]


def rows_of(*names: str) -> list[Row]:
    return [Row(name, name.encode()) for name in names]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 100])
def test_a_directory_is_cut_into_shards(photos: Storage, size: int) -> None:
    found = read([photos.address], InputOptions(shard_size=size))
    assert found == [rows_of(*PHOTOS[i : i + size]) for i in range(0, len(PHOTOS), size)]


def test_shards_are_read_in_any_order_and_again(photos: Storage) -> None:
    shards = list(find_shards([photos.address], InputOptions(shard_size=2)))
    assert [shard.count for shard in shards] == [2, 2, 1]
    for i in (2, 0, 0, 1, 2, 0, 1):
        assert list(read_shard(shards[i])) == rows_of(*PHOTOS[2 * i : 2 * i + 2])


def test_a_job_lists_a_directory_once_for_all_its_shards(photos: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = list(find_shards([photos.address], InputOptions(shard_size=1)))
    listed, scan = list[str](), Storage.scan
    monkeypatch.setattr(Storage, "scan", lambda self, directory="": (listed.append(directory), scan(self, directory))[1])
    assert [row for shard in shards for row in read_shard(shard)] == rows_of(*PHOTOS)
    assert listed == ["", "a", "b", "b/c"]
    assert len(module._walks) <= 2


def test_a_walk_over_many_shards_goes_no_deeper(photos: Storage) -> None:
    """Nested iterators would be slower with each shard, and end the process after enough of them."""
    for shard in find_shards([photos.address], InputOptions(shard_size=1)):
        list(read_shard(shard))
        for _, walked in module._walks.values():
            assert type(walked) is GeneratorType


def test_the_same_pictures_have_the_same_fingerprint_wherever_they_lie(photos: Storage, place: str) -> None:
    other = Storage(f"{place}/other")
    for name in PHOTOS:
        other.write(name, name.encode())
    prints = [[shard.fingerprint for shard in find_shards([each.address])] for each in (photos, other)]
    assert prints[0] == prints[1]
    other.write("d.jpg", b"longer")
    assert [shard.fingerprint for shard in find_shards([other.address])] != prints[0]


def test_tars_and_parquet_files_are_a_shard_each(place: str) -> None:
    storage = Storage(place)
    storage.write("x/1.tar", tar("a.jpg", "b.jpg"))
    storage.write("x/2.parquet", parquet({"image": [b"1", b"2"], "id": [5, 6]}))
    names = [storage.path("x/1.tar"), storage.path("x/2.parquet")]
    assert read(names, InputOptions(key_column="id")) == [
        [Row("a", b"a.jpg"), Row("b", b"b.jpg")],
        [Row("5", b"1"), Row("6", b"2")],
    ]
    assert [shard.kind for shard in find_shards([storage.path("x/*")])] == ["tar", "parquet"]
    assert [row.key for row in read([names[1]])[0]] == ["2/0", "2/1"]


def test_signed_addresses_are_told_by_what_is_before_the_signature() -> None:
    kinds = [module._kind(f"https://host/x{ending}?sig=a*b.jpg") for ending in (".tar", ".tgz", ".parquet", ".jpg")]
    assert kinds == ["tar", "tar", "parquet", "files"]
    assert not module._is_pattern("https://host/x.tar?sig=a*b")
    assert module._kind("what?.tar") == "tar"


def test_inputs_stay_apart_and_in_their_order(photos: Storage, place: str) -> None:
    storage = Storage(place)
    storage.write("1.tar", tar("a.jpg"))
    named = [photos.path("d.jpg"), photos.path("a.jpg")]
    found = read([photos.path("a"), storage.path("1.tar"), *named, photos.path("b"), photos.path("a/2.png")], InputOptions(3))
    keys = [[row.key for row in rows] for rows in found]
    assert keys == [["1.png", "2.png"], ["a"], named, ["c/3.webp"], [photos.path("a/2.png")]]
    assert [len(rows) for rows in read([photos.path(name) for name in PHOTOS], InputOptions(2))] == [2, 2, 1]


def test_relative_names_are_found_from_another_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "a.jpg").write_bytes(b"1")
    monkeypatch.chdir(tmp_path)
    shards = [shard for name in ("one/a.jpg", "one", "o*/*.jpg", "*/a.jpg", "./*/a.jpg") for shard in find_shards([name])]
    monkeypatch.chdir(tmp_path / "one")
    keys = ["one/a.jpg", "a.jpg", "one/a.jpg", "one/a.jpg", "one/a.jpg"]
    assert [list(read_shard(shard)) for shard in shards] == [[Row(key, b"1")] for key in keys]


def test_patterns_are_searched_as_directories_are(photos: Storage) -> None:
    assert read([photos.path("**/*.png")]) == [rows_of("a/1.png", "a/2.png")]
    assert read([photos.path("*")]) == [rows_of("a.jpg", "d.jpg")]
    assert read([photos.path("a/?.png")], InputOptions(1)) == [[Row("1.png", b"a/1.png")], [Row("2.png", b"a/2.png")]]


def test_a_jobs_own_output_is_no_input_of_it(place: str, tmp_path: Path) -> None:
    storage = Storage(f"{place}/data")
    for name in ("x/1.tar", "codes/00000.tar", "codes/deep/2.tar", "codes-2/3.tar", "codes/4.jpg"):
        storage.write(name, tar("a.jpg"))
    pattern = storage.path("**/*")

    def found(given: Storage) -> list[str]:
        return [shard.where for shard in find_shards([pattern], output=given)]

    others = [storage.path(name) for name in ("codes-2/3.tar", "x/1.tar")]
    assert [name for name in found(Storage(storage.path("codes"))) if name.endswith(".tar")] == others
    assert len(found(Storage(f"{place}/other"))) == len(list(find_shards([pattern])))
    if storage.is_local:
        (tmp_path / "link").symlink_to(storage.address)
        assert found(Storage(str(tmp_path / "link" / "codes"))) == found(Storage(storage.path("codes")))


def test_lists_in_braces_are_written_out(place: str) -> None:
    storage = Storage(place)
    for number in range(8, 12):
        storage.write(f"x-{number:03}.tar", tar(f"{number}.jpg"))
    assert [rows[0].key for rows in read([storage.path("x-{008..011}.tar")])] == ["8", "9", "10", "11"]
    assert [rows[0].key for rows in read([storage.path("x-{011..010}.tar")])] == ["11", "10"]
    assert [rows[0].key for rows in read([storage.path("x-0{10,08}.tar")])] == ["10", "8"]
    assert [*module._written_out("{a,b}{1..2}")] == ["a1", "a2", "b1", "b2"]
    assert [*module._written_out("x{9..10}{}{y}")] == ["x9{}{y}", "x10{}{y}"]
    assert [*module._written_out("{0..10..}")] == ["{0..10..}"]
    assert [*module._written_out("{9..011}")] == ["009", "010", "011"]
    assert [*module._written_out("{0..10}")] == [str(number) for number in range(11)]


def test_gaps_in_a_list_are_named(place: str) -> None:
    storage = Storage(place)
    for number in (0, 1, 3):
        storage.write(f"{number}.tar", tar("a.jpg"))
    with pytest.raises(DatasetError, match=r"2\.tar, .*4\.tar do not exist \(2 of 5\)\. .* takes those that there are"):
        read([storage.path("{0..4}.tar")])
    assert len(read([storage.path("*.tar")])) == 3


def test_files_may_have_the_names_of_patterns_and_lists(tmp_path: Path) -> None:
    for name in ("{1,2}.jpg", "[a].jpg", "*.jpg"):
        (tmp_path / name).write_bytes(b"1")
    for name in ("{1,2}.jpg", "[a].jpg", "*.jpg"):
        assert read([str(tmp_path / name)]) == [[Row(str(tmp_path / name), b"1")]]


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ([], "No input was given"),
        (["a.tar", "a.tar"], "a.tar was given twice"),
        (["{a,b,a}.tar"], "a.tar was given twice"),
        (["{0..99999999}.tar"], "more than 1,000,000 names"),
        (["{0..999}{0..999}{0..999}.tar"], "more than 1,000,000 names"),
    ],
)
def test_inputs_that_cannot_be_meant_are_refused(inputs: list[str], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST_NAMED", 1_000)
    with no_hang(), pytest.raises(ArgumentError, match=said.replace("1,000,000", "1,000")):
        list(find_shards(inputs))
    with pytest.raises(ArgumentError, match="shard_size=0 is no number of pictures"):
        InputOptions(shard_size=0)


def test_inputs_that_are_not_there_are_named(place: str) -> None:
    storage = Storage(place)
    storage.write("x.txt", b"")
    for name in ("nothing", "nothing.tar", "nothing/*.jpg"):
        with pytest.raises(DatasetError, match=r"nothing.* does not exist"):
            read([storage.path(name)])
    with pytest.raises(DatasetError, match=r"No picture, tar or Parquet file matches .*/\*\.jpg"):
        read([storage.path("*.jpg")])
    with pytest.raises(DatasetError, match=r"holds no pictures\. Known endings: .*\.jpg"):
        read([place])
    storage.write("y/1.tgz", tar())
    with pytest.raises(DatasetError, match=r"holds no pictures\. For the \.tgz files in it give a pattern: '.*/\*\.tgz'"):
        read([place])


def test_an_empty_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="holds no pictures"):
        read([str(tmp_path)])


def test_pictures_that_cannot_be_read_are_rows(tmp_path: Path) -> None:
    (tmp_path / "broken.jpg").symlink_to("nowhere")
    (tmp_path / "empty.jpg").touch()
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "link.jpg").symlink_to("empty.jpg")
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    with no_hang():
        (rows,) = read([str(tmp_path)])
    assert [row.key for row in rows] == ["broken.jpg", "empty.jpg", "link.jpg", "loop.jpg", "pipe.jpg"]
    assert [row.data if isinstance(row.data, bytes) else type(row.data) for row in rows] == [
        *(ImageReadError, b"", b""),
        *(ImageReadError, ImageReadError),
    ]


def test_names_that_are_no_utf8_are_keys_in_text(tmp_path: Path) -> None:
    try:
        (tmp_path / os.fsdecode(b"caf\xe9.jpg")).write_bytes(b"1")
    except OSError:
        pytest.skip("this file system has only names in UTF-8")
    assert read([str(tmp_path)]) == [[Row("caf\\xe9.jpg", b"1")]]
    assert read([str(tmp_path / "*.jpg")]) == [[Row("caf\\xe9.jpg", b"1")]]
    with pytest.raises(DatasetError, match=r"\\xe9\.jpg does not exist"):
        read([os.fsdecode(b"\xe9.jpg")])
    (tmp_path / os.fsdecode(b"\xe9.jpg")).symlink_to("nowhere")
    assert str(read([str(tmp_path)])[0][1].data).endswith("\\xe9.jpg does not exist. Check the path.")


def test_what_changes_between_finding_and_reading_is_noticed(photos: Storage, place: str) -> None:
    storage = Storage(place)
    storage.write("1.tar", tar("a.jpg"))
    storage.write("2.parquet", parquet({"image": [b"1"]}))
    inputs = [photos.address, storage.path("1.tar"), storage.path("2.parquet"), photos.path("d.jpg")]
    changed = [
        *(("photos/a/2.png", None), ("photos/a/2.png", b"longer"), ("photos/a/11.png", b"more"), ("1.tar", b"shorter")),
        *(("2.parquet", b"x"), ("photos/d.jpg", b"longer"), ("photos/d.jpg", None)),
    ]
    for name, content in changed:
        shards = list(find_shards(inputs))
        before = storage.read(name) if storage.find(name) else None
        storage.delete(name) if content is None else storage.write(name, content)
        with pytest.raises(DatasetError, match="has changed since the job's shards were found"):
            [list(read_shard(shard)) for shard in shards]
        storage.delete(name) if before is None else storage.write(name, before)
        assert [len(list(read_shard(shard))) for shard in shards] == [5, 1, 1, 1]


def test_a_walk_that_is_old_is_begun_anew(tmp_path: Path) -> None:
    for name in "abcd":
        (tmp_path / f"{name}.jpg").write_bytes(b"1")
    first, _ = find_shards([str(tmp_path)], InputOptions(2))
    assert len(list(read_shard(first))) == 2
    (tmp_path / "d.jpg").rename(tmp_path / "e.jpg")
    *_, last = find_shards([str(tmp_path)], InputOptions(2))
    assert [row.key for row in read_shard(last)] == ["c.jpg", "e.jpg"]


def test_a_directory_that_changes_while_it_is_read_costs_only_the_rows_that_have_gone(tmp_path: Path) -> None:
    for name in "abcdef":
        (tmp_path / f"{name}.jpg").write_bytes(b"1")
    (shard,) = find_shards([str(tmp_path)])
    rows = read_shard(shard, threads=1)
    assert next(rows) == Row("a.jpg", b"1")
    (tmp_path / "f.jpg").unlink()
    (tmp_path / "bb.jpg").touch()
    *others, last = rows
    assert [row.key for row in others] == ["b.jpg", "c.jpg", "d.jpg", "e.jpg"]
    assert (last.key, type(last.data)) == ("f.jpg", ImageReadError)


def test_paths_in_a_column_are_read_from_beside_the_file(place: str) -> None:
    storage = Storage(f"{place}/data")
    storage.write("photos/a.jpg", b"1")
    paths = ["photos/a.jpg", "nothing.jpg", storage.path("photos/a.jpg"), "https://example.com/a.jpg", "nope://a", "photos"]
    storage.write("x.parquet", parquet({"file": paths}))
    ((near, missing, whole, http, unknown, directory),) = read([storage.path("x.parquet")], InputOptions(image_column="file"))
    assert near.data == whole.data == b"1"
    assert "nothing.jpg does not exist" in str(missing.data)
    assert "is an address, not a file. Download the pictures first" in str(http.data)
    assert all(isinstance(row.data, ImageReadError) for row in (missing, http, unknown))
    if "://" not in place:
        assert isinstance(directory.data, ImageReadError)


def test_a_service_that_fails_is_raised_where_nothing_else_is_wished(memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = Storage(memory)
    for name in "abc":
        storage.write(f"{name}.jpg", b"1")
    (shard,) = find_shards([memory])
    plain: Callable[..., bytes] = MemoryFileSystem.cat_file

    def fail(self: MemoryFileSystem, path: str, **options: Any) -> bytes:
        if path.endswith("b.jpg"):
            raise ConnectionResetError("reset")
        return plain(self, path, **options)

    monkeypatch.setattr(MemoryFileSystem, "cat_file", fail)
    rows = read_shard(shard, threads=2)
    assert next(rows) == Row("a.jpg", b"1")
    with pytest.raises(StorageError, match=r"b\.jpg cannot be read: ConnectionResetError"):
        next(rows)

    def given(read: Callable[[], Any]) -> Any:
        try:
            return read()
        except StorageError as error:
            return error

    assert [type(row.data) for row in read_shard(shard, threads=2, reading=given)] == [bytes, StorageError, bytes]
    monkeypatch.setattr(MemoryFileSystem, "cat_file", plain)
    assert len(list(read_shard(shard))) == 3


def test_local_inputs_need_no_fsspec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_module.Storage, "_filesystem", None)
    (tmp_path / "a.jpg").write_bytes(b"1")
    (tmp_path / "1.tar").write_bytes(tar("a.jpg"))
    assert len(read([str(tmp_path), str(tmp_path / "1.tar")])) == len(read([str(tmp_path / "*")])) == 2
