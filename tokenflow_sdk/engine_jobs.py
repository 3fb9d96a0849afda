"""Which engines a bundle needs, and getting them: from the cache, else built once whoever asks first."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from tokenflow_sdk.backends.cuda import Cuda
from tokenflow_sdk.bundle import Bundle
from tokenflow_sdk.config import GeneratorConfig, GraphEntry, TokenizerConfig
from tokenflow_sdk.engine_build import Profile, Progress, build_engine, engine_graph
from tokenflow_sdk.engine_cache import CachedEngine, EngineCache, EngineKey, graph_digest
from tokenflow_sdk.engine_recipe import EnginePlan
from tokenflow_sdk.errors import CorruptBundleError, OutputError
from tokenflow_sdk.sampling import MAX_TOP_K, TIES
from tokenflow_sdk.scheduler import PAGE_SIZE, default_pages

__all__ = ["PINNED", "EngineJob", "engine_jobs", "pinned_nodes", "pool_pages", "profile_of"]

PINNED = "pinned"
"""The bundle's file of nodes that stay in float32, by precision and graph."""


@dataclass(frozen=True)
class EngineJob:
    """One engine to have: of a graph, for a target."""

    graph: Path
    entry: GraphEntry
    key: EngineKey
    profile: Profile
    plan: EnginePlan
    pinned: tuple[str, ...] = ()

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
            return cache.put(self.key, engine, {}), True

    def _build(self, trt: ModuleType, work: Path, progress: Progress | None) -> bytes:
        plan = self.plan
        graph = engine_graph(self.graph, None if plan.precision == "fp32" else plan.precision, work, self.pinned)
        workspace = int(plan.workspace_gb * 2**30) or None
        target = self.key.target if plan.targets else None
        return build_engine(trt, graph, self.entry, self.profile, target, workspace, progress)


def engine_jobs(bundle: Bundle[Any], plan: EnginePlan, trt: ModuleType, device: int = 0) -> Iterator[EngineJob]:
    """The engines of every graph of a bundle for every target; without one, for GPU `device`.

    Raises:
        MissingPackageError, BackendError: the plan names no target, and there is no GPU or no way to ask it.
    """
    profile, pins = profile_of(bundle, plan), pinned_nodes(bundle, plan.precision)
    for target in plan.targets or (Cuda(device).architecture,):
        for name, entry in bundle.graphs.items():
            own = Profile({dim: profile.sizes[dim] for spec in entry.inputs for dim in spec.shape if isinstance(dim, str)})
            key = EngineKey(
                graph=name,
                graph_sha256=graph_digest(entry),
                flavour=plan.backend,
                version=str(trt.__version__),
                target=target,
                precision=_precision_key(plan.precision, pins.get(name, ())),
                profile=hashlib.sha256(f"{own.canonical} {plan.workspace_gb}".encode()).hexdigest()[:16],
            )
            yield EngineJob(bundle.path / entry.files[0].name, entry, key, own, plan, pins.get(name, ()))


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


def _precision_key(precision: str, pinned: tuple[str, ...]) -> str:
    """`fp16`, or `fp16, 3 pinned (1a2b3c4d)`."""
    digest = hashlib.sha256("\n".join(sorted(pinned)).encode()).hexdigest()[:8]
    return f"{precision}, {len(pinned)} pinned ({digest})" if pinned else precision


def pool_pages(config: object, plan: EnginePlan) -> int:
    """Pages of a generator's pool, which its engine is built for; 0 for a tokenizer."""
    if not isinstance(config, GeneratorConfig):
        return 0
    return plan.pages or default_pages(config, PAGE_SIZE)


def profile_of(bundle: Bundle[Any], plan: EnginePlan) -> Profile:
    """Sizes of everything that varies in a bundle's graphs, for the batches of a plan."""
    config = bundle.config
    least, usual, most = plan.batch
    if isinstance(config, TokenizerConfig):
        return Profile({"batch": plan.batch})
    assert isinstance(config, GeneratorConfig)
    longest = config.prefix_length + 1
    table = -(-(config.prefix_length + config.n_codes) // PAGE_SIZE)
    slots = config.layers * pool_pages(config, plan)
    window = min(MAX_TOP_K + TIES, config.codebook_size)
    return Profile(
        {
            # A picture has two rows, with and without its prompt.
            "batch": (least, 2 * usual, 2 * most),
            "queries": (1, min(64, longest), max(longest, config.patch_nums[-1] ** 2)),
            "table": (1, table // 2 or 1, table),
            "slots": (slots, slots, slots),
            "page": (PAGE_SIZE, PAGE_SIZE, PAGE_SIZE),
            "window": (1, min(608, window), window),
        }
    )
