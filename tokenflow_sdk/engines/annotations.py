"""What searches and calibration have written into a bundle for its engines: nodes that stay in float32, 8-bit ranges."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tokenflow_sdk.bundle.bundle import Bundle
from tokenflow_sdk.bundle.model_config import TokenizerConfig
from tokenflow_sdk.engines.build_config import BuildConfig, Precision
from tokenflow_sdk.errors import CorruptBundleError, EngineBuildError
from tokenflow_sdk.passes.quantize import ActivationRanges, EightBit

__all__ = ["PINNED", "RANGES", "Annotations", "decoder_ranges", "pinned_nodes"]

PINNED = "pinned"
"""The bundle's file of nodes that stay in float32, by precision and graph."""
RANGES = "ranges"
"""The bundle's file of magnitudes that convolutions read, by type of 8 bits, graph and node."""


@dataclass(frozen=True)
class Annotations:
    """The precision of a bundle's engines, with its exceptions.

    `pinned` are the nodes of each graph that stay in float32; `ranges` those of a decoder whose convolutions are rounded to 8
    bits, None where it is not.
    """

    precision: Precision
    pinned: Mapping[str, tuple[str, ...]]
    ranges: ActivationRanges | None

    @classmethod
    def of(cls, bundle: Bundle[Any], build_config: BuildConfig) -> Annotations:
        """Read what a bundle says for a build config.

        Raises:
            EngineBuildError: a decoder in 8 bits is asked for, and the bundle has no ranges for it.
            CorruptBundleError: the bundle's list of pinned nodes or of ranges is damaged.
        """
        dtype = build_config.decoder if isinstance(bundle.config, TokenizerConfig) else None
        ranges = None if dtype is None else decoder_ranges(bundle, dtype)
        return cls(build_config.precision, pinned_nodes(bundle, build_config.precision), ranges)

    def key(self, graph: str) -> str:
        """For the key of a graph's engine: `fp16`, `fp16, 3 pinned (1a2b3c4d)`, `fp16, int8 decoder (1a2b3c4d)`.

        The decoder's ranges are in the keys of all graphs, because one certificate covers them together.
        """
        parts: list[str] = [self.precision]
        if pinned := self.pinned.get(graph, ()):
            digest = hashlib.sha256("\n".join(sorted(pinned)).encode()).hexdigest()[:8]
            parts.append(f"{len(pinned)} pinned ({digest})")
        if self.ranges is not None:
            parts.append(f"{self.ranges.dtype} decoder ({self.ranges.digest})")
        return ", ".join(parts)


def pinned_nodes(bundle: Bundle[Any], precision: str) -> dict[str, tuple[str, ...]]:
    """Nodes of each graph that a precision search found must stay in float32; see `tokenflow export precision-search`.

    Raises:
        CorruptBundleError: the bundle's list is damaged.
    """
    if PINNED not in bundle.assets:
        return {}
    entry = bundle.asset(PINNED)
    bundle.verify(entry)
    try:
        found = json.loads((bundle.path / entry.name).read_bytes())[precision]
        return {str(graph): tuple(map(str, names)) for graph, names in found.items()}
    except KeyError:
        return {}
    except (ValueError, TypeError, AttributeError) as error:
        raise CorruptBundleError(
            f"{bundle.path / entry.name} is no list of nodes: {error}.", "Run `tokenflow export precision-search` again."
        ) from error


def decoder_ranges(bundle: Bundle[Any], dtype: EightBit) -> ActivationRanges:
    """What `tokenflow export calibrate` measured for the decoder.

    Raises:
        EngineBuildError: nothing was measured, or everything costs too much.
        CorruptBundleError: the bundle's file is damaged.
    """
    again = f"Run `tokenflow export calibrate {bundle.path} --images photos/` on photos of yours"
    if RANGES not in bundle.assets:
        raise EngineBuildError(
            f"{bundle.path} does not say which magnitudes its decoder reads, so it cannot be built in {dtype}.",
            f"{again}, or build without --decoder.",
        )
    entry = bundle.asset(RANGES)
    bundle.verify(entry)
    path = bundle.path / entry.name
    try:
        found = json.loads(path.read_bytes())[dtype]["decode"]
        magnitudes = {str(name): float(value) for name, value in found.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CorruptBundleError(f"{path} is no list of magnitudes: {error!r}.", f"{again}.") from error
    if not magnitudes:
        raise EngineBuildError(
            f"No convolution of {bundle.path} may be computed in {dtype}: its pictures would differ too much.",
            "Build without --decoder.",
        )
    if not all(math.isfinite(value) and value > 0 for value in magnitudes.values()):
        raise CorruptBundleError(f"{path} holds magnitudes that are not above 0.", f"{again}.")
    return ActivationRanges(dtype, magnitudes)
