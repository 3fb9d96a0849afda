"""Optimization profiles: how large every dimension of a bundle's graphs that varies can be in a call of its engines."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenflow_sdk.bundle.bundle import Bundle
from tokenflow_sdk.bundle.model_config import (
    PAGE_SIZE,
    GeneratorConfig,
    LanguageModelConfig,
    TokenizerConfig,
    UnderstanderConfig,
    pages_for,
)
from tokenflow_sdk.bundle.schema import GraphEntry, TensorSpec
from tokenflow_sdk.engines.build_config import BuildConfig
from tokenflow_sdk.errors import ArgumentError
from tokenflow_sdk.model.sampling import MAX_TOP_K, TIES
from tokenflow_sdk.model.transformer import PREFILL_CHUNK

__all__ = ["DimRange", "Profile", "Shapes", "graph_profiles", "pool_pages", "bundle_profiles"]

DimRange = tuple[int, int, int]
"""Least, usual and largest size."""
Shapes = tuple[tuple[int, ...], ...]
"""Least, usual and largest."""


@dataclass(frozen=True)
class Profile:
    """Least, usual and largest size of every dimension that varies, by its name in the bundle.

    Raises:
        ArgumentError: sizes that are not in order.
    """

    sizes: Mapping[str, DimRange]

    def __post_init__(self) -> None:
        for name, (least, usual, most) in self.sizes.items():
            if not 0 < least <= usual <= most:
                raise ArgumentError(f"{name} cannot go from {least} over {usual} to {most}.", "Give sizes in ascending order.")

    def shapes(self, spec: TensorSpec) -> Shapes:
        """Least, usual and largest shape of an input."""
        try:
            return tuple(tuple(dim if isinstance(dim, int) else self.sizes[dim][i] for dim in spec.shape) for i in range(3))
        except KeyError as error:
            raise ArgumentError(f"The profile says nothing about {error} of {spec}.", "Give its sizes.") from None

    def of(self, entry: GraphEntry) -> Profile:
        """What concerns a graph."""
        return Profile({dim: self.sizes[dim] for spec in entry.inputs for dim in spec.shape if isinstance(dim, str)})

    def within(self, other: Profile) -> bool:
        """Whether `other` allows everything that this one does."""
        return all(
            other.sizes[name][0] <= least and most <= other.sizes[name][2] for name, (least, _, most) in self.sizes.items()
        )

    @property
    def canonical(self) -> str:
        """For keys: the same text for the same sizes."""
        return json.dumps(self.sizes, sort_keys=True)


def pool_pages(config: object, build_config: BuildConfig) -> int:
    """Pages of a language model's pool, which its engine is built for; 0 for a tokenizer."""
    return (build_config.pages or config.default_pages()) if isinstance(config, LanguageModelConfig) else 0


def graph_profiles(bundle: Bundle[Any], build_config: BuildConfig) -> dict[str, tuple[Profile, ...]]:
    """The profiles of each graph, by its name: of `bundle_profiles` what concerns the graph, without what is the same twice."""
    profiles = bundle_profiles(bundle, build_config)
    return {name: _without_redundant([profile.of(entry) for profile in profiles]) for name, entry in bundle.graphs.items()}


def bundle_profiles(bundle: Bundle[Any], build_config: BuildConfig) -> tuple[Profile, ...]:
    """Sizes of everything that varies in a bundle's graphs, for the batches of a build config.

    More than one where not everything varies with everything else: an engine's working memory is for the largest sizes of a
    profile together, and each has kernels of its own.
    """
    config = bundle.config
    if isinstance(config, TokenizerConfig):
        return (Profile({"batch": build_config.batch}),)
    slots = config.layers * pool_pages(config, build_config)
    pool = {"slots": (slots, slots, slots), "page": (PAGE_SIZE, PAGE_SIZE, PAGE_SIZE)}
    steps = (
        [_generator_sizes(config, build_config)]
        if isinstance(config, GeneratorConfig)
        else _understander_sizes(config, build_config)
    )
    return tuple(Profile(pool | step) for step in steps)


def _without_redundant(profiles: Sequence[Profile]) -> tuple[Profile, ...]:
    """Without those that an earlier or larger one makes superfluous."""
    kept: list[Profile] = []
    for profile in profiles:
        if not any(profile.within(other) for other in kept):
            kept = [*(other for other in kept if not other.within(profile)), profile]
    return tuple(kept)


def _generator_sizes(config: GeneratorConfig, build_config: BuildConfig) -> dict[str, DimRange]:
    least, usual, most = build_config.batch
    longest = config.prefix_length + 1
    table = pages_for(config.prefix_length + config.n_codes)
    window = min(MAX_TOP_K + TIES, config.codebook_size)
    return {
        # A picture has two rows, with and without its prompt.
        "batch": (least, 2 * usual, 2 * most),
        "queries": (1, min(64, longest), max(longest, config.scales.counts[-1])),
        "table": (1, table // 2 or 1, table),
        "window": (1, min(608, window), window),
    }


def _understander_sizes(config: UnderstanderConfig, build_config: BuildConfig) -> list[dict[str, DimRange]]:
    """Steps of one token for every answer, which come most often, and pieces of one prompt."""
    piece = min(PREFILL_CHUNK, config.context)
    # No row can be longer than the pool, whatever the model reads.
    table = min(pages_for(config.context), pool_pages(config, build_config))
    seen, window = min(config.context, config.vocabulary), min(MAX_TOP_K + TIES, config.vocabulary)
    both = {
        "table": (1, table // 2 or 1, table),
        # An answer's different tokens, for a penalty: never more than fit.
        "seen": (1, min(64, seen), seen),
        "window": (1, min(64, window), window),
    }
    tokens: dict[str, DimRange] = {"batch": build_config.batch, "queries": (1, 1, 1)}
    pieces: dict[str, DimRange] = {"batch": (1, 1, 1), "queries": (1, piece, piece)}
    return [both | tokens, both | pieces]
