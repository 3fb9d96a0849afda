from __future__ import annotations

import errno
import io
import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from tests.support.mutations import SPECIAL, no_hang
from tokenflow_sdk.dataset import storage as module
from tokenflow_sdk.dataset.storage import Entry, Storage
from tokenflow_sdk.errors import ArgumentError, DatasetFileError, MissingPackageError, OutputError, StorageError


def test_what_is_written_is_found_listed_and_read(place: str) -> None:
    storage = Storage(place)
    storage.write("b.txt", b"two")
    storage.write("empty", b"")
    with storage.new_file("deep/er/a.bin") as path:
        path.write_bytes(b"one")
    assert sorted((name, is_directory) for name, is_directory, _ in storage.scan()) == [
        ("b.txt", False),
        ("deep", True),
        ("empty", False),
    ]
    assert [entry.name for entry in storage.scan("deep/er")] == ["a.bin"]
    assert storage.find("deep/er/a.bin") == Entry("a.bin", False, 3)
    assert [getattr(storage.find(name), "is_directory", None) for name in ("", "deep", "nothing", "b.txt/x")] == [
        *(True, True),
        *(None, None),
    ]
    assert (storage.read("b.txt"), storage.read("empty"), storage.read("b.txt", 3, 3)) == (b"two", b"", b"two")
    with storage.open("deep/er/a.bin") as file:
        assert (file.read(1), file.seek(-1, os.SEEK_END), file.read(), file.read()) == (b"o", 2, b"e", b"")
    assert Storage(storage.path("b.txt")).read() == b"two"


def test_files_are_replaced_and_deleted(place: str) -> None:
    storage = Storage(place)
    storage.write("a", b"old")
    with storage.new_file("a") as path:
        path.write_bytes(b"new")
    assert storage.read("a") == b"new"
    storage.write("a", b"newest")
    assert storage.read("a") == b"newest"
    storage.delete("a")
    storage.delete("a")
    assert list(storage.scan()) == []


def test_a_file_that_fails_half_way_does_not_appear(place: str) -> None:
    storage = Storage(place)
    storage.write("a", b"old")
    with pytest.raises(KeyboardInterrupt), storage.new_file("a") as path:
        path.write_bytes(b"half")
        raise KeyboardInterrupt
    assert storage.read("a") == b"old"
    assert [entry.name for entry in storage.scan()] == ["a"]


