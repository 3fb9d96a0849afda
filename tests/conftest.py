"""Shared fixtures: small exported bundles, made once a run."""

from __future__ import annotations

import gc
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from hypothesis import settings

from tests.support.fake_cuda import FakeCuda
from tests.support.fake_gpu import FakeTensorRT, install
from tokenflow_sdk import Tokenizer

DATA = Path(__file__).parent / "data"
ROOT = Path(__file__).parent.parent

# Before the command line is imported, which asks for it: tables are as wide as they like, whatever terminal starts the tests.
os.environ.pop("COLUMNS", None)

# Of `make fuzz`: ten times the examples of everyday, and other ones each time.
settings.register_profile("fuzz", max_examples=1000)


LONGEST = (
    *("export/test_full_size.py", "export/test_every_variant.py", "server/test_malformed.py", "soak/test_server.py"),
    *("support/test_fake_gpu.py", "export/language_model/test_transformers_model.py", "server/test_page_in_browser.py"),
    *("test_package.py", "export/precision/test_tokenizer_search.py"),
    *("understanding/test_understander.py", "test_docs.py", "generation/test_generator.py", "test_faults.py"),
    *("fuzz/test_public_api.py", "test_tokenizer.py", "engines/test_build.py", "passes/test_attention.py", "test_versions.py"),
    *("cli/test_files.py", "benchmarks/test_on_gpu.py", "export/language_model/test_understanding.py"),
)
"""Files that take long, the longest first."""


def pytest_configure() -> None:
    """A shell starts what it runs in the background without Ctrl-C, which tests send to themselves."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """For slow tests alone only the files that have some are imported."""
    alone = config.option.markexpr == "slow" and collection_path.suffix == ".py"
    return True if alone and not _may_be_slow(collection_path) else None


def _may_be_slow(path: Path) -> bool:
    """Whether a file has the word, without which it has no slow test."""
    return "slow" in path.read_text("utf-8")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take long begin first, so that no process of several works alone at the end."""
    hidden = {item.path for item in items if item.get_closest_marker("slow") and not _may_be_slow(item.path)}
    assert not hidden, f"For slow tests alone these are not imported: {hidden}"
    ranks = {DATA.parent / name: rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path, len(LONGEST)))


@pytest.fixture(scope="session", autouse=True)
def shared_traces() -> Iterator[Path]:
    """Each module is traced once by whichever test process exports it first. The directory of traces."""
    from tests.support.shared_traces import SharedTraces, keep_registry, traces_of
    from tokenflow_export.tracing import onnx_export

    directory = traces_of(ROOT)
    # What was imported stays; looking for garbage in it takes long.
    gc.freeze()
    with pytest.MonkeyPatch.context() as patch:
        keep_registry(patch)
        patch.setattr(onnx_export, "_capture", SharedTraces(onnx_export._capture, directory))
        yield directory


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """PyTorch's threads spin while they wait, which small models do most of the time."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def mini_bundles(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The bundle of a small tokenizer by kind (`clip`, `vitamin`, `siglip`); do not write into it."""
    from tests.support.mini import export_mini, mini_model

    directory, made = tmp_path_factory.mktemp("bundles"), {}

    def get(kind: str) -> Path:
        if kind not in made:
            made[kind] = export_mini(mini_model(kind), directory / kind)
        return made[kind]

    return get


@pytest.fixture(scope="session")
def mini_bundle(mini_bundles: Callable[[str], Path]) -> Path:
    return mini_bundles("clip")


@pytest.fixture(scope="session")
def mini_generator(mini_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of a small generator that draws the small CLIP tokenizer's codes; do not write into it."""
    from tests.support.mini_generator import SMALLEST, export_quietly, generator_shapes, write_checkpoint
    from tokenflow_sdk.bundle.bundle import Bundle
    from tokenflow_sdk.bundle.model_config import TokenizerConfig

    directory = tmp_path_factory.mktemp("generator")
    shapes = generator_shapes(SMALLEST, 44, 500, (1, 2, 3, 4))
    checkpoint = write_checkpoint(directory / "hf", SMALLEST, shapes, 40, 500)
    return export_quietly(checkpoint, Bundle.open(mini_bundle, TokenizerConfig), directory / "t2i")


@pytest.fixture(scope="session")
def mini_understander(mini_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of a small understander that reads the small CLIP tokenizer's codes; do not write into it."""
    from tests.support.mini_understander import SMALLEST, export_quietly, reference_model, reference_projector, write_checkpoint
    from tokenflow_sdk.bundle.bundle import Bundle
    from tokenflow_sdk.bundle.model_config import TokenizerConfig

    directory = tmp_path_factory.mktemp("understander")
    model, projector = reference_model(SMALLEST), reference_projector(SMALLEST["hidden_size"])
    checkpoint = write_checkpoint(directory / "hf", SMALLEST, model, projector)
    return export_quietly(checkpoint, Bundle.open(mini_bundle, TokenizerConfig), directory / "chat")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> tuple[FakeCuda, FakeTensorRT]:
    """A GPU, TensorRT, and an empty engine cache."""
    monkeypatch.setenv("TOKENFLOW_CACHE", str(tmp_path / "cache"))
    return install(monkeypatch)


@pytest.fixture
def figure(record_property: Callable[[str, object], None]) -> Callable[[str], None]:
    """Print a line after the tests, whatever is captured."""
    return partial(record_property, "figure")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    found = [
        text
        for report in terminalreporter.getreports("passed")
        for name, text in report.user_properties
        if name == "figure" and report.when == "call"
    ]
    if found:
        terminalreporter.section("figures")
        for text in found:
            terminalreporter.write_line(text)


@pytest.fixture
def bundle_copy(mini_bundle: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(mini_bundle, tmp_path / "bundle"))


@pytest.fixture(scope="session")
def tokenizer(mini_bundle: Path) -> Iterator[Tokenizer]:
    with Tokenizer.from_pretrained(mini_bundle, threads=1) as tokenizer:
        yield tokenizer
