from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.mutations import SPECIAL, mutated_text, no_hang
from tokenflow_sdk import Tokenizer
from tokenflow_sdk.bundle.bundle import open_bundle
from tokenflow_sdk.bundle.schema import FileEntry, GraphEntry, TensorSpec
from tokenflow_sdk.cli import main
from tokenflow_sdk.engines.build_config import BuildConfig
from tokenflow_sdk.engines.cache import EngineCache, EngineKey, default_directory, graph_digest
from tokenflow_sdk.errors import ArgumentError, OutputError

KEY = EngineKey("decode", "ab" * 32, "1", "tensorrt-rtx", "1.7.1.116", "sm86", "fp16", "p")


@pytest.fixture
def cache(tmp_path: Path) -> EngineCache:
    return EngineCache(tmp_path / "cache")


def test_an_engine_is_found_again(cache: EngineCache) -> None:
    with cache.building(KEY):
        assert cache.get(KEY) is None
        cache.put(KEY, b"engine", {"precision": "fp16"})
    cache.certify(KEY, "sm86", {"checked": False})
    found = EngineCache(cache.directory).get(KEY)
    assert found is not None
    assert (found.path.read_bytes(), found.size, found.certificates) == (b"engine", 6, {"sm86": {"checked": False}})
    assert found.build_config == {"precision": "fp16"}


@pytest.mark.parametrize(
    "change",
    [
        {"graph": "encode"},
        {"graph_sha256": "cd" * 32},
        {"revision": "2"},
        {"flavour": "tensorrt"},
        {"version": "1.7.1.117"},
        {"target": "sm89"},
        {"precision": "bf16"},
        {"profile": "q"},
        {"system": "windows-amd64"},
    ],
)
def test_any_difference_is_another_engine(cache: EngineCache, change: dict[str, str]) -> None:
    with cache.building(KEY):
        cache.put(KEY, b"engine", {})
    assert cache.get(replace(KEY, **change)) is None
    assert cache.get(KEY) is not None


@pytest.mark.parametrize(
    "damage",
    [
        lambda engine, record: engine.write_bytes(b"engin"),
        lambda engine, record: engine.write_bytes(b"Engine"),
        lambda engine, record: engine.unlink(),
        lambda engine, record: record.write_text("{"),
        lambda engine, record: record.unlink(),
        lambda engine, record: record.write_text(record.read_text().replace("sm86", "sm89")),
    ],
)
def test_a_damaged_or_foreign_engine_is_never_given(cache: EngineCache, damage) -> None:
    with cache.building(KEY):
        stored = cache.put(KEY, b"engine", {})
    damage(stored.path, stored.path.with_suffix(".json"))
    assert cache.get(KEY) is None
    assert cache.put(KEY, b"again", {}).path.read_bytes() == b"again"
    assert cache.get(KEY) is not None


def test_the_least_recently_used_go_first(tmp_path: Path) -> None:
    cache = EngineCache(tmp_path, limit=25)
    keys = [replace(KEY, graph=name) for name in "abc"]
    for age, key in zip((30, 20, 10), keys, strict=True):
        cache.put(key, b"x" * 10, {})
        if cache.get(key):
            os.utime(cache._record(key), (time.time() - age,) * 2)
    assert cache.get(keys[0]) is None
    assert cache.get(keys[1]) is not None  # now the most recent
    cache.put(replace(KEY, graph="d"), b"x" * 10, {})
    assert [entry.key.graph for entry in cache.entries()] == ["d", "b"]


def test_engines_of_one_build_do_not_push_out_each_other(tmp_path: Path) -> None:
    cache = EngineCache(tmp_path, limit=3)
    keys = [replace(KEY, graph=name) for name in "abc"]
    for key in keys:
        cache.put(key, b"engine", {})
        cache.get(key).kernels("sm86").write_bytes(b"compiled")  # type: ignore[union-attr]
    assert all(cache.get(key) for key in keys)
    for key in keys:
        os.utime(cache._record(key), (time.time() - 60,) * 2)
    EngineCache(tmp_path, limit=3).put(KEY, b"engine", {})
    assert [entry.key for entry in cache.entries()] == [KEY]
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("named", ["-1", "many", "nan", ""])
def test_the_limit_may_be_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, named: str) -> None:
    assert EngineCache(tmp_path).limit == 20 * 10**9
    monkeypatch.setenv("TOKENFLOW_CACHE_GB", "1.5")
    assert EngineCache(tmp_path).limit == 15 * 10**8
    monkeypatch.setenv("TOKENFLOW_CACHE_GB", named)
    with pytest.raises(ArgumentError, match=f"TOKENFLOW_CACHE_GB='{named}' is no number of gigabytes"):
        EngineCache(tmp_path)


