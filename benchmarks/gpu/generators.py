"""Measures the sides that generate pictures from text: results first, then memory, then time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from benchmarks.generator_vs_eager import SIZES, random_prompts, standin
from benchmarks.gpu.codecs import build_config_for, lacks_memory, note_of, with_largest
from benchmarks.gpu.request import TITLES, TORCH, GeneratorSizes
from benchmarks.gpu.timing import Call, alternate, bar, outcome
from benchmarks.gpu.tokenizers import Work, result
from tests.support.generation_oracle import UncachedGenerator
from tests.support.mini_generator import export_quietly
from tokenflow_export.checkpoints.hf_directory import HfDirectory
from tokenflow_sdk import Generator, Tokenizer
from tokenflow_sdk.backends.session import OpenSession, Session, SessionOptions
from tokenflow_sdk.backends.tensorrt_module import FLAVOURS
from tokenflow_sdk.bundle.arrays import load_codebook
from tokenflow_sdk.bundle.bundle import Bundle
from tokenflow_sdk.bundle.model_config import PAGE_SIZE, GeneratorConfig
from tokenflow_sdk.bundle.schema import GraphEntry
from tokenflow_sdk.engines.choice import choose
from tokenflow_sdk.engines.options import RuntimeOptions
from tokenflow_sdk.errors import ArgumentError
from tokenflow_sdk.language_model import paired_tokenizer
from tokenflow_sdk.model.sampling import SamplingParams
from tokenflow_sdk.parity.certificate import certify

__all__ = ["PRESETS", "GeneratorCase", "measure_generator", "standin_generator"]

PRESETS = ("fast", "paper")
_SEED = 5


@dataclass(frozen=True)
class GeneratorCase:
    """The generator to measure and its requests.

    Args:
        bundle: of the generator.
        checkpoint: that the bundle was exported from; None leaves PyTorch out.
        prompt: how many ids the prompt has.
        pictures: numbers of pictures in a request, ascending.
    """

    bundle: Path
    checkpoint: Path | None
    prompt: int
    pictures: tuple[int, ...]


class Sampler(Protocol):
    """Samples the codes of pictures; this is what is timed."""

    def sample(self, params: SamplingParams, n: int) -> tuple[NDArray[np.int32], float]:
        """Sample code indices [n, L]. Also returns the seconds that do not count."""
        ...


class SdkSampler:
    def __init__(self, generator: Generator, prompt: Sequence[int], negative: Sequence[int]) -> None:
        self._generator, self._prompt, self._negative = generator, prompt, negative

    def sample(self, params: SamplingParams, n: int) -> tuple[NDArray[np.int32], float]:
        found = self._generator.generate(self._prompt, negative_prompt=self._negative, n=n, params=params)
        return np.stack([np.asarray(codes) for codes in found.codes]), 0.0


class TorchSampler:
    """Computes the whole sequence at every pass, as upstream does. Sampling from logits, in NumPy, does not count."""

    def __init__(self, oracle: UncachedGenerator, prompts: tuple[list[int], list[int]]) -> None:
        self._oracle, self._prompts = oracle, prompts

    def sample(self, params: SamplingParams, n: int) -> tuple[NDArray[np.int32], float]:
        if n != 1:
            raise ArgumentError("The PyTorch side draws one picture at a time.", "Compare with its row of one picture.")
        self._oracle.sampling_seconds = 0.0
        codes = self._oracle.generate(*self._prompts, params)
        return codes[None], self._oracle.sampling_seconds


class HalfGenerator(UncachedGenerator):
    """PyTorch with the transformer and the head in float16; embeddings and sampling stay in float32."""

    def __init__(self, checkpoint: HfDirectory, config: GeneratorConfig, codebook: NDArray[np.float32], device: str) -> None:
        super().__init__(checkpoint, config, codebook, device)
        for key in self.transformer.state_dict():
            del self.weights[f"model.{key}"]
        self.transformer.half()
        self.transformer.register_forward_pre_hook(lambda _, inputs: (inputs[0].half(), *inputs[1:]))
        self.weights["lm_head.weight"] = self.weights["lm_head.weight"].half()


def standin_generator(directory: Path, sizes: GeneratorSizes) -> tuple[Path, Path]:
    """Write the checkpoint and the bundle of a generator with random weights, for the scales of the 256 px tokenizer."""
    config = SIZES | {
        "hidden_size": sizes.hidden,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "intermediate_size": sizes.mlp,
    }
    with bar("generator: random weights, exported"):
        checkpoint, tokenizer = standin(directory, config)
        return checkpoint, export_quietly(checkpoint, tokenizer, directory / "bundle")


def measure_generator(found: dict[str, Any], case: GeneratorCase, work: Work) -> None:
    """Write the figures of a generator into `found`. They stay there if a later step fails.

    Raises:
        BundleError: the bundle cannot be used.
    """
    bundle = Bundle.open(case.bundle, GeneratorConfig)
    c = bundle.config
    keys = [key for key in work.sides if key != "compile"]
    with _Samplers(bundle, case, work) as samplers:
        found |= {"width": c.width, "layers": c.layers, "codes": c.n_codes, "prompt": case.prompt}
        found |= {"parity": samplers.parity, "rows": []}
        for key in keys:
            with bar(f"generator: loading, comparing and warming up {TITLES[key]}", shown=key not in FLAVOURS):
                samplers.open(key)
        for preset in PRESETS:
            for n in case.pictures:
                for row in samplers.rows(keys, preset, n):
                    found["rows"].append(row)


class _Samplers:
    """The samplers of all sides, which are open until this is closed."""

    def __init__(self, bundle: Bundle[GeneratorConfig], case: GeneratorCase, work: Work) -> None:
        self.bundle, self.case, self.work = bundle, case, work
        self.parity: dict[str, dict[str, Any]] = {}
        self._prompts = random_prompts(case.prompt, bundle.config.image_token_start)
        self._samplers: dict[str, Sampler] = {}
        self._codes: dict[tuple[str, int, str], NDArray[np.int32]] = {}
        """The codes that were sampled, by preset, pictures and side."""
        self._notes: dict[tuple[str, int, str], dict[str, Any]] = {}
        """What a row says besides times, or instead of them, by preset, pictures and side."""
        self._open = ExitStack()

    def __enter__(self) -> _Samplers:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def open(self, key: str) -> None:
        """Open a side and run every request once. A side of tokenflow-sdk is compared with the bundle's reference too.

        Its memory is measured before the next side is opened, and PyTorch's cache is freed before.
        """
        note: dict[str, Any] = {}
        try:
            with_largest(self.case.pictures, partial(self._open_side, key), self.work.device)
        except Exception as error:
            note = outcome(error)
        self.work.device.release()
        if failures := self.parity.get(key, {}).get("failures"):
            note = {"wrong": "; ".join(failures)}
        if note:
            self._notes |= {(preset, n, key): note for preset in PRESETS for n in self.case.pictures}

    def _open_side(self, key: str, largest: int) -> None:
        """Open a side for at most `largest` pictures.

        Raises:
            Exception: it cannot be opened, or lacks memory even for the fewest pictures.
        """
        with ExitStack() as opened:
            sampler, before = self._torch(key) if key in TORCH else self._sdk(key, largest, opened)
            if sampler is None:
                return
            for n in self.case.pictures:
                for preset in PRESETS:
                    warm_up = partial(self._warm_up, key, sampler, preset, n, before)
                    self._notes[preset, n, key] = note_of(n, largest, self.case.pictures, warm_up)
            self._samplers[key] = sampler
            self._open.push(opened.pop_all())

    def _warm_up(self, key: str, sampler: Sampler, preset: str, n: int, before: int | None) -> dict[str, Any]:
        device = self.work.device
        device.reset_peak()
        try:
            codes, _ = sampler.sample(SamplingParams.preset(preset, seed=_SEED), n)
        except Exception as error:
            if n == self.case.pictures[0] and lacks_memory(error):
                raise
            return outcome(error)
        self._codes[preset, n, key] = codes
        held = device.peak() if key in TORCH else device.used()
        return {"memory_bytes": None if held is None or before is None else held - before}

    def _sdk(self, key: str, largest: int, opened: ExitStack) -> tuple[SdkSampler | None, int | None]:
        """Open a sampler of tokenflow-sdk, None if its results are wrong. Also returns the device memory in use before."""
        pictures = [n for n in self.case.pictures if n <= largest]
        build_config = build_config_for(key, pictures) if key in FLAVOURS else None
        device, threads = self.work.device.sdk, self.work.threads
        asked = RuntimeOptions(device=device, threads=threads, backend=key, build_config=build_config)
        open_session, options = choose(self.bundle, asked)
        pages = self.bundle.config.default_pages()
        certificate = certify(self.bundle, _on(open_session, options), "fp16" if build_config else "fp32", pages, PAGE_SIZE)
        self.parity[key] = {**certificate.figures, "failures": list(certificate.failures)}
        if not certificate.passed:
            return None, None
        before = self.work.device.used()
        # The tokenizer is only needed to make a Generator: none of its graphs is opened.
        tokenizer = opened.enter_context(self._tokenizer())
        generator = Generator(self.bundle, tokenizer, options, open_session=open_session)
        return SdkSampler(opened.enter_context(generator), *self._prompts), before

    def _tokenizer(self) -> Tokenizer:
        return paired_tokenizer(self.bundle, None, RuntimeOptions(device="cpu", backend="onnxruntime"))

    def _torch(self, key: str) -> tuple[TorchSampler, int | None]:
        """Make a sampler of PyTorch. Also returns the bytes that its allocator had allocated before."""
        if self.case.checkpoint is None:
            raise ArgumentError("PyTorch needs the checkpoint of the bundle.", "Give it with --generator-checkpoint.")
        device, kind = self.work.device, HalfGenerator if key == "torch-fp16" else UncachedGenerator
        before = device.allocated()
        oracle = kind(HfDirectory(self.case.checkpoint), self.bundle.config, load_codebook(self.bundle), str(device.torch))
        return TorchSampler(oracle, self._prompts), before

    def rows(self, keys: Sequence[str], preset: str, n: int) -> Iterator[dict[str, Any]]:
        """Time the sides in turns, and yield a row for each."""
        codes = {key: self._codes[preset, n, key] for key in self._samplers if (preset, n, key) in self._codes}
        calls = {key: _call(self._samplers[key], SamplingParams.preset(preset, seed=_SEED), n) for key in codes}
        pace = self.work.pace
        with bar(f"generator: {preset}, timing {n}", pace.rounds + 1) as advance:
            found = alternate(calls, self.work.device.synchronize, pace, advance)
        for key in keys:
            figures = result(found.get(key), n, self._notes[preset, n, key])
            yield {"preset": preset, "pictures": n, "side": key} | figures | _equal(codes, key)


def _on(open_session: OpenSession, options: SessionOptions) -> OpenSession:
    def open_there(path: Path, entry: GraphEntry, _: SessionOptions) -> Session:
        return open_session(path, entry, options)

    return open_there


def _call(sampler: Sampler, params: SamplingParams, n: int) -> Call:
    return lambda: sampler.sample(params, n)[1]


def _equal(codes: Mapping[str, NDArray[np.int32]], key: str) -> dict[str, Any]:
    """The share of codes equal to those of PyTorch in float32, if both sides sampled."""
    if key not in codes or "torch" not in codes:
        return {}
    return {"equal_codes": float((codes[key] == codes["torch"]).mean())}
