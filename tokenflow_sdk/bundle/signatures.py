"""The inputs and outputs that the runtime expects of each graph of a bundle, given the sizes in its config."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tokenflow_sdk.bundle.model_config import GeneratorConfig, LanguageModelConfig, TokenizerConfig, UnderstanderConfig
from tokenflow_sdk.bundle.schema import GraphEntry, TensorSpec, require

__all__ = ["check_graphs", "config_sizes"]

_TRANSFORMER = (
    "embeddings float32 batch queries width; positions int32 batch queries; visible int32 batch queries; context int32 batch; "
    "block_tables int32 batch table; k_pages float slots page kv_heads head_dim; v_pages float slots page kv_heads head_dim",
    "hidden float32 batch queries width; new_k float layers batch queries kv_heads head_dim; "
    "new_v float layers batch queries kv_heads head_dim",
)
_SIGNATURES: Mapping[str, Mapping[str, tuple[str, str]]] = {
    TokenizerConfig.kind: {
        "encode": (
            "images uint8 batch image_size image_size 3",
            "code_indices int32 batch n_codes; latent float32 batch code_dim grid grid",
        ),
        "decode": ("code_indices int32 batch n_codes", "images uint8 batch image_size image_size 3"),
        "semantic": ("code_indices int32 batch n_codes", "features float32 batch cells semantic_width"),
        "features": ("code_indices int32 batch n_codes", "features float32 batch cells code_dim"),
    },
    GeneratorConfig.kind: {
        "embed_text": (
            "token_ids int32 batch queries; starts float32 batch queries",
            "embeddings float32 batch queries width",
        ),
        "embed_image": (
            "features float32 batch queries *; level int32 1; places int32 queries",
            "embeddings float32 batch queries width",
        ),
        "transformer": _TRANSFORMER,
        "sample": (
            "conditional float32 batch queries width; unconditional float32 batch queries width; guidance float32 batch; "
            "top_k int32 batch; top_p float32 batch; noise float32 batch queries; ranks int32 window",
            "code_indices int32 batch queries; logits float32 batch queries codebook_size",
        ),
    },
    UnderstanderConfig.kind: {
        "embed_text": ("token_ids int32 batch queries", "embeddings float32 batch queries width"),
        "project": ("features float32 batch queries code_dim", "embeddings float32 batch queries width"),
        "transformer": _TRANSFORMER,
        "head": (
            "hidden float32 batch width; seen int32 batch seen; penalty float32 batch; temperature float32 batch; "
            "top_k int32 batch; top_p float32 batch; noise float32 batch; ranks int32 window",
            "token_ids int32 batch; logits float32 batch vocabulary",
        ),
    },
}
"""Inputs and outputs by kind of bundle and graph. A dimension is a number, a size of the config, `*` for any size, or varies.

The dtype `float` is float32 or float16. A graph may have more outputs than these.
"""


def config_sizes(config: TokenizerConfig | LanguageModelConfig) -> dict[str, int]:
    """The sizes that a config gives or implies, by the names that graphs' and references' shapes use."""
    sizes = {name: value for name, value in vars(config).items() if type(value) is int and name != "context"}
    side = config.patch_nums[-1]
    sizes |= {"grid": side, "cells": side * side, "n_codes": config.scales.total}
    return sizes | ({"code_dim": config.code_dim} if isinstance(config, TokenizerConfig) else {})


def check_graphs(config: TokenizerConfig | LanguageModelConfig, graphs: Mapping[str, GraphEntry]) -> None:
    """Check that a bundle lists the graphs of its kind, with inputs and outputs as its config says.

    Raises:
        CorruptBundleError: a graph is missing or unknown, or differs.
    """
    expected, sizes = _SIGNATURES[config.kind], config_sizes(config)
    missing = [f"has no {name!r} graph" for name in expected if name not in graphs]
    unknown = [f"has an unknown graph {name!r}" for name in graphs if name not in expected]
    require(not (missing or unknown), "graphs", "; ".join([*missing, *unknown]))
    for name, (inputs, outputs) in expected.items():
        entry = graphs[name]
        _check_tensors(f"graphs.{name}.inputs", entry.inputs, inputs, sizes)
        wanted = {text.split()[0] for text in outputs.split("; ")}
        _check_tensors(f"graphs.{name}.outputs", [spec for spec in entry.outputs if spec.name in wanted], outputs, sizes)


def _check_tensors(where: str, specs: Sequence[TensorSpec], expected: str, sizes: Mapping[str, int]) -> None:
    texts = expected.split("; ")
    names = [text.split()[0] for text in texts]
    require(sorted(names) == sorted(spec.name for spec in specs), where, f"are not {', '.join(names)}, each once")
    have = {spec.name: spec for spec in specs}
    for text in texts:
        name, dtype, *dims = text.split()
        shape = tuple(int(dim) if dim.isdigit() else sizes.get(dim, dim) for dim in dims)
        spec = have[name]
        fits = (dtype == spec.dtype or (dtype == "float" and spec.dtype in ("float32", "float16"))) and (
            len(shape) == len(spec.shape) and all(map(_dimension_fits, spec.shape, shape))
        )
        require(fits, where, f"give {spec}, where the config asks for {name} {dtype}[{', '.join(map(str, shape))}]")


def _dimension_fits(have: int | str, want: int | str) -> bool:
    if want == "*":
        return isinstance(have, int) and have > 0
    return have == want if isinstance(want, int) else isinstance(have, str)
