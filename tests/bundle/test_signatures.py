from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from tokenflow_sdk.bundle.bundle import Bundle, find_bundle, open_bundle
from tokenflow_sdk.bundle.schema import GraphEntry, TensorSpec
from tokenflow_sdk.bundle.signatures import check_graphs, config_sizes
from tokenflow_sdk.errors import CorruptBundleError

FREE = {"bos_id", "image_token_start", "text_size", "max_prompt", "context", "image_tokens"}
"""Sizes that no graph shows."""


@pytest.fixture(params=["tokenizer", "generator", "understander"])
def bundle(request: pytest.FixtureRequest) -> Bundle[Any]:
    if request.param == "understander":
        path: Path = request.getfixturevalue("mini_understander")
        return open_bundle(path)
    return open_bundle(find_bundle("tiny", request.param))


def test_exported_graphs_are_as_their_configs_say(bundle: Bundle[Any]) -> None:
    check_graphs(bundle.config, bundle.graphs)


def test_a_size_unlike_the_graphs_is_named(bundle: Bundle[Any]) -> None:
    sizes = [field.name for field in fields(bundle.config) if type(getattr(bundle.config, field.name)) is int]
    assert {name for name in sizes if name not in FREE} <= set(config_sizes(bundle.config))
    for name in sizes:
        other = replace(bundle.config, **{name: getattr(bundle.config, name) + 1})
        if name in FREE or (bundle.config.kind, name) == ("tokenizer", "codebook_size"):
            check_graphs(other, bundle.graphs)
        else:
            with pytest.raises(CorruptBundleError, match=r"graphs\.\w+\.(in|out)puts give .* where the config asks for"):
                check_graphs(other, bundle.graphs)


def test_every_graph_is_there_and_no_other(bundle: Bundle[Any]) -> None:
    for name, entry in bundle.graphs.items():
        with pytest.raises(CorruptBundleError, match=f"graphs has no '{name}' graph"):
            check_graphs(bundle.config, {other: kept for other, kept in bundle.graphs.items() if other != name})
        with pytest.raises(CorruptBundleError, match="graphs has an unknown graph 'more'"):
            check_graphs(bundle.config, {**bundle.graphs, "more": entry})


def variants(spec: TensorSpec) -> list[TensorSpec]:
    """Tensors that the runtime could not use in its place."""
    changed = [
        (*spec.shape[:i], "wide" if isinstance(size, int) else 7, *spec.shape[i + 1 :]) for i, size in enumerate(spec.shape)
    ]
    shapes = [*changed, spec.shape[1:], (*spec.shape, 1)]
    return [replace(spec, shape=shape) for shape in shapes] + [replace(spec, name="other"), replace(spec, dtype="int64")]


def test_every_tensor_is_as_expected(bundle: Bundle[Any]) -> None:
    for name, entry in bundle.graphs.items():
        for i, spec in enumerate(entry.inputs):
            for other in (*variants(spec), None):
                inputs = entry.inputs[:i] + (() if other is None else (other,)) + entry.inputs[i + 1 :]
                refused(bundle, name, replace(entry, inputs=inputs))
            refused(bundle, name, replace(entry, inputs=(*entry.inputs, spec)))
        needed = [spec for spec in entry.outputs if (name, spec.name) != ("encode", "features") and spec.name != "certain"]
        for spec in needed:
            for other in variants(spec):
                refused(bundle, name, replace(entry, outputs=tuple(other if have is spec else have for have in entry.outputs)))


def refused(bundle: Bundle[Any], name: str, entry: GraphEntry) -> None:
    with pytest.raises(CorruptBundleError, match=rf"graphs\.{name}\."):
        check_graphs(bundle.config, {**bundle.graphs, name: entry})
