from __future__ import annotations

import glob
from collections.abc import Iterator
from pathlib import Path

import pytest

from tokenflow_sdk.dataset import walking
from tokenflow_sdk.dataset.storage import Entry, Storage
from tokenflow_sdk.dataset.walking import Listed, walk
from tokenflow_sdk.errors import DatasetFileError

FILES = ("a.jpg", "a/2.jpg", "a/10.JPG", "a/b/c/x.png", "a-b.jpg", "a.b/x.jpg", "b/x.txt", "z.png", "ä/ö.jpg")
HIDDEN = (".x.jpg", "._a.jpg", ".h/x.jpg", "a/.h/x.jpg")


def tree(place: str, files: tuple[str, ...] = (*FILES, *HIDDEN)) -> Storage:
    """Each file has as many bytes as its name has letters."""
    storage = Storage(place)
    for name in files:
        storage.write(name, b"x" * len(name))
    return storage


def in_order(files: tuple[str, ...]) -> list[str]:
    return sorted((name for name in files if not name.endswith(".txt")), key=lambda name: name.split("/"))


@pytest.mark.parametrize("window", [1, 2, 100])
def test_files_come_in_the_order_of_their_parts_whatever_is_in_memory(
    place: str, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(walking, "_WINDOW", window)
    assert list(walk(tree(place), (".jpg", ".png"))) == [Listed(name, len(name)) for name in in_order(FILES)]


@pytest.mark.parametrize("window", [1, 100])
def test_a_walk_begins_at_any_path(place: str, window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(walking, "_WINDOW", window)
    storage, every = tree(place), in_order(FILES)
    for i, first in enumerate(every):
        assert [path for path, _ in walk(storage, (".jpg", ".png"), first=first)] == every[i:]
    storage.delete("a/b/c/x.png")
    assert [path for path, _ in walk(storage, (".jpg", ".png"), first="a/b/c/x.png")] == every[every.index("a/b/c/x.png") + 1 :]


@pytest.mark.parametrize(
    "pattern", ["*", "*/*", "**/*.jpg", "a/**", "a/*/c/*.png", "**/c/**/*.png", "?.jpg", "[az].*", "a*/*", "**", "nothing/*"]
)
def test_patterns_fit_what_glob_finds(pattern: str, tmp_path: Path) -> None:
    storage = tree(str(tmp_path))
    found = glob.glob(pattern, root_dir=tmp_path, recursive=True)  # noqa: PTH207 - what a shell would find
    expected = [name for name in in_order(FILES) if name in found]
    assert [path for path, _ in walk(storage, (".jpg", ".jpg", ".png"), pattern)] == expected


def test_only_directories_that_can_hold_something_are_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage, listed = tree(str(tmp_path)), list[str]()
    scan = Storage.scan
    monkeypatch.setattr(Storage, "scan", lambda self, directory="": (listed.append(directory), scan(self, directory))[1])
    assert len(list(walk(storage, (".png",), "a/*/c/*.png"))) == 1
    assert listed == ["", "a", "a/b", "a/b/c"]


def test_loops_end_and_deep_directories_are_walked(tmp_path: Path) -> None:
    deep = tmp_path.joinpath(*"d" * 500)
    deep.mkdir(parents=True)
    (deep / "loop").symlink_to(tmp_path)
    (deep / "x.jpg").touch()
    assert len(list(walk(Storage(str(tmp_path)), (".jpg",)))) == 1


def test_names_alone_are_walked_without_a_look_at_each_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = tree(str(tmp_path))
    monkeypatch.setattr(Storage, "find", lambda self, name="": pytest.fail(name))
    assert [path for path, _ in walk(storage, (".jpg", ".png"), sizes=False)] == in_order(FILES)


def test_what_has_gone_meanwhile_has_no_size(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.jpg").write_bytes(b"1")
    found = walk(Storage(str(tmp_path)), (".jpg",))
    assert next(found) == ("a.jpg", 1)
    (tmp_path / "b.jpg").unlink()
    assert list(found) == [("b.jpg", 0)]
    with pytest.raises(DatasetFileError, match="nowhere does not exist"):
        next(walk(Storage(str(tmp_path / "nowhere")), (".jpg",)))


class Name(str):
    """A name that is counted as long as it is in memory."""

    alive = most = 0

    def __new__(cls, text: str) -> Name:
        cls.alive += 1
        cls.most = max(cls.most, cls.alive)
        return super().__new__(cls, text)

    def __del__(self) -> None:
        Name.alive -= 1


def listing(directory: str, directories: int, count: int) -> Iterator[Entry]:
    """Directories of so many pictures each, in no order."""
    if not directory:
        return (Entry(f"d{i * 7 % directories:03}", True, None) for i in range(directories))
    return (Entry(Name(f"{i * 7919 % count:06}.jpg"), False, 1) for i in range(count))


@pytest.mark.parametrize(("directories", "each", "window"), [(100, 500, 1000), (1, 10_000, 3_000)])
def test_memory_does_not_grow_with_the_number_of_pictures(
    directories: int, each: int, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Storage, "scan", lambda _, directory="": listing(directory, directories, each))
    monkeypatch.setattr(walking, "_WINDOW", window)
    Name.most = 0
    count, last = 0, ""
    for path, _ in walk(Storage("."), (".jpg",)):
        assert path > last
        count, last = count + 1, path
    assert count == directories * each
    assert Name.most <= window + 10
