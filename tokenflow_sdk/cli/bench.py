"""`tokenflow bench`: times a tokenizer's graphs, a generator's presets, or an understander's answers on this machine."""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter

import numpy as np

from tokenflow_sdk import __version__
from tokenflow_sdk.bundle.bundle import Bundle, bundle_kind
from tokenflow_sdk.bundle.model_config import GeneratorConfig, TokenizerConfig, UnderstanderConfig
from tokenflow_sdk.cli.console import make_table, stderr, stdout
from tokenflow_sdk.cli.opening import (
    bundle_paths,
    for_language_models,
    open_generator,
    open_tokenizer,
    open_understander,
    shown_path,
)
from tokenflow_sdk.cli.progress import progress_bar
from tokenflow_sdk.engines.measured_choice import check_choice, measure_choice
from tokenflow_sdk.errors import ArgumentError, OutputError
from tokenflow_sdk.files import write_atomic
from tokenflow_sdk.generation.generator import Generator
from tokenflow_sdk.model.sampling import PRESETS
from tokenflow_sdk.tokenizer import Tokenizer
from tokenflow_sdk.understanding.params import AnswerParams
from tokenflow_sdk.understanding.understander import Understander

__all__ = ["bench"]

_PROMPT = 16
"""Tokens of the prompt that a generator is timed with, BOS included."""
_QUESTION, _TOKENS = "What is in this picture?", 32
"""The question that an understander is timed with, and the tokens of its long answers."""


@dataclass(frozen=True)
class _Row:
    name: str
    batch: int
    median_s: float
    worst_s: float


@dataclass(frozen=True)
class _Subject:
    """What is timed of a bundle.

    Attributes:
        unit: what one of `calls` is, for the table's first column, e.g. `graph`.
        made: what a call makes, for the rate, e.g. `pictures`.
        title: of the table.
        device: where the bundle runs.
        calls: functions of the batch size, by name.
    """

    unit: str
    made: str
    title: str
    device: str
    calls: Mapping[str, Callable[[int], object]]


def bench(arguments: argparse.Namespace) -> int:
    """Time every bundle under a name for every batch size; print tables, and write the figures to --json."""
    batches = _batches(arguments.batch_sizes)
    if arguments.repeat < 1:
        raise ArgumentError(f"--repeat {arguments.repeat} times nothing.", "Give at least 1.")
    if arguments.choose:
        return _choose(arguments)
    arguments.batch_limit = max(arguments.batch_limit or 1, *batches)
    kinds = {path: bundle_kind(path) for path in bundle_paths(arguments)}
    beside = for_language_models(arguments) if TokenizerConfig.kind in kinds.values() else arguments
    results = [_bench_one(path, arguments if kind == TokenizerConfig.kind else beside, batches) for path, kind in kinds.items()]
    if arguments.json:
        machine = {"machine": platform.machine(), "system": platform.platform(), "sdk": __version__}
        write_atomic(arguments.json, json.dumps(machine | {"bundles": results}, indent=2).encode())
    return 0


def _choose(arguments: argparse.Namespace) -> int:
    """Measure which graphs of each tokenizer under a name are faster on OpenVINO than on onnxruntime, and store it."""
    given = [name for name in ("backend", "device") if getattr(arguments, name) != "auto"]
    given += [name for name in ("config", "json") if getattr(arguments, name) is not None]
    if given:
        raise ArgumentError(f"--choose compares OpenVINO with onnxruntime on the CPU, without --{given[0]}.", "Leave it out.")
    paths = [path for path in bundle_paths(arguments) if bundle_kind(path) == TokenizerConfig.kind]
    if not paths:
        raise ArgumentError("--choose is for tokenizers: language models run on onnxruntime or TensorRT.", "Name a tokenizer.")
    for path in paths:
        bundle = Bundle.open(path, TokenizerConfig, arguments.sha256)
        bundle.verify()
        with stderr.step(f"comparing {shown_path(path)} on OpenVINO with its reference"):
            check_choice(bundle, arguments.threads)
        with progress_bar("timing", 2 * len(bundle.graphs) * (arguments.repeat + 1)) as done:
            choice = measure_choice(bundle, arguments.threads, arguments.repeat, done)
        table = make_table("graph", "onnxruntime ms", "openvino ms", "ratio", "runs on", title=f"{shown_path(path)} on the CPU")
        for name, times in choice.graphs.items():
            figures = (f"{times.onnxruntime * 1e3:.1f}", f"{times.openvino * 1e3:.1f}", f"{times.ratio:.2f}")
            table.add_row(name, *figures, "openvino" if times.faster else "onnxruntime")
        stdout.print(table)
        try:
            stdout.print(f"stored for backend='auto' in {choice.store()}", soft_wrap=True)
        except OutputError as error:
            raise OutputError(
                f"The choice is not stored: {error.message}", "Name another directory in $TOKENFLOW_CACHE."
            ) from error
    return 0


