"""Every call of an engine, every allocation of pages and every file operation fails once.

What comes is a named error or the right result; no file is left half written, no page is lost, and the model goes on.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.engines.test_cache import KEY
from tests.support.file_faults import ERRORS, file_faults
from tests.test_loaded_model import free
from tokenflow_sdk import Codes, Generator, TokenFlowError, Tokenizer, Understander
from tokenflow_sdk.atomic_directory import atomic_directory
from tokenflow_sdk.bundle.bundle import MANIFEST
from tokenflow_sdk.cli import main
from tokenflow_sdk.engines.cache import EngineCache
from tokenflow_sdk.errors import BackendError, PagesExhausted
from tokenflow_sdk.model.kv_cache import PagePool

FEATURES = np.random.default_rng(0).standard_normal((16, 40)).astype(np.float32)
ENGINE_ERRORS = (BackendError("The engine failed.", "Try again."), MemoryError())
REMOVAL = ("lstat", "open", "scandir", "unlink", "rmdir")
PAGE_ERRORS = (MemoryError(), PagesExhausted(9, 0, 9))


@contextmanager
def failing(owner: Any, name: str, number: int | None, error: BaseException) -> Iterator[list[None]]:
    """The call of this number of a method raises; gives one entry for each call."""
    calls: list[None] = []
    plain = getattr(owner, name)

    def call(*arguments: Any, **keywords: Any) -> Any:
        calls.append(None)
        if len(calls) - 1 == number:
            raise error
        return plain(*arguments, **keywords)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, call)
        yield calls


def each_call_fails(owner: Any, name: str, errors: tuple[BaseException, ...], use: Callable[[], object]) -> Iterator[int]:
    """Run `use` once for each of its calls of a method, which fails then. Yields after each run."""
    with failing(owner, name, None, errors[0]) as calls:
        right = use()
    assert calls
    for number in range(len(calls)):
        error = errors[number % len(errors)]
        with failing(owner, name, number, error):
            try:
                found = use()
            except (TokenFlowError, MemoryError) as raised:
                assert raised is error
            else:
                assert found == right
        yield number
        assert use() == right


def test_every_engine_call_of_a_tokenizer_fails_once(mini_bundle: Path) -> None:
    with Tokenizer.from_pretrained(mini_bundle, device="cpu", threads=1, batch_limit=1) as tokenizer:
        pictures = [Image.new("RGB", (70, 70), color) for color in ("red", "teal")]
        tokenizer.load()

        def use() -> object:
            codes = tokenizer.encode_batch(pictures)
            images = [image.tobytes() for image in tokenizer.decode_batch(codes)]
            return codes, images, tokenizer.features(codes[0]).tobytes(), tokenizer.semantic(codes[1]).tobytes()

        for session in tokenizer.graphs._sessions.values():
            assert list(each_call_fails(session, "_infer", ENGINE_ERRORS, use))


def test_every_graph_fails_to_open_once(mini_generator: Path) -> None:
    from tokenflow_sdk.engines import choice

    def use() -> object:
        with Generator.from_pretrained(mini_generator, device="cpu", threads=1, pages=200) as generator:
            return generator.generate("w1", seed=1, preset="fast").codes

    assert list(each_call_fails(choice, "open_onnxruntime", ENGINE_ERRORS, use))


@pytest.mark.parametrize("what", ["engine", "pages"])
@pytest.mark.parametrize("kind", ["generate", "stream", "answer", "chat"])
def test_every_step_and_allocation_fails_once(kind: str, what: str, mini_generator: Path, mini_understander: Path) -> None:
    cls, bundle = (Generator, mini_generator) if kind in ("generate", "stream") else (Understander, mini_understander)

    def chat() -> object:
        talk = model.chat(FEATURES)
        return [talk.ask(question, max_tokens=2).token_ids for question in ("what?", "why?")]

    uses: dict[str, Callable[[], object]] = {
        "generate": lambda: model.generate("w1 w2", seed=1, n=2, preset="balanced").codes,
        "stream": lambda: [step.codes for step in model.stream("w1 w2", seed=1, preset="fast")],
        "answer": lambda: [a.token_ids for a in model.answer_batch([(FEATURES, "what?"), (FEATURES, "who?")], max_tokens=2)],
        "chat": chat,
    }
    with cls.from_pretrained(bundle, device="cpu", threads=1, pages=400, page_size=4) as model:  # type: ignore[attr-defined]
        targets = [(PagePool, "allocate", PAGE_ERRORS)]
        if what == "engine":
            targets = [(s, "_infer", ENGINE_ERRORS) for s in model._runner.model.sessions.values()]
        called = 0
        for owner, name, errors in targets:
            with failing(owner, name, None, errors[0]) as calls:
                uses[kind]()
            if not calls:
                continue
            for _ in each_call_fails(owner, name, errors, uses[kind]):
                assert free(model)
                called += 1
        assert called >= 3


def content(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def is_same(name: str, found: bytes, right: bytes) -> bool:
    """Whether files are equal, or hold the same codes: they lack their picture's hash where it could not be read twice."""
    return found == right or (
        name.endswith(".tfc") and (Codes.from_bytes(found).indices == Codes.from_bytes(right).indices).all()
    )


