"""Compares text to image in the runtime with PyTorch run as upstream runs it: same weights, same machine, in turns.

PyTorch computes the whole sequence at every pass, with prompts padded to 128 ids, and applies the head of the whole vocabulary
to the rows that are sampled. Two things favour it: upstream applies the head to every row, and the time of sampling codes from
logits counts for the runtime only. The model has random weights, hidden 1024, 8 layers, and the scales of the 256 px tokenizer.
Both generate the same picture with the same noise, and their codes are compared.

    python benchmarks/generator_vs_eager.py
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.common import machine, peak_resident
from tests.support.generation_oracle import UncachedGenerator
from tests.support.mini_generator import (
    PATCH_NUMS_16,
    codebook,
    export_quietly,
    generator_shapes,
    tokenizer_bundle,
    write_checkpoint,
)
from tokenflow_export.checkpoints.hf_directory import HfDirectory
from tokenflow_sdk.backends.session import Array, Tensor
from tokenflow_sdk.bundle.bundle import Bundle
from tokenflow_sdk.bundle.model_config import TokenizerConfig
from tokenflow_sdk.generation.generator import Generator
from tokenflow_sdk.model.sampling import PRESETS, SamplingParams

SIZES: dict[str, Any] = {
    "model_type": "llava_llama",
    "hidden_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "intermediate_size": 2752,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "bos_token_id": 1,
}
TEXT, CODES = 32000, 32768
Infer = Callable[[Mapping[str, Tensor], tuple[str, ...]], Sequence[Array]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt", type=int, default=64, help="ids in the prompt, BOS included")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "generator_cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as directory:
        report = measure(Path(directory), arguments)
    arguments.out.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n")
    text = as_markdown(report)
    arguments.out.with_suffix(".md").write_text(text)
    print(text)


def standin(directory: Path, sizes: Mapping[str, Any]) -> tuple[Path, Bundle[TokenizerConfig]]:
    """Write a checkpoint of these sizes with random weights, and the bundle of its paired tokenizer."""
    shapes = generator_shapes(sizes, TEXT + 4, CODES, PATCH_NUMS_16)
    checkpoint = write_checkpoint(directory / "hf", sizes, shapes, TEXT, CODES)
    return checkpoint, tokenizer_bundle(directory / "tokenizer", PATCH_NUMS_16, CODES)


def random_prompts(length: int, text: int = TEXT) -> tuple[list[int], list[int]]:
    """Random token ids, out of `text`, of a prompt and a negative prompt. `length` is that of the prompt with its BOS."""
    rng = np.random.default_rng(0)
    return rng.integers(3, text, length - 1).tolist(), rng.integers(3, text, 40).tolist()


def measure(directory: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    checkpoint, tokenizer = standin(directory, SIZES)
    bundle = export_quietly(checkpoint, tokenizer, directory / "bundle")
    prompt, negative = random_prompts(arguments.prompt)
    before = peak_resident()
    with Generator.from_pretrained(bundle, device="cpu", threads=arguments.threads) as generator:
        generator.generate(prompt, negative_prompt=negative, preset="fast", seed=0)
        resident = peak_resident() - before
        pool = generator._runner.model.transformer
        memory = {
            "runtime": resident,
            "graphs": sum(file.size for graph in generator.bundle.graphs.values() for file in graph.files),
            "pool": pool.page_bytes * pool.pool.pages,
        }
        oracle = UncachedGenerator(HfDirectory(checkpoint), generator.config, codebook(CODES))
        rows = [compare(name, generator, oracle, prompt, negative, arguments.rounds) for name in PRESETS]
    return (
        {"threads": arguments.threads, "rounds": arguments.rounds, "prompt": arguments.prompt}
        | machine()
        | {
            "rows": rows,
            "bytes": memory,
        }
    )


def compare(
    name: str, generator: Generator, oracle: UncachedGenerator, prompt: list[int], negative: list[int], rounds: int
) -> dict[str, Any]:
    params = SamplingParams.preset(name, seed=5)
    seconds: dict[str, list[float]] = {"eager": [], "runtime": [], "engine": []}
    for _ in range(rounds):
        forwards, oracle.token_forwards = generator.token_forwards, 0
        engine = EngineTime(generator)
        began = perf_counter()
        ours = generator.generate(prompt, negative_prompt=negative, params=params)
        seconds["runtime"].append(perf_counter() - began)
        seconds["engine"].append(engine.stop())
        began, oracle.sampling_seconds = perf_counter(), 0.0
        theirs = oracle.generate(prompt, negative, params)
        seconds["eager"].append(perf_counter() - began - oracle.sampling_seconds)
    middle = {side: median(values) for side, values in seconds.items()}
    return {
        "preset": name,
        "seconds": middle,
        "host_share": 1 - middle["engine"] / middle["runtime"],
        "token_forwards": {"eager": oracle.token_forwards, "runtime": generator.token_forwards - forwards},
        "equal_codes": float((np.asarray(ours.codes[0]) == theirs).mean()),
    }


class EngineTime:
    """Measures the seconds spent inside the sessions of a generator, until `stop`."""

    def __init__(self, generator: Generator) -> None:
        self.seconds = 0.0
        self._patches = ExitStack()
        for session in generator._runner.model.sessions.values():
            self._patches.enter_context(patch.object(session, "_infer", self._timed(session._infer)))

    def _timed(self, infer: Infer) -> Infer:
        def call(feeds: Mapping[str, Tensor], outputs: tuple[str, ...]) -> Sequence[Array]:
            began = perf_counter()
            found = infer(feeds, outputs)
            self.seconds += perf_counter() - began
            return found

        return call

    def stop(self) -> float:
        self._patches.close()
        return self.seconds


def as_markdown(report: dict[str, Any]) -> str:
    lines = [
        "# Text to image: the cached loop against upstream's way in eager PyTorch, CPU",
        "",
        f"{report['cpu']}, {report['threads']} threads; Python {report['python']}, torch {report['torch']}, onnxruntime "
        f"{report['onnxruntime']}. Hidden 1024, 8 layers, float32, random weights, one picture of 817 codes, a prompt of "
        f"{report['prompt']} ids. Median of {report['rounds']} alternating runs; `python benchmarks/generator_vs_eager.py`.",
        "",
        "| preset | eager | runtime | ratio | token-forwards eager | runtime | ratio | host share | equal codes |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in report["rows"]:
        s, t = row["seconds"], row["token_forwards"]
        lines.append(
            f"| {row['preset']} | {s['eager']:.2f} s | {s['runtime']:.2f} s | {s['eager'] / s['runtime']:.1f}x faster | "
            f"{t['eager']:,} | {t['runtime']:,} | {t['eager'] / t['runtime']:.1f}x fewer | {row['host_share']:.1%} | "
            f"{row['equal_codes']:.1%} |"
        )
    m = report["bytes"]
    bound = 1.15 * m["graphs"] + m["pool"] + 1e9
    lines += [
        "",
        "Token-forwards count every row through the transformer, pads included. Host share is the part of a run outside the",
        "engine: Python, copies into pages, noise. The eager side applies the whole vocabulary's head, but only to the rows",
        "that are sampled, where upstream applies it to all, and its time does not count drawing codes from logits.",
        "",
        f"Memory: graphs {m['graphs'] / 1e6:,.0f} MB, page pool {m['pool'] / 1e6:,.0f} MB; the resident size grew by "
        f"{m['runtime'] / 1e6:,.0f} MB (bound: 1.15 x graphs + pool + 1 GB = {bound / 1e6:,.0f} MB).",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
