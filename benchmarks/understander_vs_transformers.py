"""Compares answers in the runtime with `generate` of transformers: same weights, same prompts, in turns.

The model has random weights in Qwen2's layout: hidden 1024, 8 layers, 16 heads over 4 key/value heads, MLP 2752, a vocabulary
of 32,000; a picture has 729 features. Both sides decode greedily for a fixed number of tokens. transformers answers one request
after another, as it does when requests arrive one by one; for eight requests its padded batch is measured too.

    python benchmarks/understander_vs_transformers.py
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.common import machine
from tests.support.mini_generator import tokenizer_bundle
from tests.support.mini_understander import BASE, export_quietly, reference_model, reference_projector, write_checkpoint
from tokenflow_export.tracing.weight_quantization import FULL_PRECISION, ExportPrecision
from tokenflow_sdk import AnswerParams, Understander
from tokenflow_sdk.understanding.prompt import ImageBlock, TokenPrompt

SIZES: dict[str, Any] = BASE | {
    "model_type": "llava_qwen",
    "hidden_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "intermediate_size": 2752,
    "max_position_embeddings": 4096,
    "initializer_range": 0.03,
    "rope_theta": 1e6,
    "vocab_size": 32000,
    "tie_word_embeddings": False,
}
PATCH_NUMS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 17, 22, 27)
PRECISIONS = (FULL_PRECISION, ExportPrecision("fp32", "int8"), ExportPrecision("fp32", "int4"))
QUESTION = "What is on the table?"
LENGTHS = tuple(range(24, 137, 16))
"""The numbers of tokens of the eight answers; their questions differ in length too."""


class Transformers:
    """`generate` of transformers on the embeddings that the runtime reads."""

    def __init__(self, model: Any, projector: torch.nn.Module) -> None:
        self.model, self.projector = model, projector

    @torch.inference_mode()
    def embed(self, prompt: TokenPrompt) -> torch.Tensor:
        """The embeddings [1, Q, H] of a prompt."""
        table = self.model.model.embed_tokens
        parts = [
            self.projector(torch.tensor(block.features)) if isinstance(block, ImageBlock) else table(torch.tensor(block))
            for block in prompt.blocks
        ]
        return torch.cat(parts)[None]

    @torch.inference_mode()
    def generate(self, x: torch.Tensor, count: int, mask: torch.Tensor | None = None) -> tuple[torch.Tensor, list[float]]:
        """Generate token ids [B, count], and give the seconds from the call to each token."""
        began, times = perf_counter(), []

        def stamp(ids: torch.Tensor, scores: torch.Tensor, **_: object) -> torch.Tensor:
            times.append(perf_counter() - began)
            return torch.zeros(len(ids), dtype=torch.bool)

        mask = torch.ones(x.shape[:2], dtype=torch.long) if mask is None else mask
        settings = {"do_sample": False, "max_new_tokens": count, "eos_token_id": None, "pad_token_id": 0}
        ids = self.model.generate(inputs_embeds=x, attention_mask=mask, stopping_criteria=[stamp], **settings)
        return ids, times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--beside", default="nothing", help="what else ran on the machine, for the report")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "understander_cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as directory:
        report = measure(Path(directory), arguments.threads, arguments.rounds) | {"beside": arguments.beside}
    arguments.out.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n")
    text = as_markdown(report)
    arguments.out.with_suffix(".md").write_text(text)
    print(text)


def measure(directory: Path, threads: int, rounds: int) -> dict[str, Any]:
    model, projector = reference_model(SIZES), reference_projector(SIZES["hidden_size"])
    checkpoint = write_checkpoint(directory / "hf", SIZES, model, projector)
    tokenizer = tokenizer_bundle(directory / "tokenizer", PATCH_NUMS, 32768)
    theirs = Transformers(model, projector)
    ours = {}
    for precision in PRECISIONS:
        out = export_quietly(checkpoint, tokenizer, directory / precision.name.replace(" ", "_"), precision)
        ours[precision.name] = Understander.from_pretrained(out, device="cpu", threads=threads)
    one = [compare_one(ours, theirs, seed) for seed in range(rounds + 1)][1:]
    eight = [compare_eight(ours, theirs, seed) for seed in range(rounds)]
    sizes = {name: sum(f.size for graph in u.bundle.graphs.values() for f in graph.files) for name, u in ours.items()}
    parity = {name: dict(understander.bundle.parity) for name, understander in ours.items()}
    for understander in ours.values():
        understander.close()
    report = {"threads": threads, "rounds": rounds, "bytes": sizes, "parity": parity}
    return report | machine() | {"one": medians(one), "eight": medians(eight)}


def picture(seed: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((PATCH_NUMS[-1] ** 2, 40)).astype(np.float32)


def compare_one(ours: dict[str, Understander], theirs: Transformers, seed: int, count: int = 64) -> dict[str, dict[str, float]]:
    """Measure one request: seconds to the first token, tokens per second after it, and a second question's first token."""
    params = AnswerParams(max_tokens=count, stop_ids=())
    prompt = ours["fp32"]._answering._text.first([ImageBlock(picture(seed))], QUESTION)
    ids, times = theirs.generate(theirs.embed(prompt), count)
    found = {"transformers": rates(times) | {"prompt": len(prompt)}}
    for name, understander in ours.items():
        first = understander.answer(picture(seed), QUESTION, params=params)
        second = understander.answer(picture(seed), "And what is beside it?", params=params)
        same = float(np.mean(np.asarray(first.token_ids) == ids[0].numpy()))
        found[name] = rates(first.timings) | {"second_first_token": second.timings[0], "same_tokens": same}
    return found