def each_file_operation_fails(command: list[str], inputs: Path, tmp_path: Path, watched: list[Path]) -> int:
    """Run a command once for each of its file operations, which fails then; their number.

    Its output is there as a whole or not at all, where it succeeds as a whole, and nothing is left beside it.
    """
    kept = content(inputs)

    def run(number: int | None, code: int) -> tuple[int, dict[str, bytes], list[str], str]:
        where = tmp_path / f"out{number}"
        where.mkdir()
        os.chdir(where)
        said = io.StringIO()
        with redirect_stderr(said), file_faults([where, *watched], number, code) as faults:
            status = main(command)
        return status, content(where), faults.operations, said.getvalue()

    status, right, operations, said = run(None, 0)
    assert status == 0, said
    assert operations
    for number, operation in enumerate(operations):
        status, found, _, said = run(number, ERRORS[number % len(ERRORS)])
        assert status in (0, 1, 2), operation
        assert set(found) <= set(right), operation
        assert all(is_same(name, found[name], right[name]) for name in found), operation
        assert status or set(found) == set(right), operation
        assert "Traceback" not in said
    assert content(inputs) == kept
    return len(operations)


@pytest.fixture
def inputs(tmp_path: Path, mini_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    directory = tmp_path / "inputs"
    directory.mkdir()
    monkeypatch.chdir(directory)
    monkeypatch.setenv("COLUMNS", "200")
    with Tokenizer.from_pretrained(mini_bundle, device="cpu", threads=1) as tokenizer:
        for name, color in (("a", "red"), ("b", "teal")):
            Image.new("RGB", (70, 60), color).save(directory / f"{name}.png")
            tokenizer.encode(directory / f"{name}.png").save(directory / f"{name}.tfc")
    return directory


@pytest.mark.parametrize(
    "words",
    [
        "encode {in}/a.png {in}/b.png -o codes --bundle {bundle}",
        "encode {in}/a.png -o a.tfc --bundle {bundle}",
        "decode {in}/a.tfc -o deep --bundle {bundle}",
        "reconstruct {in}/a.png -o both.png --bundle {bundle}",
        "info {in}/a.tfc",
        "info {bundle}",
        "verify {bundle}",
        "generate w1 --seed 1 --preset fast -o drawn --bundle {generator}",
        "ask {in}/a.png what? --max-tokens 2 --bundle {understander}",
    ],
)
def test_every_file_operation_of_a_command_fails_once(
    words: str, inputs: Path, tmp_path: Path, mini_bundle: Path, mini_generator: Path, mini_understander: Path
) -> None:
    bundles = {"bundle": mini_bundle, "generator": mini_generator, "understander": mini_understander}
    used = [path for name, path in bundles.items() if f"{{{name}}}" in words]
    command = words.format(**{"in": inputs, **bundles}).split()
    assert each_file_operation_fails(command, inputs, tmp_path, [inputs, *used]) > 3


def test_every_file_operation_of_an_engine_cache_fails_once(tmp_path: Path) -> None:
    """Whatever failed: the next time an engine is stored and found, and clearing leaves nothing but locks."""

    def use(store: EngineCache) -> list[int]:
        with store.building(KEY):
            store.put(KEY, b"engine" * 99, {})
        store.certify(KEY, "sm86", {"checked": True})
        store.get(KEY)
        return [entry.size for entry in store.entries()]

    number, done = 0, False
    while not done:
        directory = tmp_path / f"cache{number}"
        with file_faults([directory], number, ERRORS[number % len(ERRORS)]) as faults:
            with suppress(TokenFlowError):
                use(EngineCache(directory))
                EngineCache(directory).clear()
            done = len(faults.operations) <= number
        assert use(EngineCache(directory)) == [594], faults.operations[-1]
        EngineCache(directory).clear()
        left = {path.suffix for path in directory.iterdir() if path.name != "CACHEDIR.TAG"}
        assert left <= {".lock"}, faults.operations[number]
        number += 1
    assert number > 20


def test_every_file_operation_of_an_export_fails_once(tmp_path: Path) -> None:
    """Bundles appear whole or not at all, and an old one is replaced whole or stays."""

    def use(directory: Path) -> None:
        with atomic_directory(directory / "bundle", force=True, needed=100) as staging:
            (staging / MANIFEST).write_bytes(b"new")

    number, done = 0, False
    while not done:
        directory = tmp_path / f"out{number}"
        (directory / "bundle").mkdir(parents=True)
        (directory / "bundle" / MANIFEST).write_bytes(b"old")
        with file_faults([directory], number, ERRORS[number % len(ERRORS)]) as faults:
            with suppress(TokenFlowError):
                use(directory)
            done = len(faults.operations) <= number
        found = (directory / "bundle" / MANIFEST).read_bytes()
        assert found == (b"new" if done else found)
        assert found in (b"old", b"new")
        # What cannot be removed stays, and an empty lock harms nobody.
        assert set(os.listdir(directory)) <= {"bundle", ".bundle.lock"} or faults.operations[number].split()[0] in REMOVAL, (
            faults.operations[number:]
        )
        number += 1
    assert number > 5