def _bench_one(path: Path, arguments: argparse.Namespace, batches: Sequence[int]) -> dict[str, object]:
    """Time one bundle and print its table. Returns the figures for --json."""
    opener = _OPENERS.get(bundle_kind(path), _open_tokenizer)
    with ExitStack() as stack:
        began = perf_counter()
        subject = opener(arguments, stack)
        loading = perf_counter() - began
        rows = _time(subject.calls, batches, arguments.repeat)
    table = make_table(subject.unit, "batch", "median ms", "worst ms", f"{subject.made}/s", title=subject.title)
    for row in rows:
        figures = (f"{row.median_s * 1e3:.1f}", f"{row.worst_s * 1e3:.1f}", f"{row.batch / row.median_s:.2f}")
        table.add_row(row.name, str(row.batch), *figures)
    stdout.print(table)
    calls = "1 timed call" if arguments.repeat == 1 else f"{arguments.repeat} timed calls"
    stdout.print(f"opened in {loading:.2f} s; {calls} each after one to warm up")
    return {"bundle": str(path), "device": subject.device, "load_s": loading, "rows": [asdict(row) for row in rows]}


def _time(calls: Mapping[str, Callable[[int], object]], batches: Sequence[int], repeat: int) -> list[_Row]:
    rows: list[_Row] = []
    count = 0
    with progress_bar("timing", len(batches) * len(calls) * (repeat + 1)) as done:
        for batch in batches:
            for name, call in calls.items():
                seconds = []
                for i in range(repeat + 1):
                    began = perf_counter()
                    call(batch)
                    # The first call is a warm-up and does not count.
                    seconds += [perf_counter() - began] if i else []
                    done(count := count + 1)
                rows.append(_Row(name, batch, median(seconds), max(seconds)))
    return rows


def _open_tokenizer(arguments: argparse.Namespace, stack: ExitStack) -> _Subject:
    tokenizer = stack.enter_context(open_tokenizer(arguments)).load()
    return _Subject(
        "graph", "pictures", f"{tokenizer.config.variant} on {tokenizer.device}", tokenizer.device, _tokenizer_calls(tokenizer)
    )


def _open_generator(arguments: argparse.Namespace, stack: ExitStack) -> _Subject:
    generator = stack.enter_context(open_generator(arguments))
    c = generator.config
    prompt = [i % c.image_token_start for i in range(1, _PROMPT)]
    calls = {name: partial(_generate, generator, prompt, name) for name in PRESETS}
    title = (
        f"{c.n_codes} codes a picture by {c.layers} layers, width {c.width}, a prompt of {_PROMPT} ids, on {generator.device}"
    )
    return _Subject("preset", "pictures", title, generator.device, calls)


def _generate(generator: Generator, prompt: Sequence[int], preset: str, n: int) -> None:
    generator.generate(prompt, n=n, preset=preset, seed=0)


def _open_understander(arguments: argparse.Namespace, stack: ExitStack) -> _Subject:
    understander = stack.enter_context(open_understander(arguments))
    c, rng = understander.config, np.random.default_rng(0)

    def random_features(count: int) -> list[np.ndarray]:
        return [rng.standard_normal((c.image_tokens, c.code_dim), np.float32) for _ in range(count)]

    # `bench` made batch_limit at least the largest batch.
    seen = random_features(arguments.batch_limit)
    calls = {
        "first token, new picture": lambda batch: _answer(understander, random_features(batch), 1),
        "first token, picture seen before": lambda batch: _answer(understander, seen[:batch], 1),
        f"{_TOKENS} tokens, picture seen before": lambda batch: _answer(understander, seen[:batch], _TOKENS),
    }
    title = f"{c.image_tokens} tokens a picture by {c.layers} layers, width {c.width}, on {understander.device}"
    return _Subject("answer", "answers", title, understander.device, calls)


def _answer(understander: Understander, images: Sequence[np.ndarray], tokens: int) -> None:
    """Answer the question about each image, [N, C] features, in exactly `tokens` tokens."""
    params = AnswerParams(max_tokens=tokens, stop_ids=())
    understander.answer_batch([(image, _QUESTION) for image in images], params=params)


_OPENERS = {GeneratorConfig.kind: _open_generator, UnderstanderConfig.kind: _open_understander}


def _tokenizer_calls(tokenizer: Tokenizer) -> dict[str, Callable[[int], object]]:
    c, rng = tokenizer.config, np.random.default_rng(0)
    images = rng.integers(0, 256, (1, c.image_size, c.image_size, 3), np.uint8)
    indices = rng.integers(0, c.codebook_size, (1, c.n_codes), np.int32)
    codes = tokenizer.codes(indices[0])
    return {
        "encode": lambda batch: tokenizer.encode_array(np.repeat(images, batch, axis=0)),
        "decode": lambda batch: tokenizer.decode_array(np.repeat(indices, batch, axis=0)),
        "semantic": lambda batch: [tokenizer.semantic(codes) for _ in range(batch)],
        "features": lambda batch: [tokenizer.features(codes) for _ in range(batch)],
    }


def _batches(text: str) -> list[int]:
    try:
        batches = [int(part) for part in text.split(",")]
    except ValueError:
        batches = []
    if not batches or min(batches) < 1:
        raise ArgumentError(f"--batch-sizes {text!r} is no list of sizes.", "Write it as --batch-sizes 1,4,8.")
    return batches