def rates(times: Sequence[float]) -> dict[str, float]:
    return {"first_token": times[0], "tokens_per_second": (len(times) - 1) / (times[-1] - times[0])}


def compare_eight(ours: dict[str, Understander], theirs: Transformers, seed: int) -> dict[str, dict[str, float]]:
    """Measure eight requests of different lengths at once: tokens per second of all, with the time for prompts."""
    same, different = [picture(seed + 50)] * 8, [picture(seed * 8 + i + 100) for i in range(8)]
    cases = {"one picture": same, "eight pictures": different, "eight pictures, each asked about before": different}
    return {name: throughput(ours, theirs, pictures) for name, pictures in cases.items()}


def throughput(
    ours: dict[str, Understander], theirs: Transformers, pictures: Sequence[NDArray[np.float32]]
) -> dict[str, float]:
    questions = [(image, QUESTION + " Say it well." * i) for i, image in enumerate(pictures)]
    prompts = [ours["fp32"]._answering._text.first([ImageBlock(image)], question) for image, question in questions]
    inputs = [theirs.embed(prompt) for prompt in prompts]

    def one_by_one() -> None:
        for x, count in zip(inputs, LENGTHS, strict=True):
            theirs.generate(x, count)

    calls = {
        "fp32": lambda: answer_all(ours["fp32"], questions),
        "int8": lambda: answer_all(ours["int8 in fp32"], questions),
        "one by one": one_by_one,
        "padded batch": lambda: generate_padded(theirs, inputs),
    }
    return {side: sum(LENGTHS) / seconds(call) for side, call in calls.items()}


def answer_all(understander: Understander, questions: Sequence[tuple[NDArray[np.float32], str]]) -> None:
    turns = [
        understander._request(image, question, AnswerParams(max_tokens=count, stop_ids=()))
        for (image, question), count in zip(questions, LENGTHS, strict=True)
    ]
    understander._answering.answers(turns)


def generate_padded(theirs: Transformers, inputs: Sequence[torch.Tensor]) -> None:
    """Generate all answers in one batch, padded on the left, with as many tokens as the longest answer has."""
    longest = max(x.shape[1] for x in inputs)
    x = torch.cat([torch.nn.functional.pad(x, (0, 0, longest - x.shape[1], 0)) for x in inputs])
    mask = torch.stack([(torch.arange(longest) >= longest - x.shape[1]).long() for x in inputs])
    theirs.generate(x, max(LENGTHS), mask)


def seconds(call: Callable[[], object]) -> float:
    began = perf_counter()
    call()
    return perf_counter() - began


def medians(rounds: Sequence[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    return {side: {key: median(found[side][key] for found in rounds) for key in rounds[0][side]} for side in rounds[0]}


def as_markdown(report: dict[str, Any]) -> str:
    one, eight, base = report["one"], report["eight"], report["one"]["transformers"]
    lines = [
        "# Questions about pictures: the paged cache against transformers `generate`, CPU",
        "",
        f"{report['cpu']}, {report['threads']} threads; Python {report['python']}, torch {report['torch']}, onnxruntime",
        f"{report['onnxruntime']}. Qwen2 layout, hidden 1024, 8 layers, 16 heads over 4 key/value heads, MLP 2752,",
        f"vocabulary 32,000, random weights; a picture of 729 features, a prompt of {base['prompt']:.0f} tokens, 64 greedy",
        f"tokens. Median of {report['rounds']} alternating runs; beside it ran {report['beside']}.",
        "`python benchmarks/understander_vs_transformers.py`",
        "",
        "| one request | graphs | first token | tokens/s after it | ratio | second question | sooner | same tokens |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        f"| transformers, fp32 | | {base['first_token']:.2f} s | {base['tokens_per_second']:.1f} | 1.0x | | | |",
    ]
    lines += [one_row(name, one[name], base, size) for name, size in report["bytes"].items()]
    lines += [
        "",
        "Second question: the first token of another question about the same picture, and how much sooner than the first",
        "question's. Same tokens: the share of the 64 that are transformers' own; one other token changes all that follow, so",
        "random weights make int8 and int4 part from it early.",
        "",
        f"Eight requests at once, questions of different lengths and answers of {min(LENGTHS)} to {max(LENGTHS)} tokens;",
        "tokens a second in all, prompts included:",
        "",
        "| eight requests about | transformers | its padded batch | runtime, fp32 | ratios | runtime, int8 | ratios |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in eight.items():
        alone, batch = row["one by one"], row["padded batch"]
        own = [f"{row[side]:.1f} | {row[side] / alone:.1f}x, {row[side] / batch:.1f}x" for side in ("fp32", "int8")]
        lines.append(f"| {name} | {alone:.1f} | {batch:.1f} | {' | '.join(own)} |")
    return "\n".join([*lines, ""])


def one_row(name: str, row: dict[str, float], base: dict[str, float], size: int) -> str:
    ratio = row["tokens_per_second"] / base["tokens_per_second"]
    second = f"{row['second_first_token'] * 1e3:.0f} ms | {row['first_token'] / row['second_first_token']:.1f}x"
    speed = f"{row['first_token']:.2f} s | {row['tokens_per_second']:.1f} | {ratio:.2f}x"
    return f"| runtime, {name} | {size / 1e6:.0f} MB | {speed} | {second} | {row['same_tokens']:.0%} |"


if __name__ == "__main__":
    main()
