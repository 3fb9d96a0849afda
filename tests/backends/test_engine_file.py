"""Loading an engine in pieces, with readers that behave as TensorRT's may: in order, skipping, asking twice, or giving up."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tokenflow_sdk.backends import engine_file
from tokenflow_sdk.backends.engine_file import load_engine
from tokenflow_sdk.errors import BackendError

CONTENT = bytes(range(256)) * 10 + b"end"
SHA256 = hashlib.sha256(CONTENT).hexdigest()
TRT = SimpleNamespace(IStreamReaderV2=type("IStreamReaderV2", (), {}), SeekPosition=SimpleNamespace(SET=0, CUR=1, END=2))


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(engine_file, "PIECE_BYTES", 100)
    (tmp_path / "a.engine").write_bytes(CONTENT)
    return tmp_path / "a.engine"


def whole(reader: Any) -> bytes:
    pieces = []
    while piece := reader.read(10**9, 0):
        pieces.append(piece)
    assert max(map(len, pieces)) <= 100
    return b"".join(pieces)


def tail_first(reader: Any) -> bytes:
    assert reader.seek(-3, 2)
    tail = reader.read(3, 0)
    assert reader.seek(0, 0)
    return b"".join([whole(reader)[:-3], tail])


def skipping(reader: Any) -> bytes:
    reader.read(50, 0)
    assert reader.seek(70, 1)
    assert reader.read(10, 0) == CONTENT[120:130]
    assert reader.seek(20, 0)
    assert reader.read(60, 0) == CONTENT[20:80]
    return CONTENT


def load(path: Path, read: Callable[[Any], Any], sha256: str = SHA256, trt: Any = TRT) -> Any:
    return load_engine(trt, SimpleNamespace(deserialize_cuda_engine=read), path, sha256)


@pytest.mark.parametrize("read", [whole, tail_first, skipping])
def test_however_it_is_read_all_of_it_is_hashed(read: Callable[[Any], Any], path: Path) -> None:
    assert load(path, read) == CONTENT
    with pytest.raises(BackendError, match=r"a.engine is damaged.*tokenflow build"):
        load(path, read, "0" * 64)
    # Also where TensorRT has not read the place.
    path.write_bytes(CONTENT[:-5] + b"other")
    with pytest.raises(BackendError, match="is damaged"):
        load(path, lambda reader: reader.read(1, 0))


def test_a_tensorrt_without_readers_gets_it_whole(path: Path) -> None:
    assert load(path, lambda data: data, trt=SimpleNamespace()) == CONTENT
    with pytest.raises(BackendError, match="is damaged"):
        load(path, lambda data: data, "0" * 64, SimpleNamespace())


def test_what_tensorrt_refuses_is_none(path: Path) -> None:
    assert load(path, lambda reader: None) is None


def test_errors_in_callbacks_are_not_lost(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: object) -> bytes:
        raise errors[-1]

    errors: list[BaseException] = [OSError(5, "Input/output error")]
    for name in ("read", "seek"):
        with monkeypatch.context() as patch:
            patch.setattr(engine_file._HashedFile, name, fails)
            with pytest.raises(BackendError, match=r"a.engine cannot be read: Input/output error.*tokenflow build"):
                load(path, lambda reader: (reader.seek(0, 0), reader.read(1, 0)))
    errors.append(KeyboardInterrupt())
    monkeypatch.setattr(engine_file._HashedFile, "read", fails)
    with pytest.raises(KeyboardInterrupt):
        load(path, whole_or_nothing)
    with pytest.raises(BackendError, match="gone.engine cannot be read: No such file"):
        load(tmp_path / "gone.engine", whole)


def whole_or_nothing(reader: Any) -> None:
    assert reader.read(10, 0) == b""
