"""Serving from onnxruntime while engines are built, and changing over, on a fake GPU (tests/support/fake_gpu.py)."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

import numpy as np
import pytest

from tests.support.on_engines import IMAGES, on_engines
from tests.support.waiting import comes_true
from tokenflow_sdk import Generator, Tokenizer
from tokenflow_sdk.engines.build_config import BuildConfig
from tokenflow_sdk.engines.engine_set import Engines
from tokenflow_sdk.errors import (
    EngineRefusedError,
)


def test_serving_goes_on_while_engines_are_built(machine, mini_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls before, during and after the change all succeed with the same codes; builds wait for the first of them."""
    go, prepare = threading.Event(), Engines.prepare
    monkeypatch.setattr(Engines, "prepare", lambda self: (go.wait(60), prepare(self)))
    with on_engines(mini_bundle, serve_while_building=True) as tokenizer:
        expected = tokenizer.encode_array(IMAGES)
        assert tokenizer.device == "cpu"
        assert not tokenizer.wait_for_engines(0)
        found: list[np.ndarray] = []
        stop = threading.Event()

        def serve() -> None:
            while not stop.is_set():
                found.append(tokenizer.encode_array(IMAGES))

        threads = [threading.Thread(target=serve) for _ in range(2)]
        for thread in threads:
            thread.start()
        go.set()
        assert tokenizer.wait_for_engines(120)
        assert tokenizer.device == "cuda:0"
        stop.set()
        for thread in threads:
            thread.join()
        assert found
        for codes in (*found, tokenizer.encode_array(IMAGES)):
            np.testing.assert_array_equal(codes, expected)
        tokenizer.load("decode")
        assert tokenizer.device == "cuda:0"


def test_serving_goes_on_without_engines_that_fail(
    machine, mini_bundle: Path, caplog: pytest.LogCaptureFixture, tokenizer: Tokenizer
) -> None:
    machine[1].broken.add("encode")
    with caplog.at_level(logging.WARNING), on_engines(mini_bundle, serve_while_building=True) as serving:
        with pytest.raises(EngineRefusedError):
            serving.wait_for_engines(120)
        np.testing.assert_array_equal(serving.encode_array(IMAGES), tokenizer.encode_array(IMAGES))
        assert serving.device == "cpu"
    assert "Going on without TensorRT engines" in caplog.text


def test_a_generator_changes_over_between_requests(machine, mini_generator: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go, prepare = threading.Event(), Engines.prepare
    monkeypatch.setattr(Engines, "prepare", lambda self: (go.wait(60), prepare(self)))
    build_config = BuildConfig(precision="fp32", pages=200)
    options = {"backend": "tensorrt", "build_config": build_config, "serve_while_building": True}
    with Generator.from_pretrained(mini_generator, **options) as generator:  # type: ignore[arg-type]
        stream = generator.stream("w3", seed=3, preset="fast")
        first = next(stream)
        old = generator._runner.model
        go.set()
        assert generator.wait_for_engines(120)
        assert (generator.device, old.users) == ("cuda:0", 1)
        begun = [first, *stream]
        assert comes_true(lambda: old.users == 0)
        again = generator.generate("w3", seed=3, preset="fast")
        assert begun[-1].codes == again.codes
    with Generator.from_pretrained(mini_generator, backend="onnxruntime") as alone:
        assert alone.generate("w3", seed=3, preset="fast").codes == again.codes
