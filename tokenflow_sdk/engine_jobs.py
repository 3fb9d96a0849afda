"""Which engines a bundle needs, and getting them: from the cache, else built once whoever asks first."""

from __future__ import annotations

import hashlib
import json
import math
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from tokenflow_sdk import token_scheduler
from tokenflow_sdk.backends.cuda import Cuda
from tokenflow_sdk.bundle import Bundle
from tokenflow_sdk.config import GeneratorConfig, GraphEntry, TokenizerConfig, UnderstanderConfig
from tokenflow_sdk.engine_build import REVISION, Profile, Progress, Range, build_engine, engine_graph
from tokenflow_sdk.engine_cache import CachedEngine, EngineCache, EngineKey, graph_digest
from tokenflow_sdk.engine_recipe import EnginePlan
from tokenflow_sdk.errors import BackendError, CorruptBundleError, EngineBuildError, OutputError
from tokenflow_sdk.quantize import EightBit, Ranges
from tokenflow_sdk.sampling import MAX_TOP_K, TIES
from tokenflow_sdk.scheduler import PAGE_SIZE, default_pages

__all__ = [
    "PINNED",
    "RANGES",
    "EngineJob",
    "decoder_ranges",
    "engine_jobs",
    "pinned_nodes",
    "pool_pages",
    "profiles_of",
]

PINNED = "pinned"
"""The bundle's file of nodes that stay in float32, by precision and graph."""
RANGES = "ranges"
"""The bundle's file of magnitudes that convolutions read, by type of 8 bits, graph and node."""
_FP8_FROM = 89
"""The first GPU architecture with fp8 products."""


@dataclass(frozen=True)
class EngineJob:
    """One engine to have: of a graph, for a target."""

    graph: Path
    entry: GraphEntry
    key: EngineKey
    profiles: tuple[Profile, ...]
    plan: EnginePlan
    pinned: tuple[str, ...] = ()
    ranges: Ranges | None = None
    cuda: Cuda | None = None
    """The GPU it is built on; None: built ahead."""

    def run(self, trt: ModuleType, cache: EngineCache, progress: Progress | None = None) -> tuple[CachedEngine, bool]:
        """The engine, and whether it was built now. Two processes that want the same one build it once.

        Raises:
            EngineBuildError, ArgumentError, MissingPackageError: see `build_engine`.
            OutputError: the cache or the temporary directory cannot be written.
        """
        with cache.building(self.key):
            found = cache.get(self.key)
            if found is not None:
                return found, False
            try:
                with tempfile.TemporaryDirectory(prefix="tokenflow-") as work:
                    engine = self._build(trt, Path(work), progress)
            except OSError as error:
                raise OutputError(
                    f"The graph of {self.key.title} cannot be prepared: {error.strerror or error}.",
                    "Free some space, or name another directory for temporary files in $TMPDIR.",
                ) from error
            return cache.put(self.key, engine, self.plan.to_json()), True

    def _build(self, trt: ModuleType, work: Path, progress: Progress | None) -> bytes:
        plan = self.plan
        graph = engine_graph(self.graph, None if plan.precision == "fp32" else plan.precision, work, self.pinned, self.ranges)
        workspace = int(plan.workspace_gb * 2**30) or None
        target = self.key.target if plan.targets else None
        return build_engine(trt, graph, self.entry, self.profiles, target, workspace, progress, self.cuda)


def engine_jobs(bundle: Bundle[Any], plan: EnginePlan, trt: ModuleType, device: int = 0) -> Iterator[EngineJob]:
    """The engines of every graph of a bundle for every target; without one, for GPU `device`.

    Raises:
        MissingPackageError, BackendError: the plan names no target, and there is no GPU or no way to ask it.
        EngineBuildError: the bundle has no reference, or was exported in float16 and the plan wants another precision; or the
            plan wants a decoder in 8 bits for which the bundle has no ranges, or fp8 where a GPU has none.
        CorruptBundleError: the bundle's list of pinned nodes or of ranges is damaged.
    """
    if "reference" not in bundle.assets:
        raise EngineBuildError(
            f"{bundle.path} has no reference that its engines could be compared with: an older SDK exported it.",
            "Export it again with `python -m export`, or use backend='onnxruntime'.",
        )
    if bundle.in_half and plan.precision != "fp16":
        raise EngineBuildError(
            f"{bundle.path} was exported in float16, so its engines cannot be in {plan.precision}.",
            "Build with --precision fp16, or export it again with --dtype fp32; --weights stays as it was.",
        )
    profiles, pins = profiles_of(bundle, plan), pinned_nodes(bundle, plan.precision)
    cuda = None if plan.targets else _gpu_here(plan, device)
    targets = plan.targets if cuda is None else (cuda.architecture,)
    # Full TensorRT chooses kernels for the GPU that it measures them on, and warns of others.
    gpu = cuda.model if cuda is not None and plan.backend == "tensorrt" else ""
    ranges = None
    if plan.decoder is not None and isinstance(bundle.config, TokenizerConfig):
        _require_arithmetic(plan.decoder, targets)
        ranges = decoder_ranges(bundle, plan.decoder)
    for target in targets:
        for name, entry in bundle.graphs.items():
            own = _needed([profile.of(entry) for profile in profiles])
            sizes = " ".join(profile.canonical for profile in own)
            key = EngineKey(
                graph=name,
                graph_sha256=graph_digest(entry),
                revision=REVISION,
                flavour=plan.backend,
                version=str(trt.__version__),
                target=target,
                precision=_precision_key(plan.precision, pins.get(name, ()), ranges),
                gpu=gpu,
                profile=hashlib.sha256(f"{sizes} {plan.workspace_gb}".encode()).hexdigest()[:16],
            )
            yield EngineJob(
                bundle.path / entry.files[0].name,
                entry,
                key,
                own,
                plan,
                pins.get(name, ()),
                ranges if name == "decode" else None,
                cuda,
            )


