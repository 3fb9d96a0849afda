"""Optimization profiles: the range of sizes that each dynamic dimension of a bundle's graphs may have in its engines."""

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

__all__ = ["DimRange", "Profile", "Shapes", "graph_profiles", "images_at_once", "pool_pages"]

_QUERY_LIMITS = (16, 100)
"""Numbers of queries up to which a generator's steps have optimization profiles of their own."""

DimRange = tuple[int, int, int]
"""Least, usual and largest size of a dimension: TensorRT's min, opt and max."""
Shapes = tuple[tuple[int, ...], ...]
"""Least, usual and largest shape of an input."""


@dataclass(frozen=True)
class Profile:
    """An optimization profile.

    Args:
        sizes: least, usual and largest size of each dynamic dimension, by its name in bundle.json.

    Raises:
        ArgumentError: a dimension's sizes are not positive and ascending.
    """

    sizes: Mapping[str, DimRange]

    def __post_init__(self) -> None:
        for name, (least, usual, most) in self.sizes.items():
            if not 0 < least <= usual <= most:
                raise ArgumentError(f"{name} cannot go from {least} over {usual} to {most}.", "Give sizes in ascending order.")

    def shapes(self, spec: TensorSpec) -> Shapes:
        """Least, usual and largest shape of an input.

        Raises:
            ArgumentError: the profile lacks one of the input's dynamic dimensions.
        """
        try:
            return tuple(tuple(dim if isinstance(dim, int) else self.sizes[dim][i] for dim in spec.shape) for i in range(3))
        except KeyError as error:
            raise ArgumentError(f"The profile says nothing about {error} of {spec}.", "Give its sizes.") from None

    def of(self, entry: GraphEntry) -> Profile:
        """This profile, limited to the dynamic dimensions of a graph's inputs."""
        return Profile({dim: self.sizes[dim] for spec in entry.inputs for dim in spec.shape if isinstance(dim, str)})

    def within(self, other: Profile) -> bool:
        """Whether `other` allows all shapes that this profile allows."""
        return all(
            other.sizes[name][0] <= least and most <= other.sizes[name][2] for name, (least, _, most) in self.sizes.items()
        )

    @property
    def canonical(self) -> str:
        """The sizes as JSON with sorted names: equal text for equal profiles."""
        return json.dumps(self.sizes, sort_keys=True)


def pool_pages(config: object, build_config: BuildConfig) -> int:
    """Pages of the key/value pool that a language model's engine is built for.

    Args:
        config: of the model; a tokenizer's has no pool and gives 0.
        build_config: its `pages`, if not 0, override the model's default.
    """
    return (build_config.pages or config.default_pages()) if isinstance(config, LanguageModelConfig) else 0


def images_at_once(config: GeneratorConfig, build_config: BuildConfig) -> int:
    """Most images that one step of a generator's engines takes: as many as the build config asks for and the pool holds.

    The pool also holds their prompts, each of any length, and a negative prompt.
    """
    prompt = pages_for(config.prefix_length + 1)
    held = (pool_pages(config, build_config) - prompt) // (config.image_pages() + prompt)
    return max(1, min(build_config.batch[2], held))


def graph_profiles(bundle: Bundle[Any], build_config: BuildConfig) -> dict[str, tuple[Profile, ...]]:
    """The optimization profiles of each graph of a bundle, by its name.

    TensorRT tunes kernels for each profile and sizes working memory for all of a profile's largest sizes together. A generator
    has a profile for steps of up to 16 queries, of up to 100, and for the rest, so that coarse scales do not run on kernels
    for fine ones. An understander has one for single tokens of many answers and one for chunks of one prompt.
    """
    config = bundle.config
    if isinstance(config, TokenizerConfig):
        steps: list[dict[str, DimRange]] = [{"batch": build_config.batch}]
    elif isinstance(config, GeneratorConfig):
        steps = _generator_sizes(config, build_config)
    else:
        steps = _understander_sizes(config, build_config)
    if not isinstance(config, TokenizerConfig):
        slots = config.layers * pool_pages(config, build_config)
        pool: dict[str, DimRange] = {"slots": (slots,) * 3, "page": (PAGE_SIZE,) * 3}
        steps = [pool | step for step in steps]
    return {
        name: _without_redundant([Profile(_sampled_rows(step) if name == "sample" else step).of(entry) for step in steps])
        for name, entry in bundle.graphs.items()
    }


def _sampled_rows(step: Mapping[str, DimRange]) -> dict[str, DimRange]:
    """The sizes of a step for the graph `sample`, in which the two rows of an image have become one.

    A single row of a single query is given twice; see `ScaleLoop`.
    """
    least, usual, most = step["batch"]
    return dict(step) | {"batch": (least, max(1, usual // 2), max(2, most // 2))}


def _without_redundant(profiles: Sequence[Profile]) -> tuple[Profile, ...]:
    """Drop repeated profiles, and those that lie within another one for the same number of queries."""
    kept: list[Profile] = []
    for profile in profiles:
        same = [other for other in kept if other.sizes.get("queries") == profile.sizes.get("queries")]
        if not any(profile.within(other) for other in same):
            kept = [*(other for other in kept if other not in same or not other.within(profile)), profile]
    return tuple(kept)


def _generator_sizes(config: GeneratorConfig, build_config: BuildConfig) -> list[dict[str, DimRange]]:
    """Sizes for prefill and for the scales of images: one dictionary for each limit of the number of queries."""
    prompt, counts = config.prefix_length + 1, config.scales.counts
    most = max(prompt, counts[-1])
    images = images_at_once(config, build_config)
    window = min(MAX_TOP_K + TIES, config.codebook_size)
    shared: dict[str, DimRange] = {
        # Classifier-free guidance runs two rows for each image: with and without the prompt.
        "batch": (1, 2 * min(build_config.batch[1], images), 2 * images),
        "window": (1, min(608, window), window),
    }
    steps = []
    for limit in [*(limit for limit in _QUERY_LIMITS if limit < most), most]:
        scale = max(i for i, count in enumerate(counts) if count <= limit)
        # What the last of these scales sees, or, in the comparison with the reference, a prompt and a scale.
        table = pages_for(config.prefix_length + max(config.scales.starts[scale], 1 + min(limit, counts[-1])))
        steps.append(shared | {"queries": (1, min(limit, counts[scale]), limit), "table": (1, table, table)})
    return steps


def _understander_sizes(config: UnderstanderConfig, build_config: BuildConfig) -> list[dict[str, DimRange]]:
    """Sizes for steps of one token for every running answer, which are the most frequent, and for chunks of one prompt."""
    chunk = min(PREFILL_CHUNK, config.context)
    # A row's block table cannot have more pages than the pool, however long the model's context is.
    table = min(pages_for(config.context), pool_pages(config, build_config))
    seen, window = min(config.context, config.vocabulary), min(MAX_TOP_K + TIES, config.vocabulary)
    shared = {
        "table": (1, table // 2 or 1, table),
        # Distinct tokens of an answer, for the repetition penalty.
        "seen": (1, min(64, seen), seen),
        "window": (1, min(64, window), window),
    }
    tokens: dict[str, DimRange] = {"batch": build_config.batch, "queries": (1, 1, 1)}
    chunks: dict[str, DimRange] = {"batch": (1, 1, 1), "queries": (1, chunk, chunk)}
    return [shared | tokens, shared | chunks]
