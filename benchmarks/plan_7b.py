"""What a 7B text-to-image model takes on the devices of the build configs: arithmetic and counts, nothing that ran on a GPU.

    python -m benchmarks.plan_7b

Kernels are counted in engines that TensorRT-RTX builds without a GPU: one and two layers of a quarter of the width, and the
small graphs of `tiny`. Memory is the plan of `tokenflow build --plan`. Host calls are those that the tests count on a GPU that
is not there. The roofline is, step by step, the larger of two times: bytes over the memory's bandwidth, and operations over the
rate of the tensor cores, both as the data sheets state them. A run on a real device takes longer.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.passes.test_attention import GEOMETRIES
from tests.support.seven_billion import SEVEN_BILLION, bundle_of_seven_billion, layers_graph, plan_of
from tokenflow_sdk.bundle.bundle import find_bundle, open_bundle
from tokenflow_sdk.bundle.schema import GraphEntry
from tokenflow_sdk.engines.build import build_engine, engine_graph
from tokenflow_sdk.engines.build_config import BuildConfig
from tokenflow_sdk.engines.profiles import Profile, images_at_once
from tokenflow_sdk.generation.scheduler import STEP_TOKENS
from tokenflow_sdk.model.sampling import PRESETS

DEVICES = {
    "l4": ("L4", 300e9, 121e12),
    "rtx4090": ("RTX 4090", 1008e9, 165e12),
    "h100": ("H100 SXM", 3350e9, 989e12),
    "jetson-orin": ("AGX Orin", 204.8e9, 42.5e12),
}
"""Of each build config its device, bytes a second of memory, and dense float16 operations a second with sums in float32."""
PROMPT, NEGATIVE = 64, 16
HOST_CALLS = 18
"""Counted in tests/engines/test_engine_set.py; docs/explanation/decisions.md lists them."""
OUT = ROOT / "benchmarks" / "results" / "plan_7b.md"

C = SEVEN_BILLION
LAYER_WEIGHTS = 4 * C.width**2 + 3 * C.width * 11_008
HEAD_WEIGHTS = C.width * C.codebook_size
TOKEN_BYTES = 2 * 2 * C.layers * C.width
"""Keys and values of a token in float16."""


@dataclass(frozen=True)
class Work:
    """What a step moves and computes at least."""

    moved: float
    operations: float

    def seconds(self, device: str) -> float:
        _, bandwidth, rate = DEVICES[device]
        return max(self.moved / bandwidth, self.operations / rate)


def transformer_work(rows: int, queries: int, context: int) -> Work:
    """Weights are read once; pages are gathered (read, written and read again); new keys and values are written, and moved."""
    tokens = rows * queries
    weights = C.layers * LAYER_WEIGHTS
    moved = 2 * weights + 3 * rows * context * TOKEN_BYTES + 3 * tokens * TOKEN_BYTES
    return Work(moved, 2 * weights * tokens + 4 * tokens * (context + queries) * C.width * C.layers)


def sample_work(rows: int, queries: int) -> Work:
    """Logits are written and read in float32."""
    tokens = rows * queries
    return Work(2 * HEAD_WEIGHTS + 2 * 4 * tokens * C.codebook_size, 2 * HEAD_WEIGHTS * tokens)


def request_work(pictures: int, passes: int) -> list[Work]:
    """Each step of a request for pictures of one prompt, as the scheduler takes them."""
    steps = [transformer_work(1, PROMPT, 0), transformer_work(1, NEGATIVE, 0), sample_work(2 * pictures, 1)]
    counts, starts = C.scales.counts, C.scales.starts
    for count, start in list(zip(counts, starts, strict=True))[1:]:
        together = max(1, min(pictures, STEP_TOKENS // (2 * count)))
        for number in range(ceil(pictures / together)):
            rows = 2 * min(together, pictures - number * together)
            steps += passes * [transformer_work(rows, count, C.prefix_length + start), sample_work(rows, count)]
    return steps


def kernels(directory: Path) -> dict[str, int]:
    """Kernels of engines for sm89 in float16: of the transformer's first layer, each further one, and the small graphs."""
    import tensorrt_rtx

    def count(graph: Path, entry: GraphEntry, sizes: dict[str, tuple[int, int, int]]) -> int:
        work = Path(tempfile.mkdtemp(dir=directory))
        built = build_engine(tensorrt_rtx, engine_graph(graph, "fp16", work), entry, [Profile(sizes).of(entry)], ("sm89",))
        return built.figures["kernels"]

    sizes = {"batch": (1, 2, 16), "queries": (1, 64, 256), "table": (1, 25, 50), "slots": (512,) * 3, "page": (16,) * 3}
    layers = []
    for number in (1, 2):
        path = directory / str(number)
        path.mkdir()
        entry = layers_graph(path, replace(GEOMETRIES["generator"], layers=number))
        layers.append(count(path / "transformer.onnx", entry, sizes))
    tiny = open_bundle(find_bundle("tiny", "generator"))
    small = {
        name: count(tiny.graph_path(name), tiny.graph(name), sizes | {"window": (1, 608, 608)})
        for name in ("embed_image", "sample")
    }
    return {"first layer": layers[0], "further layer": layers[1] - layers[0], **small}


def as_markdown(directory: Path) -> str:
    import tensorrt_rtx

    counted = kernels(directory)
    step = counted["first layer"] + (C.layers - 1) * counted["further layer"] + counted["embed_image"] + counted["sample"]
    bundle = bundle_of_seven_billion(directory)
    lines = [
        "# A 7B text-to-image model on the devices of the build configs: planned, not measured",
        "",
        f"`python -m benchmarks.plan_7b`, TensorRT-RTX {tensorrt_rtx.__version__}, without a GPU. Data sheets' bandwidth and "
        f"rate; one prompt of {PROMPT} tokens, a negative one of {NEGATIVE}; float16. Memory is estimated "
        "(`tokenflow build --plan`).",
        "",
        "| build config | device | pictures | preset | steps | moved at least | roofline | memory of engines | of the device |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, (device, *_) in DEVICES.items():
        config = BuildConfig.from_file(name)
        plan = plan_of(bundle, config)
        most = images_at_once(C, config)
        for pictures, preset in ((1, "fast"), (1, "paper"), (most, "fast")):
            work = request_work(pictures, len(PRESETS[preset]))
            cells = (
                f"`{name}`",
                device,
                str(pictures),
                preset,
                str(sum(one.moved > 2 * C.layers * LAYER_WEIGHTS for one in work)),
                f"{sum(one.moved for one in work) / 1e9:,.0f} GB",
                f"{1000 * sum(one.seconds(name) for one in work):,.0f} ms",
                f"{plan.total / 1e9:.1f} GB",
                f"{config.memory_gb:.0f} GB",
            )
            lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "Steps are those of the transformer, two for the prompts among them. Of a step of a scale:",
        "",
        "| | count | how |",
        "| --- | --- | --- |",
        f"| kernels | {step} | {counted['first layer']} for one layer and what is around it, "
        f"{counted['further layer']} for each of {C.layers - 1} more, "
        f"{counted['embed_image']} of `embed_image`, {counted['sample']} of `sample`, "
        "in engines for sm89 |",
        f"| calls of the host | {HOST_CALLS} | for any number of pictures, counted on the tests' GPU |",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    with tempfile.TemporaryDirectory() as work:
        OUT.write_text(as_markdown(Path(work)))
    print(OUT.read_text())


if __name__ == "__main__":
    main()
