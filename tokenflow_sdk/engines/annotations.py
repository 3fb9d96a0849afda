"""What measurements on photos left in a bundle for its engines: nodes that stay in float32, ranges of 8-bit convolutions."""

from __future__ import annotations

import json
import math
from typing import Any

from tokenflow_sdk.bundle.bundle import Bundle
from tokenflow_sdk.errors import CorruptBundleError, EngineBuildError
from tokenflow_sdk.passes.quantize import ActivationRanges, EightBit

__all__ = ["PINNED", "RANGES", "decoder_ranges", "pinned_nodes"]

PINNED = "pinned"
"""The bundle's file of nodes that stay in float32, by precision and graph."""
RANGES = "ranges"
"""The bundle's file of magnitudes that convolutions read, by type of 8 bits, graph and node."""


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