def test_a_copy_for_another_process_is_of_the_same_place(place: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    storage = Storage(place)
    storage.write("a", b"one")
    assert pickle.loads(pickle.dumps(storage)).read("a") == b"one"  # noqa: S301
    monkeypatch.chdir(tmp_path)
    assert Storage("photos").address == str(tmp_path / "photos")
    assert Storage((tmp_path / "a b").as_uri()).address == str(tmp_path / "a b")


def test_only_what_killed_processes_left_is_deleted(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    storage.write("kept", b"")
    storage.write(".kept", b"")
    with storage.new_file("done/a") as path:
        path.write_bytes(b"")
        (tmp_path / "done" / "killed").hardlink_to(path)
    left = (tmp_path / "done" / "killed").rename(path)
    storage.delete_leftovers()
    storage.delete_leftovers("done", names=["b", ".a"])
    assert left.exists()
    storage.delete_leftovers("done", names=["a"])
    assert not left.exists()
    left.write_bytes(b"")
    storage.delete_leftovers("done")
    storage.delete_leftovers("nothing")
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == [".kept", "done", "done/a", "kept"]


@pytest.mark.skipif(not hasattr(os, "symlink"), reason="no links")
def test_links_to_directories_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "file").symlink_to(Path(__file__))
    (tmp_path / "broken").symlink_to("nowhere")
    storage = Storage(str(tmp_path))
    assert sorted(entry.name for entry in storage.scan()) == ["broken", "file"]
    assert storage.find("broken") is None


CALLS: dict[str, Callable[[Storage], object]] = {
    "read": lambda storage: storage.read("x"),
    "open": lambda storage: storage.open("x"),
    "scan": lambda storage: list(storage.scan("x")),
}


@pytest.mark.parametrize("call", CALLS)
def test_what_is_missing_is_named(call: str, place: str) -> None:
    with pytest.raises(DatasetFileError, match=r"x does not exist\. Check the path"):
        CALLS[call](Storage(place))


@pytest.mark.parametrize("name", ["x\0y", "x" * 300])
def test_names_that_no_local_file_can_have_are_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(DatasetFileError, match="cannot be read: (embedded null byte|File name too long)"):
        Storage(str(tmp_path)).read(name)
    with pytest.raises(OutputError, match="cannot be written"):
        Storage(str(tmp_path)).write(name, b"")


@pytest.mark.parametrize("kind", SPECIAL)
def test_pipes_and_directories_are_refused_at_once(kind: Callable[[Path], object], tmp_path: Path) -> None:
    kind(tmp_path / "x")
    with no_hang(), pytest.raises(DatasetFileError, match="cannot be read"):
        Storage(str(tmp_path)).read("x")


def test_a_file_has_a_limit(place: str) -> None:
    storage = Storage(place)
    storage.write("a", b"four")
    assert storage.read("a", 4) == b"four"
    for size in (None, 4):
        with pytest.raises(DatasetFileError, match="larger than 3 bytes"):
            storage.read("a", 3, size)


@pytest.mark.parametrize(
    ("code", "kind"), [(errno.EIO, StorageError), (errno.EMFILE, StorageError), (errno.EACCES, DatasetFileError)]
)
@pytest.mark.parametrize("call", CALLS)
def test_a_disk_that_fails_is_told_from_a_file(
    code: int, kind: type[Exception], call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(module.os, "scandir", fail)
    monkeypatch.setattr(module, "read_regular", fail)
    monkeypatch.setattr(module, "open_regular", fail)
    with pytest.raises(kind, match=os.strerror(code)) as raised:
        CALLS[call](Storage(str(tmp_path)))
    assert type(raised.value) is kind


class NoCredentialsError(Exception):
    """As botocore's, it is no OSError."""


@pytest.mark.parametrize(
    "error", [NoCredentialsError("Unable to locate credentials\nmore"), PermissionError("Access Denied"), TimeoutError()]
)
def test_a_service_that_fails_is_named(error: Exception, memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    storage = Storage(memory)
    storage.write("x", b"1")
    names = ("cat_file", "open", "ls", "pipe_file", "put_file", "rm_file", "info")
    for name in names:
        monkeypatch.setattr(MemoryFileSystem, name, fail)
    said = f"{type(error).__name__}.*that this machine has credentials"
    for call in (*CALLS.values(), lambda storage: storage.find("x")):
        with pytest.raises(StorageError, match=f"{memory}/x cannot be read: {said}"):
            call(storage)
    with pytest.raises(OutputError, match=f"{memory}/x cannot be written: {said}"):
        storage.write("x", b"")
    with pytest.raises(OutputError, match=f"{memory}/x cannot be written: {said}"):
        storage.delete("x")
    with pytest.raises(OutputError, match=f"{memory}/x cannot be written: {said}"), storage.new_file("x") as path:
        path.touch()


def test_an_object_that_may_not_be_read_is_told_from_credentials_that_have_ended(
    memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise PermissionError("The operation is not valid for the object's storage class")

    storage = Storage(memory)
    storage.write("x", b"1")
    monkeypatch.setattr(MemoryFileSystem, "cat_file", fail)
    with pytest.raises(DatasetFileError, match=r"x cannot be read: PermissionError: .*\. .*restore it from its archive"):
        storage.read("x", 9, 1)
    monkeypatch.setattr(MemoryFileSystem, "info", fail)
    with pytest.raises(StorageError, match="credentials"):
        storage.read("x", 9, 1)


def test_an_open_file_whose_service_fails_is_named(memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class File(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            raise ConnectionResetError("reset")

        def seek(self, *_: Any) -> int:
            raise ConnectionResetError("reset")

    monkeypatch.setattr(MemoryFileSystem, "open", lambda *_: File())
    with Storage(memory).open("x") as file:
        with pytest.raises(StorageError, match="x cannot be read: ConnectionResetError: reset"):
            file.read()
        with pytest.raises(StorageError, match="x cannot be read: ConnectionResetError: reset"):
            file.seek(3)


@pytest.mark.parametrize("failure", ["full", "read-only"])
def test_a_target_that_cannot_be_written_is_named(failure: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC if failure == "full" else errno.EROFS, failure)

    storage = Storage(str(tmp_path))
    monkeypatch.setattr(module.os, "fsync", fail)
    with pytest.raises(OutputError, match=f"a cannot be written: {failure}"), storage.new_file("a") as path:
        path.touch()
    with pytest.raises(OutputError, match=f"a cannot be written: {failure}"):
        storage.write("a", b"")
    assert list(storage.scan()) == []
    storage = Storage(__file__)
    with pytest.raises(OutputError, match="cannot be written"), storage.new_file("a"):
        raise AssertionError


def test_missing_packages_and_unknown_schemes_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ArgumentError, match="nope://x cannot be opened: Protocol not known"):
        Storage("nope://x").find()

    def lacking(*_: object, **__: object) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr("fsspec.core.url_to_fs", lacking)
    with pytest.raises(MissingPackageError, match=r"s3://x cannot be opened: .* Run `pip install s3fs`"):
        Storage("s3://x").find()
    monkeypatch.setitem(sys.modules, "fsspec.core", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'tokenflow-sdk\[dataset\]'"):
        Storage("s3://x").find()
