"""Graphs of language models without an engine: functions of arrays that check what they are fed, and remember it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import count

import numpy as np

from tokenflow_sdk.backends.session import Array, Session, Tensor
from tokenflow_sdk.bundle.model_config import ChatTemplate, GeneratorConfig, UnderstanderConfig
from tokenflow_sdk.bundle.schema import TensorSpec

Compute = Callable[[Mapping[str, Array]], Mapping[str, Array]]

STOP = 7
UNDERSTANDER = UnderstanderConfig(
    width=2,
    layers=1,
    kv_heads=1,
    head_dim=1,
    context=2000,
    vocabulary=8,
    stop_ids=(STOP,),
    template=ChatTemplate((), (), (), (), ()),
    image_tokens=12,
    code_dim=3,
    patch_nums=(1, 2),
    codebook_sha256="ab" * 32,
    tokenizer_variant="fake",
    tokenizer="",
)
GENERATOR = GeneratorConfig(
    width=2,
    layers=1,
    kv_heads=1,
    head_dim=1,
    text_size=24,
    image_token_start=20,
    bos_id=1,
    image_start_ids=(70,),
    max_prompt=8,
    negative_prompt="bad",
    preset="fast",
    cfg_scale=7.5,
    codebook_size=50,
    patch_nums=(1, 2, 3),
    codebook_sha256="ab" * 32,
    tokenizer_variant="fake",
    tokenizer="",
)
"""Its text ids are 0 .. 19 and, behind the codes, 70 .. 73."""


class FakeGraph(Session):
    """A graph that is a function. `feeds` are what each call was fed; `sizes` are the most of varying dimensions."""

    def __init__(
        self, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], compute: Compute, sizes: Mapping[str, int] = {}
    ) -> None:
        super().__init__(inputs, outputs)
        self.compute, self.sizes = compute, sizes
        self.feeds: list[dict[str, Array]] = []
        self.closed = 0

    def max_size(self, dim: str) -> int | None:
        return self.sizes.get(dim)

    def _infer(self, feeds: Mapping[str, Tensor], outputs: tuple[str, ...]) -> Sequence[Array]:
        arrays = {name: np.asarray(value) for name, value in feeds.items()}
        self.feeds.append(arrays)
        found = self.compute(arrays)
        return [found[name] for name in outputs]

    def close(self) -> None:
        self.closed += 1


def tensor(name: str, dtype: str, *shape: int | str) -> TensorSpec:
    return TensorSpec(name, dtype, shape)


def transformer_graph(
    config: GeneratorConfig | UnderstanderConfig, compute: Compute | None = None, sizes: Mapping[str, int] = {}
) -> FakeGraph:
    """A transformer; without `compute` one whose hidden states are its inputs, and whose keys and values are zeros."""
    heads = (config.kv_heads, config.head_dim)
    new = (config.layers, "batch", "queries", *heads)

    def zeros(feeds: Mapping[str, Array]) -> Mapping[str, Array]:
        x = feeds["embeddings"]
        stored = np.zeros((config.layers, *x.shape[:2], *heads), np.float32)
        return {"hidden": x, "new_k": stored, "new_v": stored}

    return FakeGraph(
        [
            tensor("embeddings", "float32", "batch", "queries", config.width),
            tensor("positions", "int32", "batch", "queries"),
            tensor("visible", "int32", "batch", "queries"),
            tensor("context", "int32", "batch"),
            tensor("block_tables", "int32", "batch", "table"),
            tensor("k_pages", "float32", "slots", "page", *heads),
            tensor("v_pages", "float32", "slots", "page", *heads),
        ],
        [
            tensor("hidden", "float32", "batch", "queries", config.width),
            tensor("new_k", "float32", *new),
            tensor("new_v", "float32", *new),
        ],
        compute or zeros,
        sizes,
    )


def understander_graphs(
    config: UnderstanderConfig = UNDERSTANDER, tokens: Sequence[int] = (1, 2, 3), sizes: Mapping[str, int] = {}
) -> dict[str, FakeGraph]:
    """The graphs of an understander; its head gives `tokens`, round robin, where hidden states are finite."""
    calls = count(1)

    def embed(feeds: Mapping[str, Array]) -> Mapping[str, Array]:
        (array,) = feeds.values()
        return {"embeddings": np.zeros((*array.shape[:2], config.width), np.float32)}

    def head(feeds: Mapping[str, Array]) -> Mapping[str, Array]:
        rows = next(calls) + np.arange(len(feeds["hidden"]))
        certain = np.isfinite(feeds["hidden"]).all(axis=-1)
        found = np.asarray(tokens, np.int32)[rows % len(tokens)]
        logits = np.where(certain[:, None], np.eye(config.vocabulary, dtype=np.float32)[found], np.float32(np.nan))
        return {"token_ids": found, "certain": certain.astype(np.int32), "logits": logits}

    embeddings = [tensor("embeddings", "float32", "batch", "queries", config.width)]
    settings = [tensor(name, "float32", "batch") for name in ("penalty", "temperature", "top_p", "noise")]
    seen, ranks = tensor("seen", "int32", "batch", "seen"), tensor("ranks", "int32", "window")
    hidden, top_k = tensor("hidden", "float32", "batch", config.width), tensor("top_k", "int32", "batch")
    drawn = [
        tensor("token_ids", "int32", "batch"),
        tensor("certain", "int32", "batch"),
        tensor("logits", "float32", "batch", config.vocabulary),
    ]
    return {
        "embed_text": FakeGraph([tensor("token_ids", "int32", "batch", "queries")], embeddings, embed, sizes),
        "project": FakeGraph([tensor("features", "float32", "batch", "queries", config.code_dim)], embeddings, embed, sizes),
        "transformer": transformer_graph(config, sizes=sizes),
        "head": FakeGraph([hidden, seen, *settings, top_k, ranks], drawn, head, sizes),
    }
