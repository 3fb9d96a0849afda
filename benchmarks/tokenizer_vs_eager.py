"""Compares a tokenizer in the runtime with the PyTorch model: same weights, same machine, in turns.

PyTorch is `tokenflow_export.models` in float32 with `torch.inference_mode` and the same number of threads. Its quantizer
computes the distances [M, K] to all codes for both halves, then the argmin. Both sides take turns in one process, and medians
are compared. Memory is the peak resident size of a process that runs one side alone, without what Python and the imports take.
It is compared with the weights plus the activations that the graph needs at once.

    python benchmarks/tokenizer_vs_eager.py --variant clipb_256
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.common import machine, peak_resident, prepare, random_codes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", default="clipb_256")
    parser.add_argument("--checkpoint", type=Path, help="default: stand-in weights, made if they are not there")
    parser.add_argument("--bundle", type=Path, help="default: bundles/VARIANT, exported if it is not there")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "tokenizer_cpu")
    parser.add_argument("--memory-of", nargs=2, metavar=("SIDE", "GRAPH"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.checkpoint = arguments.checkpoint or ROOT / "checkpoints" / f"{arguments.variant}.pt"
    arguments.bundle = arguments.bundle or ROOT / "bundles" / arguments.variant
    if arguments.memory_of:
        print(json.dumps(peak_memory(arguments, *arguments.memory_of)))
        return
    prepare(arguments.variant, arguments.checkpoint, arguments.bundle)
    times = timings(arguments)
    memory = {graph: memory_figures(arguments, graph) for graph in ("encode", "decode")}
    report = {"variant": arguments.variant, "threads": arguments.threads, "rounds": arguments.rounds} | machine()
    report |= {"seconds": times, "bytes": memory}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n")
    text = as_markdown(report)
    arguments.out.with_suffix(".md").write_text(text)
    print(text)


def eager_calls(arguments: argparse.Namespace, images: NDArray[np.uint8]) -> dict[str, Callable[[], object]]:
    import torch

    from tokenflow_export.checkpoints.tokenizer import load_model, read_state_dict, recognise

    torch.set_num_threads(arguments.threads)
    state = read_state_dict(arguments.checkpoint)
    config = recognise({key: tuple(value.shape) for key, value in state.items()}, arguments.variant)
    model = load_model(state, config)
    pictures = torch.from_numpy(images)
    codes = torch.from_numpy(random_codes(config.codebook_size, config.n_codes)).long()

    def inference(function: Callable[[torch.Tensor], object], value: torch.Tensor) -> Callable[[], object]:
        def call() -> object:
            with torch.inference_mode():
                return function(value)

        return call

    return {"encode": inference(model.encode, pictures), "decode": inference(model.decode, codes)}


def runtime_calls(arguments: argparse.Namespace, images: NDArray[np.uint8]) -> dict[str, Callable[[], object]]:
    from tokenflow_sdk import Tokenizer

    tokenizer = Tokenizer.from_pretrained(arguments.bundle, device="cpu", threads=arguments.threads)
    codes = random_codes(tokenizer.config.codebook_size, tokenizer.config.n_codes)
    return {"encode": lambda: tokenizer.encode_array(images), "decode": lambda: tokenizer.decode_array(codes)}


def one_picture(arguments: argparse.Namespace) -> NDArray[np.uint8]:
    from tokenflow_sdk.bundle.bundle import Bundle
    from tokenflow_sdk.bundle.model_config import TokenizerConfig
    from tokenflow_sdk.pictures.images import preprocess

    config = Bundle.open(arguments.bundle, TokenizerConfig).config
    return preprocess(ROOT / "examples" / "chelsea.jpg", config.image_size, config.preprocess)[None]


def timings(arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    images = one_picture(arguments)
    began = perf_counter()
    ours = runtime_calls(arguments, images)
    opened = perf_counter() - began
    theirs = eager_calls(arguments, images)
    result: dict[str, dict[str, float]] = {"open": {"runtime": opened}}
    for graph in ("encode", "decode"):
        seconds: dict[str, list[float]] = {"eager": [], "runtime": []}
        for i in range(arguments.rounds + 2):
            for side, call in (("eager", theirs[graph]), ("runtime", ours[graph])):
                began = perf_counter()
                call()
                # Two rounds warm both sides up: weights are paged in, and arenas grow.
                seconds[side] += [perf_counter() - began] if i >= 2 else []
        result[graph] = {side: median(values) for side, values in seconds.items()}
    return result


def peak_memory(arguments: argparse.Namespace, side: str, graph: str) -> dict[str, int]:
    """Run one graph on one side, and measure how far the peak of the resident size grew."""
    images = one_picture(arguments)
    make = eager_calls if side == "eager" else runtime_calls
    if side == "eager":
        import torch  # noqa: F401 - the baseline includes the import
    else:
        import onnxruntime  # noqa: F401
    before = peak_resident()
    call = make(arguments, images)[graph]
    for _ in range(3):
        call()
    return {"bytes": peak_resident() - before}


def memory_figures(arguments: argparse.Namespace, graph: str) -> dict[str, float]:
    figures: dict[str, float] = {}
    for side in ("eager", "runtime"):
        words = [sys.executable, __file__, "--variant", arguments.variant, "--checkpoint", arguments.checkpoint]
        words += ["--bundle", arguments.bundle, "--threads", arguments.threads, "--memory-of", side, graph]
        output = subprocess.run(list(map(str, words)), check=True, capture_output=True, text=True).stdout
        figures[side] = json.loads(output)["bytes"]
    model = ir.load(arguments.bundle / f"{graph}.onnx")
    tensors = [value.const_value for value in model.graph.initializers.values()]
    figures["weights"] = sum(tensor.nbytes for tensor in tensors if tensor is not None)
    figures["activations"] = live_activations(model)
    return figures


def live_activations(model: ir.Model) -> float:
    """The bytes of the largest set of tensors in use at once, for a batch of 1, when nodes run in order; views take none."""
    size: dict[ir.Value, float] = {}
    last_use: dict[ir.Value, int] = {}
    for position, node in enumerate(model.graph):
        for value in node.inputs:
            if value is not None:
                last_use[value] = position
        for value in node.outputs:
            dims = [dim if isinstance(dim, int) else 1 for dim in value.shape or ()]
            free = node.op_type in ("Reshape", "Shape", "Squeeze", "Unsqueeze", "Identity")
            size[value] = 0 if free else int(np.prod(dims)) * (value.dtype.itemsize if value.dtype else 4)
    live: float = 0
    largest: float = 0
    ends: dict[int, list[ir.Value]] = {}
    for value, position in last_use.items():
        ends.setdefault(position, []).append(value)
    for position, node in enumerate(model.graph):
        live += sum(size[value] for value in node.outputs)
        largest = max(largest, live)
        live -= sum(size.get(value, 0) for value in ends.get(position, ()))
    return largest


def as_markdown(report: dict[str, Any]) -> str:
    lines = [
        f"# {report['variant']}: runtime against eager PyTorch, CPU",
        "",
        f"{report['cpu']}, {report['threads']} threads; Python {report['python']}, torch {report['torch']}, onnxruntime "
        f"{report['onnxruntime']}. Median of {report['rounds']} alternating calls, batch 1, float32; "
        f"`python benchmarks/tokenizer_vs_eager.py --variant {report['variant']}`.",
        "",
        "| | eager | runtime | ratio |",
        "| --- | --- | --- | --- |",
    ]
    for graph in ("encode", "decode"):
        eager, ours = report["seconds"][graph]["eager"], report["seconds"][graph]["runtime"]
        lines.append(f"| {graph} | {eager * 1e3:.0f} ms | {ours * 1e3:.0f} ms | {eager / ours:.2f}x faster |")
    lines += [
        "",
        f"Opening the bundle, hashes verified: {report['seconds']['open']['runtime']:.2f} s; graphs load on first use.",
        "",
        "| peak memory | weights | activations | eager | runtime | runtime / (weights + activations) |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for graph in ("encode", "decode"):
        m = report["bytes"][graph]
        sizes = " | ".join(f"{m[key] / 1e6:,.0f} MB" for key in ("weights", "activations", "eager", "runtime"))
        lines.append(f"| {graph} | {sizes} | {m['runtime'] / (m['weights'] + m['activations']):.2f} |")
    lines += [
        "",
        "The eager model's quantizer is the straightforward one: full distances to all codes in both halves, argmin.",
        "Memory is the growth of the peak resident size of a process that runs that side's graph alone. Activations are the",
        "largest set of the graph's tensors alive at once. The eager process maps the checkpoint and pages in what it uses.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
