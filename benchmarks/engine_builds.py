"""Measures the time and memory of building engines at full size without a GPU, as for a fleet.

`tokenflow build` builds every graph of a bundle for one target after another, each time in a process of its own with an empty
cache. Weights are stand-ins at the released sizes. The generator has the released widths but few layers, because a build holds
several copies of the weights.

    python benchmarks/engine_builds.py
    python benchmarks/engine_builds.py --bundles clipb_256 --precisions fp16 --targets sm86
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.common import machine, prepare, watch
from benchmarks.export_7b import CODES, SIZES, write_random
from tests.support.mini_generator import PATCH_NUMS_16, export_quietly, tokenizer_bundle
from tokenflow_export.models.config import VARIANTS
from tokenflow_sdk.engines.cache import EngineCache

GENERATOR_LAYERS = 2


@dataclass(frozen=True)
class Build:
    """The build of all engines of a bundle: its time, the size of each engine, and the peaks of resident memory.

    All sizes are in bytes; `peak_anonymous` leaves out mapped files.
    """

    bundle: str
    precision: str
    target: str
    seconds: float
    engines: dict[str, int]
    peak_resident: float
    peak_anonymous: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    choices = [*VARIANTS, "generator"]
    parser.add_argument("--bundles", nargs="+", choices=choices, default=["clipb_256", "siglip_384", "generator"])
    parser.add_argument("--precisions", nargs="+", choices=("fp32", "fp16", "bf16"), default=["fp16", "fp32"])
    parser.add_argument("--targets", nargs="+", default=["sm80", "sm86", "sm89", "sm120"])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "engine_builds_cpu")
    arguments = parser.parse_args()
    builds: list[Build] = []
    for name in arguments.bundles:
        bundle = bundle_of(name)
        for precision in arguments.precisions:
            for target in arguments.targets:
                builds.append(build(bundle, precision, target))
                report = {"machine": machine(), "builds": [asdict(found) for found in builds]}
                arguments.out.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n")
                arguments.out.with_suffix(".md").write_text(as_markdown(builds))
    print(as_markdown(builds))


def bundle_of(name: str) -> Path:
    """The bundle of a tokenizer, or of the generator; made if it does not exist."""
    if name != "generator":
        prepare(name, ROOT / "checkpoints" / f"{name}.pt", ROOT / "bundles" / name)
        return ROOT / "bundles" / name
    bundle = ROOT / "bundles" / f"generator_{SIZES['hidden_size']}x{GENERATOR_LAYERS}"
    if not bundle.exists():
        with tempfile.TemporaryDirectory() as work:
            write_random(Path(work) / "hf", GENERATOR_LAYERS)
            export_quietly(Path(work) / "hf", tokenizer_bundle(Path(work) / "tokenizer", PATCH_NUMS_16, CODES), bundle)
    return bundle


def build(bundle: Path, precision: str, target: str) -> Build:
    with tempfile.TemporaryDirectory() as cache:
        words = ["build", bundle, "--precision", precision, "--target", target, "--cache", cache]
        began = perf_counter()
        peaks = watch([sys.executable, "-m", "tokenflow_sdk.cli", *map(str, words)])
        seconds = perf_counter() - began
        engines = {entry.key.graph: entry.size for entry in EngineCache(Path(cache)).entries()}
    return Build(bundle.name, precision, target, seconds, engines, **peaks)


def as_markdown(builds: Sequence[Build]) -> str:
    import tensorrt_rtx

    where = f"{machine()['cpu']}, {os.cpu_count()} cores; tensorrt_rtx {tensorrt_rtx.__version__}"
    lines = [
        "# Engines built at full size, without a GPU",
        "",
        f"{where}. `{' '.join(['python benchmarks/engine_builds.py', *sys.argv[1:]])}`.",
        "",
        "| bundle | precision | target | time | peak memory | without mapped files | engines |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for found in builds:
        figures = (
            f"`{found.bundle}`",
            found.precision,
            found.target,
            f"{found.seconds:.0f} s",
            f"{found.peak_resident / 1e9:.1f} GB",
            f"{found.peak_anonymous / 1e9:.1f} GB",
            f"{len(found.engines)}, {sum(found.engines.values()) / 1e6:,.0f} MB",
        )
        lines.append(f"| {' | '.join(figures)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