def test_an_engine_that_another_process_removes_is_passed_over(cache: EngineCache, monkeypatch: pytest.MonkeyPatch) -> None:
    with cache.building(KEY):
        cache.put(KEY, b"engine", {})
    monkeypatch.setattr(Path, "glob", lambda self, pattern: iter([self / "gone.json", cache._record(KEY)]))
    assert [entry.key for entry in cache.entries()] == [KEY]


def test_clearing(cache: EngineCache) -> None:
    with cache.building(KEY):
        cache.put(KEY, b"engine", {})
    assert cache.clear() > 6
    assert cache.entries() == []


@pytest.fixture
def built(cache: EngineCache) -> EngineCache:
    with cache.building(KEY):
        cache.put(KEY, b"engine", {})
    return cache


def test_clearing_removes_only_what_a_cache_writes(built: EngineCache) -> None:
    names = ["notes.json", ".env", "a.engine", "AB" * 16 + ".json", "ab" * 16 + ".json.bak", f".{'ab' * 16}.env-{'0' * 12}"]
    for name in names:
        (built.directory / name).write_text("kept")
    (built.directory / f"{'cd' * 16}.engine").mkdir()
    for name in ("ab" * 16 + ".kernels", "ab" * 16 + ".sm120.kernels", "ab" * 16 + ".lock", f".{'ab' * 16}.engine-{'0' * 12}"):
        (built.directory / name).write_bytes(b"x" * 1000)
    assert built.clear() > 4006
    assert sorted(os.listdir(built.directory)) == sorted([*names, f"{'cd' * 16}.engine", "CACHEDIR.TAG"])


@pytest.mark.parametrize("mark", [None, b"Signature: 8a477f597d28d172789f06886806bc55\n# by cargo\n"])
def test_a_directory_of_something_else_is_not_cleared(built: EngineCache, mark: bytes | None) -> None:
    (built.directory / "CACHEDIR.TAG").unlink()
    (built.directory / "package.json").write_text("{}")
    if mark is not None:
        (built.directory / "CACHEDIR.TAG").write_bytes(mark)
    before = sorted(os.listdir(built.directory))
    with pytest.raises(ArgumentError, match=r"is no engine cache: it holds .*--cache"):
        built.clear()
    with built.building(KEY):
        pass
    with pytest.raises(ArgumentError, match="is no engine cache"):
        built.clear()
    assert set(before) <= set(os.listdir(built.directory))


def test_a_cache_without_a_mark_that_holds_nothing_else_is_cleared(built: EngineCache, tmp_path: Path) -> None:
    (built.directory / "CACHEDIR.TAG").unlink()
    assert built.clear() > 6
    assert not any(name.endswith((".engine", ".json")) for name in os.listdir(built.directory))
    assert EngineCache(tmp_path / "missing").clear() == 0
    (tmp_path / "file").write_text("kept")
    with pytest.raises(OutputError, match="file cannot be cleared: Not a directory"):
        EngineCache(tmp_path / "file").clear()


def test_an_empty_directory_becomes_a_cache(tmp_path: Path) -> None:
    cache = EngineCache(tmp_path)
    with cache.building(KEY):
        cache.put(KEY, b"engine", {})
    (tmp_path / "notes.txt").write_text("kept")
    assert cache.clear() > 6
    assert {"notes.txt", "CACHEDIR.TAG"} <= set(os.listdir(tmp_path))


def test_without_a_home_only_engines_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home(cls: type[Path]) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", classmethod(no_home))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("TOKENFLOW_CACHE", str(tmp_path / "named"))
    assert EngineCache().directory == tmp_path / "named"
    monkeypatch.delenv("TOKENFLOW_CACHE")
    cache = EngineCache()
    with Tokenizer.from_pretrained("tiny") as tokenizer:
        assert tokenizer.device
    assert main(["info", "tiny"]) == 0
    for use in (cache.entries, cache.clear, lambda: cache.building(KEY).__enter__()):
        with pytest.raises(OutputError, match=r"this user has no home directory.*\$TOKENFLOW_CACHE"):
            use()


