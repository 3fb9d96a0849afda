from __future__ import annotations

import errno
import hashlib
import os
import stat
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.mutations import SPECIAL, no_hang
from tokenflow_sdk import files
from tokenflow_sdk.errors import OutputError
from tokenflow_sdk.files import file_sha256, open_regular, read_regular, reason, write_atomic


def test_writes_with_the_mode_that_open_would_give(tmp_path: Path) -> None:
    write_atomic(tmp_path / "a", b"one")
    (tmp_path / "b").write_bytes(b"")
    assert (tmp_path / "a").read_bytes() == b"one"
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == stat.S_IMODE((tmp_path / "b").stat().st_mode)


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    failure: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_atomic(tmp_path / "a", b"old")

    def fail(handle: int) -> None:
        raise failure

    monkeypatch.setattr(files.os, "fsync", fail)
    expected = OutputError if isinstance(failure, OSError) else KeyboardInterrupt
    with pytest.raises(expected, match="No space left" if expected is OutputError else None):
        write_atomic(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_directory_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="Permission denied"):
        write_atomic(tmp_path / "a", b"one")


def test_only_files_are_replaced(tmp_path: Path) -> None:
    """As root, a rename would replace the device itself."""
    os.mkfifo(tmp_path / "pipe")
    for target in (tmp_path / "pipe", tmp_path):
        with pytest.raises(OutputError, match="is not a file that can be replaced"):
            write_atomic(target, b"one")
    assert os.listdir(tmp_path) == ["pipe"]


@pytest.mark.parametrize("name", ["猫" * 80 + ".tfc", "é" * 127, "a" * 255, "\U0001f600" * 63])
def test_every_name_that_the_file_system_takes_is_written(name: str, tmp_path: Path) -> None:
    write_atomic(tmp_path / name, b"one")
    assert (tmp_path / name).read_bytes() == b"one"
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize("name", ["a" * 256, "猫" * 86, "a\0b", "\ud800", "file/x.tfc", "missing/x.tfc", "..", "."])
def test_every_other_name_is_an_output_error(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="cannot be written|is not a file"):
        write_atomic(tmp_path / name, b"one")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OutputError, match="is not a file"):
        write_atomic("", b"one")
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("put", SPECIAL)
def test_only_regular_files_are_read(put: Callable[[Path], None], tmp_path: Path) -> None:
    put(tmp_path / "a")
    with no_hang(), pytest.raises(OSError, match=r"not a regular file|symbolic links|No such device"):
        read_regular(tmp_path / "a", 10)


def test_files_and_links_to_them_are_read_up_to_a_size(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"12345")
    (tmp_path / "b").symlink_to("a")
    assert read_regular(tmp_path / "b", 5) == b"12345"
    assert file_sha256(tmp_path / "b") == hashlib.sha256(b"12345").hexdigest()
    with open_regular(tmp_path / "b") as file:
        assert file.read() == b"12345"
    with pytest.raises(OSError, match="larger than 4 bytes") as caught:
        read_regular(tmp_path / "b", 4)
    assert (caught.value.errno, reason(caught.value)) == (errno.EFBIG, "larger than 4 bytes")


def test_memory_is_taken_by_a_files_size_and_not_by_the_limit(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"12345")
    tracemalloc.start()
    try:
        assert read_regular(tmp_path / "a", 2**26) == b"12345"
        assert tracemalloc.get_traced_memory()[1] < 2**22
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("claimed", [0, 3])
def test_a_file_that_grows_while_it_is_read_is_read_to_its_end(
    claimed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").write_bytes(b"12345")
    plain = os.fstat

    def before(handle: int) -> os.stat_result:
        return os.stat_result([claimed if i == stat.ST_SIZE else value for i, value in enumerate(plain(handle)[:10])])

    monkeypatch.setattr(files.os, "fstat", before)
    assert read_regular(tmp_path / "a", 5) == b"12345"
    with pytest.raises(OSError, match="larger than 4 bytes"):
        read_regular(tmp_path / "a", 4)


def test_no_file_stays_open(tmp_path: Path) -> None:
    if not Path("/proc/self/fd").is_dir():
        pytest.skip("needs /proc")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with pytest.raises(OSError, match="not a regular file"):
            open_regular(tmp_path)
    assert len(os.listdir("/proc/self/fd")) == before
