"""Reads a bundle's annotations for engine building: nodes pinned to float32, and ranges of the decoder's 8-bit convolutions.

`tokenflow export precision-search` and `tokenflow export calibrate` write them.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tokenflow_sdk.backends.openvino import OPENVINO
from tokenflow_sdk.bundle.bundle import Bundle
from tokenflow_sdk.bundle.model_config import TokenizerConfig
from tokenflow_sdk.engines.build_config import BuildConfig, Precision
from tokenflow_sdk.errors import CorruptBundleError, EngineBuildError
from tokenflow_sdk.files import read_regular
from tokenflow_sdk.passes.quantize import ActivationRanges, EightBit

__all__ = ["PINNED", "RANGES", "Annotations", "decoder_ranges", "pinned_nodes"]

PINNED = "pinned"
"""Name of the asset that lists the pinned nodes, as JSON: {precision: {graph: [node, ...]}}."""
RANGES = "ranges"
"""Name of the asset that holds the activation ranges, as JSON: {8-bit type: {graph: {node: magnitude}}}."""

_MOST_BYTES = 2**26


@dataclass(frozen=True)
class Annotations:
    """The precision of a bundle's engines and the nodes that deviate from it.

    Attributes:
        precision: of every node that is not listed below.
        pinned: names of the nodes that stay in float32, by graph.
        ranges: activation ranges of the decoder's convolutions that run in 8 bits; None: the decoder has no 8-bit convolutions.
        decoder: of a tokenizer's decoder, if it deviates; None: `precision`.
    """

    precision: Precision
    pinned: Mapping[str, tuple[str, ...]]
    ranges: ActivationRanges | None
    decoder: Precision | None = None

    @classmethod
    def of(cls, bundle: Bundle[Any], build_config: BuildConfig) -> Annotations:
        """Read the annotations that apply to a build config.

        Raises:
            EngineBuildError: the build config asks for an 8-bit decoder, and the bundle has no ranges for it.
            CorruptBundleError: the bundle's file of pinned nodes or of ranges is damaged.
        """
        precision = build_config.precision
        dtype = build_config.decoder if isinstance(bundle.config, TokenizerConfig) else None
        # Nodes are pinned for types that are written into a graph; OpenVINO chooses what stays in float32 by itself.
        pinned = {} if build_config.backend == OPENVINO else pinned_nodes(bundle, precision)
        if dtype is None or dtype == "bf16":
            return cls(precision, pinned, None, dtype)
        return cls(precision, pinned, decoder_ranges(bundle, dtype))

    def precision_of(self, graph: str) -> Precision:
        """The precision of a graph, but for what is pinned and in 8 bits."""
        return self.decoder if self.decoder is not None and graph == "decode" else self.precision

    def key(self, graph: str) -> str:
        """The `precision` field of a graph's `EngineKey`, with digests of the annotations.

        Examples: `fp16`, `fp16, 3 pinned (1a2b3c4d)`, `fp16, int8 decoder (1a2b3c4d)`, `fp32, bf16 decoder`. What is special
        about the decoder is in the keys of all graphs, because one certificate covers all graphs of a bundle.
        """
        parts: list[str] = [self.precision]
        if pinned := self.pinned.get(graph, ()):
            digest = hashlib.sha256("\n".join(sorted(pinned)).encode()).hexdigest()[:8]
            parts.append(f"{len(pinned)} pinned ({digest})")
        if self.ranges is not None:
            parts.append(f"{self.ranges.dtype} decoder ({self.ranges.digest})")
        if self.decoder is not None:
            parts.append(f"{self.decoder} decoder")
        return ", ".join(parts)


def pinned_nodes(bundle: Bundle[Any], precision: str) -> dict[str, tuple[str, ...]]:
    """The nodes that `tokenflow export precision-search` pinned to float32.

    Args:
        bundle: of any kind.
        precision: `fp16` or `bf16`, the precision of the other nodes.

    Returns:
        Names of the nodes, by graph; empty if no search was run for this precision.

    Raises:
        CorruptBundleError: the bundle's file of pinned nodes is damaged.
    """
    if PINNED not in bundle.assets:
        return {}
    entry = bundle.asset(PINNED)
    bundle.verify(entry)
    try:
        found = json.loads(read_regular(bundle.path / entry.name, _MOST_BYTES))[precision]
        return {str(graph): tuple(map(str, names)) for graph, names in found.items()}
    except KeyError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptBundleError(
            f"{bundle.path / entry.name} is no list of nodes: {error}.", "Run `tokenflow export precision-search` again."
        ) from error


def decoder_ranges(bundle: Bundle[Any], dtype: EightBit) -> ActivationRanges:
    """The activation ranges that `tokenflow export calibrate` measured for the decoder's convolutions.

    Raises:
        EngineBuildError: the bundle was not calibrated, or calibration found that no convolution may run in this type.
        CorruptBundleError: the bundle's file of ranges is damaged.
    """
    calibrate = f"Run `tokenflow export calibrate {bundle.path} --images photos/` on photos of yours"
    if RANGES not in bundle.assets:
        raise EngineBuildError(
            f"{bundle.path} does not say which magnitudes its decoder reads, so it cannot be built in {dtype}.",
            f"{calibrate}, or build without --decoder.",
        )
    entry = bundle.asset(RANGES)
    bundle.verify(entry)
    path = bundle.path / entry.name
    try:
        found = json.loads(read_regular(path, _MOST_BYTES))[dtype]["decode"]
        magnitudes = {str(name): float(value) for name, value in found.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        raise CorruptBundleError(f"{path} is no list of magnitudes: {error!r}.", f"{calibrate}.") from error
    if not magnitudes:
        raise EngineBuildError(
            f"No convolution of {bundle.path} may be computed in {dtype}: its images would differ too much.",
            "Build without --decoder.",
        )
    if not all(math.isfinite(value) and value > 0 for value in magnitudes.values()):
        raise CorruptBundleError(f"{path} holds magnitudes that are not above 0.", f"{calibrate}.")
    return ActivationRanges(dtype, magnitudes)