@pytest.mark.parametrize("name", ["file/engines", "a\0b", "a" * 300])
def test_a_cache_that_cannot_be_made_is_empty_and_builds_nothing(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = EngineCache(tmp_path / name)
    assert cache.get(KEY) is None
    with pytest.raises(OutputError, match=r"cannot be written.*--cache"), cache.building(KEY):
        pass


HOLD = """
import sys, time
from tests.engines.test_cache import KEY
from tokenflow_sdk.cli import main
from tokenflow_sdk.engines.cache import EngineCache
from pathlib import Path
cache = EngineCache(Path(sys.argv[1]))
with cache.building(KEY):
    cache._engine(KEY).write_bytes(b"half an eng")
    print("building", flush=True)
    time.sleep(60)
"""


def test_a_killed_build_leaves_a_cache_that_works(cache: EngineCache) -> None:
    """The lock dies with its process, and what it had written has no record."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, cache.directory], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "building\n"
    process.kill()
    process.wait()
    process.stdout.close()
    with cache.building(KEY):
        assert cache.get(KEY) is None
        cache.put(KEY, b"engine", {})
    assert cache.get(KEY) is not None


RACE = """
import sys, time
from tests.engines.test_cache import KEY
from tokenflow_sdk.cli import main
from tokenflow_sdk.engines.cache import EngineCache
from pathlib import Path
cache = EngineCache(Path(sys.argv[1]))
with cache.building(KEY):
    if cache.get(KEY) is None:
        time.sleep(0.3)
        cache.put(KEY, b"engine", {})
        print("built")
"""


def test_two_processes_build_once(cache: EngineCache) -> None:
    command = [sys.executable, "-c", RACE, cache.directory]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    said = [process.communicate()[0] for process in processes]
    assert sorted(said) == ["", "", "built\n"]


def test_where_engines_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("TOKENFLOW_CACHE", raising=False)
    assert default_directory() == tmp_path / "tokenflow" / "engines"
    monkeypatch.setenv("TOKENFLOW_CACHE", str(tmp_path / "named"))
    assert default_directory() == tmp_path / "named"


def test_mistakes(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="limit=-1"):
        EngineCache(tmp_path, limit=-1)
    with pytest.raises(OutputError, match="cannot be written.*tokenflow cache clear.*name another directory.*--cache"):
        EngineCache(tmp_path / "missing").put(KEY, b"x", {})


def test_a_graph_is_known_by_all_its_files() -> None:
    specs = (TensorSpec("x", "float32", (1,)),)
    one = GraphEntry((FileEntry("a.onnx", 1, "11" * 32),), specs, specs)
    two = GraphEntry((*one.files, FileEntry("a.onnx.data", 1, "22" * 32)), specs, specs)
    assert graph_digest(one) != graph_digest(two)
    assert json.dumps(graph_digest(one)) == json.dumps(graph_digest(one))


def test_any_record_is_an_engine_or_none(cache: EngineCache, monkeypatch: pytest.MonkeyPatch, mini_bundle: Path) -> None:
    monkeypatch.setenv("TOKENFLOW_CACHE", str(cache.directory))
    key = replace(KEY, graph_sha256=graph_digest(open_bundle(mini_bundle).graph("decode")))
    with cache.building(key):
        cache.put(key, b"engine", BuildConfig().to_json())
    cache.certify(key, "sm86", {"failures": [], "summary": "equal", "figures": {"psnr": 99.0}})
    record = cache.directory / f"{key.digest}.json"
    original, rng, found = json.loads(record.read_text()), random.Random(0), 0
    with no_hang(60):
        for i in range(100):
            record.write_bytes(mutated_text(original, rng))
            found += len(cache.entries())
            cache.get(key)
            cache.certify(key, "sm86", {})
            if i % 25 == 0:
                assert main(["info", str(mini_bundle)]) == main(["cache", "list", "--cache", str(cache.directory)]) == 0
    assert 0 < found < 100


@pytest.mark.parametrize("content", [b"[" * 100_000, b"[]", b"null", b'{"size": 1e999}', b"\xff", b"9" * 5000])
def test_a_record_of_another_form_is_none(content: bytes, cache: EngineCache) -> None:
    with cache.building(KEY):
        cache.put(KEY, b"engine", {})
    (cache.directory / f"{KEY.digest}.json").write_bytes(content)
    assert cache.entries() == []
    assert cache.get(KEY) is None
    cache.certify(KEY, "sm86", {})


def test_a_record_under_another_name_evicts_nothing(cache: EngineCache) -> None:
    with cache.building(KEY):
        cache.put(KEY, b"engine", {})
    record = cache.directory / f"{KEY.digest}.json"
    (cache.directory / f"{'0' * 32}.json").write_bytes(record.read_bytes())
    assert [engine.path for engine in cache.entries()] == [record.with_suffix(".engine")]


@pytest.mark.parametrize("put", SPECIAL)
@pytest.mark.parametrize("name", [f"{KEY.digest}.json", f"{KEY.digest}.engine", "CACHEDIR.TAG"])
def test_what_is_no_file_is_no_engine(put: Callable[[Path], None], name: str, cache: EngineCache) -> None:
    with cache.building(KEY):
        cache.put(KEY, b"", {})
    (cache.directory / name).unlink()
    put(cache.directory / name)
    with no_hang():
        assert (cache.get(KEY) is None) == (name != "CACHEDIR.TAG")
        cache.entries()
        with cache.building(KEY):
            pass