def _gpu_here(plan: EnginePlan, device: int) -> Cuda:
    try:
        return Cuda(device)
    except BackendError as error:
        if plan.backend == "tensorrt-rtx":
            raise BackendError(
                error.message, f"Name what to build for, e.g. `--target sm86,sm89,sm120`. {error.hint}"
            ) from error
        raise


def pinned_nodes(bundle: Bundle[Any], precision: str) -> dict[str, tuple[str, ...]]:
    """Nodes of each graph that a precision search found must stay in float32; see `python -m export precision-search`.

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
            f"{bundle.path / entry.name} is no list of nodes: {error}.", "Run `python -m export precision-search` again."
        ) from error


def decoder_ranges(bundle: Bundle[Any], dtype: EightBit) -> Ranges:
    """What `python -m export calibrate` measured for the decoder.

    Raises:
        EngineBuildError: nothing was measured, or everything costs too much.
        CorruptBundleError: the bundle's file is damaged.
    """
    again = f"Run `python -m export calibrate {bundle.path} --images photos/` on photos of yours"
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
    return Ranges(dtype, magnitudes)


def _require_arithmetic(dtype: EightBit, targets: tuple[str, ...]) -> None:
    """Raises:
    EngineBuildError: a target is older than fp8 products.
    """
    numbers = {target: re.fullmatch(r"sm(\d+)", target) for target in targets}
    older = [target for target, number in numbers.items() if number is not None and int(number[1]) < _FP8_FROM]
    if dtype == "fp8" and older:
        raise EngineBuildError(
            f"{', '.join(older)} has no fp8 arithmetic; GPUs from sm{_FP8_FROM} on have.", "Build with --decoder int8."
        )


def _precision_key(precision: str, pinned: tuple[str, ...], ranges: Ranges | None) -> str:
    """`fp16`, or `fp16, 3 pinned (1a2b3c4d)`, or `fp16, int8 decoder (1a2b3c4d)`: that for all graphs of a tokenizer, because
    its certificate is of all of them together."""
    parts = [precision]
    if pinned:
        digest = hashlib.sha256("\n".join(sorted(pinned)).encode()).hexdigest()[:8]
        parts.append(f"{len(pinned)} pinned ({digest})")
    if ranges is not None:
        parts.append(f"{ranges.dtype} decoder ({ranges.digest})")
    return ", ".join(parts)


def pool_pages(config: object, plan: EnginePlan) -> int:
    """Pages of a language model's pool, which its engine is built for; 0 for a tokenizer."""
    if isinstance(config, GeneratorConfig):
        return plan.pages or default_pages(config, PAGE_SIZE)
    if isinstance(config, UnderstanderConfig):
        return plan.pages or token_scheduler.default_pages(config, PAGE_SIZE)
    return 0


def profiles_of(bundle: Bundle[Any], plan: EnginePlan) -> tuple[Profile, ...]:
    """Sizes of everything that varies in a bundle's graphs, for the batches of a plan.

    More than one where not everything varies with everything else: an engine's working memory is for the largest sizes of a
    profile together, and each has kernels of its own.
    """
    config = bundle.config
    if isinstance(config, TokenizerConfig):
        return (Profile({"batch": plan.batch}),)
    slots = config.layers * pool_pages(config, plan)
    pool = {"slots": (slots, slots, slots), "page": (PAGE_SIZE, PAGE_SIZE, PAGE_SIZE)}
    steps = [_drawing(config, plan)] if isinstance(config, GeneratorConfig) else _answering(config, plan)
    return tuple(Profile(pool | step) for step in steps)


def _needed(profiles: Sequence[Profile]) -> tuple[Profile, ...]:
    """Without those that an earlier or larger one makes superfluous."""
    kept: list[Profile] = []
    for profile in profiles:
        if not any(profile.within(other) for other in kept):
            kept = [*(other for other in kept if not other.within(profile)), profile]
    return tuple(kept)


def _drawing(config: GeneratorConfig, plan: EnginePlan) -> dict[str, Range]:
    least, usual, most = plan.batch
    longest = config.prefix_length + 1
    table = -(-(config.prefix_length + config.n_codes) // PAGE_SIZE)
    window = min(MAX_TOP_K + TIES, config.codebook_size)
    return {
        # A picture has two rows, with and without its prompt.
        "batch": (least, 2 * usual, 2 * most),
        "queries": (1, min(64, longest), max(longest, config.patch_nums[-1] ** 2)),
        "table": (1, table // 2 or 1, table),
        "window": (1, min(608, window), window),
    }


def _answering(config: UnderstanderConfig, plan: EnginePlan) -> list[dict[str, Range]]:
    """Steps of one token for every answer, which come most often, and pieces of one prompt."""
    piece = min(token_scheduler.CHUNK, config.context)
    # No row can be longer than the pool, whatever the model reads.
    table = min(-(-config.context // PAGE_SIZE), pool_pages(config, plan))
    seen, window = min(config.context, config.vocabulary), min(MAX_TOP_K + TIES, config.vocabulary)
    both = {
        "table": (1, table // 2 or 1, table),
        # An answer's different tokens, for a penalty: never more than fit.
        "seen": (1, min(64, seen), seen),
        "window": (1, min(64, window), window),
    }
    tokens: dict[str, Range] = {"batch": plan.batch, "queries": (1, 1, 1)}
    pieces: dict[str, Range] = {"batch": (1, 1, 1), "queries": (1, piece, piece)}
    return [both | tokens, both | pieces]
