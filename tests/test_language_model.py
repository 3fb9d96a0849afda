"""What both language models share, on a GPU that is not there; their own requests are in test_engines.py and
test_understander_engines.py."""

from __future__ import annotations

import gc
import pickle
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.mini_understander import features
from tests.support.waiting import comes_true
from tokenflow_sdk import Generator, Tokenizer, Understander
from tokenflow_sdk.backends.onnxruntime import open_onnxruntime
from tokenflow_sdk.backends.session import SessionOptions
from tokenflow_sdk.bundle.bundle import Bundle
from tokenflow_sdk.bundle.model_config import GeneratorConfig, UnderstanderConfig
from tokenflow_sdk.engines.build_config import BuildConfig
from tokenflow_sdk.engines.engine_set import Engines
from tokenflow_sdk.errors import ArgumentError, BackendError
from tokenflow_sdk.loaded_model import LoadedModel

PLAN = BuildConfig(precision="fp32", pages=150)


@pytest.fixture(scope="module")
def tokenizer(mini_bundle: Path) -> Iterator[Tokenizer]:
    with Tokenizer.from_pretrained(mini_bundle, device="cpu") as tokenizer:
        yield tokenizer


@pytest.fixture(params=[Generator, Understander])
def kind(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture
def bundle(kind: Any, mini_generator: Path, mini_understander: Path) -> Bundle[Any]:
    if kind is Generator:
        return Bundle.open(mini_generator, GeneratorConfig)
    return Bundle.open(mini_understander, UnderstanderConfig)


def use(model: Any) -> object:
    if isinstance(model, Generator):
        return model.generate("w3", seed=3, preset="fast").codes
    return model.answer(features(0), "what?", max_tokens=4).token_ids


def wait_for_nobody(model: LoadedModel[Any]) -> None:
    """The thread that steps may have the queue of what has ended, and empties it."""
    assert comes_true(lambda: model.users == 0)


def test_engines_opened_while_serving_replace_what_nobody_uses(
    machine, kind: Any, bundle: Bundle[Any], tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    go, prepare = threading.Event(), Engines.prepare
    monkeypatch.setattr(Engines, "prepare", lambda self: (go.wait(60), prepare(self)))
    options = {"backend": "tensorrt", "build_config": PLAN, "serve_while_building": True}
    with kind.from_pretrained(bundle.path, tokenizer=tokenizer, **options) as model:
        old = model._runner.model
        first = use(model)
        assert model.device == "cpu"
        wait_for_nobody(old)
        assert model.token_forwards > 0
        go.set()
        assert model.wait_for_engines(120)
        assert (model.device, model.token_forwards) == ("cuda:0", 0)
        assert [session._session for session in old.sessions.values()] == [None] * len(old.sessions)
        # What fits the pool does not change.
        assert old.transformer.pool.pages == model._runner.model.transformer.pool.pages == 150
        assert use(model) == first
        with pytest.raises(ZeroDivisionError), model._runner.submitted([]):
            assert model._runner.model.users == 1
            raise ZeroDivisionError
        wait_for_nobody(model._runner.model)


def test_closing_while_engines_are_built_closes_them_too(
    machine, kind: Any, bundle: Bundle[Any], tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    go, prepare = threading.Event(), Engines.prepare
    monkeypatch.setattr(Engines, "prepare", lambda self: (go.wait(60), prepare(self)))
    options = {"backend": "tensorrt", "build_config": PLAN, "serve_while_building": True}
    model = kind.from_pretrained(bundle.path, tokenizer=tokenizer, **options)
    model.close()
    go.set()
    assert model.wait_for_engines(120)
    with pytest.raises(ArgumentError, match=f"This {kind.__name__} is closed.*{kind.__name__}.from_pretrained"):
        use(model)
    del model
    gc.collect()
    assert (machine[0].device_memory, machine[0].streams) == ({}, set())


def test_a_graph_that_does_not_open_closes_those_that_did(kind: Any, bundle: Bundle[Any], tokenizer: Tokenizer) -> None:
    opened: list[Any] = []

    def opening(path: Path, entry: Any, options: SessionOptions) -> Any:
        if len(opened) == 3:
            raise BackendError("No memory.", "Free some.")
        opened.append(open_onnxruntime(path, entry, options))
        return opened[-1]

    with pytest.raises(BackendError, match="No memory"):
        kind(bundle, tokenizer, SessionOptions("cpu"), open_session=opening)
    assert [session._session for session in opened] == [None] * 3


def test_pools_that_hold_nothing_are_named(kind: Any, bundle: Bundle[Any], tokenizer: Tokenizer) -> None:
    for sizes in ({"pages": 0}, {"page_size": 0}):
        with pytest.raises(ArgumentError, match="hold nothing"):
            kind(bundle, tokenizer, SessionOptions("cpu"), **sizes)


@pytest.mark.parametrize("sizes", [{"pages": "9"}, {"pages": 9.0}, {"page_size": None}, {"page_size": True}])
def test_sizes_of_pools_that_are_no_integers_are_named(
    kind: Any, bundle: Bundle[Any], tokenizer: Tokenizer, sizes: Any
) -> None:
    ((name, value),) = sizes.items()
    with pytest.raises(ArgumentError, match=f"{name}={value!r} makes a pool"):
        kind.from_pretrained(bundle.path, tokenizer=tokenizer, **sizes)
    with pytest.raises(ArgumentError, match=f"{name}={value!r} makes a pool"):
        kind(bundle, tokenizer, SessionOptions("cpu"), **sizes)


@pytest.mark.parametrize("sizes", [{"pages": 10**12}, {"page_size": 10**12}])
def test_pools_beyond_the_machines_memory_are_refused_at_once(
    kind: Any, bundle: Bundle[Any], tokenizer: Tokenizer, sizes: Any
) -> None:
    with pytest.raises(ArgumentError, match="1000000000000 .*GB, keys and values together, and this machine has"):
        kind.from_pretrained(bundle.path, tokenizer=tokenizer, device="cpu", **sizes)


def test_sizes_of_pools_may_be_numbers_of_other_libraries(kind: Any, bundle: Bundle[Any], tokenizer: Tokenizer) -> None:
    with kind(bundle, tokenizer, SessionOptions("cpu"), pages=np.int64(150), page_size=np.int32(8)) as model:
        pool = model._runner.model.transformer.pool
        assert (pool.pages, pool.page_size) == (150, 8)


def test_a_model_says_what_it_is(kind: Any, bundle: Bundle[Any], tokenizer: Tokenizer) -> None:
    with kind.from_pretrained(bundle.path, tokenizer=tokenizer) as model:
        said = repr(model)
        copy = pickle.loads(pickle.dumps(model))  # noqa: S301 - what this test made
        assert repr(copy) == f"{kind.__name__}(a copy that opens when it is used)"
    reach = "4 scales, 30 codes of 500" if kind is Generator else "16 tokens a picture, 1024 in all"
    assert said == f"{kind.__name__}(mini_clip: {reach}, 1 layers of width 32, on cpu)"


def test_prefixes_kept_for_later_requests_count_as_free(kind: Any, bundle: Bundle[Any], tokenizer: Tokenizer) -> None:
    with kind.from_pretrained(bundle.path, tokenizer=tokenizer) as model:
        assert model.free_pages == model.total_pages
        if kind is Generator:
            model.generate("w1", preset="fast")
        else:
            model.chat(np.zeros((16, 40), np.float32)).ask("what?", max_tokens=2)
        pool = model._runner.model.transformer.pool
        assert pool.free < model.free_pages == model.total_pages == pool.pages


def test_an_argument_that_python_refuses_is_that_of_the_class(kind: Any) -> None:
    for options in ({}, {"name": "tiny", "devcie": "cpu"}):
        with pytest.raises(TypeError, match=rf"^{kind.__name__}\.from_pretrained\(\)"):
            kind.from_pretrained(**options)
