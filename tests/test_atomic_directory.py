from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tokenflow_sdk.atomic_directory import DirectoryKind, atomic_directory
from tokenflow_sdk.bundle.bundle import MANIFEST
from tokenflow_sdk.errors import MissingPackageError, OutputError


def write(out: Path, text: str = "new", force: bool = False) -> None:
    with atomic_directory(out, force, 10) as staging:
        (staging / MANIFEST).write_text(text)


def test_what_a_killed_export_left_is_deleted_by_the_next_one(tmp_path: Path) -> None:
    script = (
        "import os, sys; from pathlib import Path; from tokenflow_sdk.atomic_directory import atomic_directory\n"
        "with atomic_directory(Path(sys.argv[1]), False, 10) as staging:\n"
        "    (staging / 'x').write_bytes(b'0'); os._exit(1)"
    )
    subprocess.run([sys.executable, "-c", script, tmp_path / "b"], check=False)
    other = tmp_path / ".b-2.export-abcdefgh"  # of an export to b-2
    other.mkdir()
    assert list(tmp_path.glob(".b.export-*/new/x"))
    write(tmp_path / "b")
    assert sorted(os.listdir(tmp_path)) == [other.name, "b"]


def test_a_bundle_that_was_being_replaced_comes_back(tmp_path: Path) -> None:
    """The export was killed after the old bundle had moved away and before the new one had moved in."""
    old = tmp_path / ".b.export-abcdefgh" / "old"
    old.mkdir(parents=True)
    (old / MANIFEST).write_text("old")
    with pytest.raises(KeyError), atomic_directory(tmp_path / "b", True, 10):
        raise KeyError
    assert (tmp_path / "b" / MANIFEST).read_text() == "old"
    assert os.listdir(tmp_path) == ["b"]


@pytest.mark.parametrize("force", [False, True])
def test_a_second_export_to_the_same_place_is_refused_at_once(force: bool, tmp_path: Path) -> None:
    if force:
        write(tmp_path / "b", "old")
    with atomic_directory(tmp_path / "b", force, 10) as staging:
        (staging / MANIFEST).write_text("first")
        with pytest.raises(OutputError, match=r"Another process writes .*b\. Wait"):
            write(tmp_path / "b", "second", force)
        write(tmp_path / "b-2")
    assert (tmp_path / "b" / MANIFEST).read_text() == "first"
    assert sorted(os.listdir(tmp_path)) == ["b", "b-2"]


@pytest.mark.parametrize("target", ["nowhere", "b"])
def test_symbolic_links_are_not_replaced(target: str, tmp_path: Path) -> None:
    write(tmp_path / "b", "old")
    (tmp_path / "link").symlink_to(target)
    with pytest.raises(OutputError, match=f"link is a symbolic link. Give the path that it stands for, .*{target}"):
        write(tmp_path / "link", force=True)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "b" / MANIFEST).read_text() == "old"


def test_paths_are_where_they_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "b", "old")
    monkeypatch.chdir(tmp_path / "b")
    write(Path("..") / "c")
    write(Path("../b"), force=True)
    assert sorted(os.listdir(tmp_path)) == ["b", "c"]
    assert (tmp_path / "b" / MANIFEST).read_text() == "new"


def test_a_file_system_without_locks_is_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*arguments: object, **options: object) -> None:
        raise NotImplementedError

    monkeypatch.setattr("filelock.FileLock.acquire", no_locks)
    write(tmp_path / "b")
    assert (tmp_path / "b" / MANIFEST).read_text() == "new"


@pytest.mark.parametrize("name", ["n" * 250, "file/x"])
def test_places_that_cannot_be_written_are_named(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match=f"Writing .*{name} failed"):
        write(tmp_path / name)


def test_without_filelock_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "filelock", None)
    with pytest.raises(MissingPackageError, match="Writing a bundle needs filelock"):
        write(tmp_path / "b")
    assert os.listdir(tmp_path) == []


def test_another_kind_of_directory_is_told_by_its_own_rule(tmp_path: Path) -> None:
    notes = DirectoryKind("notebook", lambda path: (path / "notes").exists(), "--notes")
    write(tmp_path / "b")
    with (
        pytest.raises(OutputError, match="b is not a notebook, so it is not replaced. Choose another --notes"),
        atomic_directory(tmp_path / "b", True, 10, notes),
    ):
        pass
    assert (tmp_path / "b" / MANIFEST).read_text() == "new"
