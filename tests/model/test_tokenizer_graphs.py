from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.fakes import CONFIG, GRAPHS, FakeSession, fake_bundle
from tokenflow_sdk import Tokenizer
from tokenflow_sdk.backends.session import Session, SessionOptions
from tokenflow_sdk.bundle.schema import GraphEntry, TensorSpec
from tokenflow_sdk.errors import ArgumentError, BackendError, CorruptBundleError
from tokenflow_sdk.model.tokenizer_graphs import TokenizerGraphs

IMAGES = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), np.uint8)
CODES = np.random.default_rng(1).integers(0, 256, (5, 5)).astype(np.int32)
OPTIONS = SessionOptions("cpu", threads=3)


class Opener:
    """Opens fake sessions and remembers them by graph."""

    def __init__(self, devices: dict[str, str] | None = None) -> None:
        self.opened: list[tuple[str, FakeSession]] = []
        self.devices = devices or {}

    def __call__(self, path: Path, entry: GraphEntry, options: SessionOptions) -> Session:
        name = next(name for name, known in GRAPHS.items() if known is entry)
        device = self.devices.get(name, "cpu")
        session = type("Session", (FakeSession,), {"device": device})(path, entry, options)
        self.opened.append((name, session))
        return session

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.opened]


def make(opener: Callable[..., Session], batch_limit: int = 1) -> TokenizerGraphs:
    return TokenizerGraphs(fake_bundle(), opener, OPTIONS, batch_limit)


def test_a_graph_is_loaded_when_it_is_first_needed_and_once() -> None:
    opener = Opener()
    graphs = make(opener)
    assert (opener.names, graphs.devices) == ([], [])
    graphs.encode(IMAGES)
    graphs.latent(IMAGES)
    assert opener.names == ["encode"]
    graphs.decode(CODES)
    assert graphs.load("decode") is opener.opened[1][1]
    assert opener.names == ["encode", "decode"]
    assert all(session.options is OPTIONS for _, session in opener.opened)


def test_each_call_asks_its_graph_for_one_output() -> None:
    opener = Opener()
    graphs = make(opener, batch_limit=8)
    calls: list[tuple[Callable[[Any], np.ndarray], np.ndarray, str, str]] = [
        (graphs.encode, IMAGES, "encode", "code_indices"),
        (graphs.latent, IMAGES, "encode", "latent"),
        (graphs.decode, CODES, "decode", "images"),
        (graphs.features, CODES, "features", "features"),
    ]
    for call, array, graph, output in calls:
        found = call(array)
        session = dict(opener.opened)[graph]
        assert session.calls[-1] == (5, (output,))
        (expected,) = session._infer({"x": array}, (output,))
        np.testing.assert_array_equal(found, expected)
        assert found.dtype == expected.dtype


def test_semantic_features_have_a_graph_of_their_own() -> None:
    spec = TensorSpec("features", "float32", ("batch", 4, 40))
    entry = GraphEntry(GRAPHS["features"].files, GRAPHS["features"].inputs, (spec,))
    bundle = replace(fake_bundle(), graphs={"semantic": entry})
    graphs = TokenizerGraphs(bundle, FakeSession, OPTIONS, batch_limit=8)
    assert graphs.semantic(CODES).shape == (5, 4, 40)
    with pytest.raises(CorruptBundleError, match="no 'features' graph"):
        graphs.features(CODES)


@pytest.mark.parametrize(("limit", "parts"), [(1, [1] * 5), (2, [2, 2, 1]), (4, [4, 1]), (5, [5]), (9, [5])])
def test_larger_batches_are_split_and_put_together_in_order(limit: int, parts: list[int]) -> None:
    opener = Opener()
    graphs = make(opener, limit)
    assert graphs.batch_limit == limit
    whole = make(Opener(), 5)
    np.testing.assert_array_equal(graphs.encode(IMAGES), whole.encode(IMAGES))
    np.testing.assert_array_equal(graphs.decode(CODES), whole.decode(CODES))
    for _, session in opener.opened:
        assert [size for size, _ in session.calls] == parts


def test_devices_are_those_of_loaded_graphs() -> None:
    graphs = make(Opener({"decode": "cuda:1", "encode": "cpu", "features": "cpu"}))
    for name, devices in (("features", ["cpu"]), ("decode", ["cpu", "cuda:1"]), ("encode", ["cpu", "cuda:1"])):
        graphs.load(name)
        assert graphs.devices == devices


def test_closing_closes_every_session_once() -> None:
    opener = Opener()
    graphs = make(opener)
    graphs.encode(IMAGES)
    graphs.decode(CODES)
    graphs.close()
    graphs.close()
    assert [session.closed for _, session in opener.opened] == [1, 1]
    assert graphs.devices == []
    for use in (lambda: graphs.load("encode"), lambda: graphs.encode(IMAGES), lambda: graphs.features(CODES)):
        with pytest.raises(ArgumentError, match="This Tokenizer is closed.*Tokenizer.from_pretrained"):
            use()
    assert opener.names == ["encode", "decode"]


def test_a_graph_that_does_not_open_is_tried_again() -> None:
    problems = [BackendError("No memory.", "Free some.")]
    opener = Opener()

    def opening(path: Path, entry: GraphEntry, options: SessionOptions) -> Session:
        if problems:
            raise problems.pop()
        return opener(path, entry, options)

    graphs = make(opening)
    with pytest.raises(BackendError, match="No memory"):
        graphs.encode(IMAGES)
    assert graphs.encode(IMAGES).shape == (5, len(CODES[0]))


def test_threads_that_need_a_graph_at_once_open_it_once() -> None:
    opener = Opener()
    begin = threading.Barrier(6)
    graphs = make(opener)
    found: list[np.ndarray] = []

    def use() -> None:
        begin.wait()
        found.append(graphs.encode(IMAGES))

    threads = [threading.Thread(target=use) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert opener.names == ["encode"]
    assert all(np.array_equal(codes, found[0]) for codes in found)
    assert len(found) == 6


def test_the_bundle_is_the_one_it_was_made_of() -> None:
    assert make(Opener()).bundle.config is CONFIG


def test_a_signal_handler_may_close_while_its_thread_loads_a_graph() -> None:
    opener = Opener()

    def interrupted(path: Path, entry: GraphEntry, options: SessionOptions) -> Session:
        graphs.close()
        return opener(path, entry, options)

    graphs = make(interrupted)
    loading = threading.Thread(target=graphs.load, args=("encode",), daemon=True)
    loading.start()
    loading.join(30)
    assert not loading.is_alive()
    with pytest.raises(ArgumentError, match="closed"):
        graphs.encode(IMAGES)


def test_codes_and_latent_come_from_one_run(mini_bundle: Path) -> None:
    with Tokenizer.from_pretrained(mini_bundle, batch_limit=2) as tokenizer:
        graphs, size = tokenizer.graphs, tokenizer.config.image_size
        images = np.random.default_rng(0).integers(0, 256, (3, size, size, 3), np.uint8)
        codes, latent = graphs.encode_with_latent(images)
        np.testing.assert_array_equal(codes, graphs.encode(images))
        np.testing.assert_array_equal(latent, graphs.latent(images))
