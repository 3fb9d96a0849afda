"""Drawing pictures from text, side against side: results first, then memory, then time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.generator_vs_eager import SIZES, random_prompts, standin
from benchmarks.gpu.codecs import engine_plan
from benchmarks.gpu.comparison import require_right
from benchmarks.gpu.request import TITLES, TORCH, GeneratorSizes
from benchmarks.gpu.timing import Call, alternate, bar, say_why
from benchmarks.gpu.tokenizers import Work, result
from export.hf_directory import HfDirectory
from tests.generation_oracle import UncachedGenerator
from tests.mini_generator import export_quietly
from tokenflow_sdk import Generator, Tokenizer
from tokenflow_sdk.backends.base import OpenSession, Session, SessionOptions
from tokenflow_sdk.backends.choice import EngineOptions, choose
from tokenflow_sdk.bundle import Bundle, load_codebook
from tokenflow_sdk.certificate import certify
from tokenflow_sdk.config import GeneratorConfig, GraphEntry
from tokenflow_sdk.errors import ArgumentError, EngineRefusedError
from tokenflow_sdk.pairing import tokenizer_of
from tokenflow_sdk.sampling import SamplingParams
from tokenflow_sdk.scheduler import PAGE_SIZE, default_pages
from tokenflow_sdk.tensorrt_module import FLAVOURS

__all__ = ["PRESETS", "Drawing", "measure_generator", "standin_generator"]

PRESETS = ("fast", "paper")
_SEED = 5


@dataclass(frozen=True)
class Drawing:
    """What is drawn from: a bundle, the checkpoint it was exported from (None: PyTorch has nothing to run), and how."""

    bundle: Path
    checkpoint: Path | None
    prompt: int
    pictures: tuple[int, ...]


class Artist(Protocol):
    """What is timed."""

    def draw(self, params: SamplingParams, n: int) -> tuple[NDArray[np.int32], float]:
        """Code indices [n, L], and seconds that do not count."""
        ...


class SdkArtist:
    def __init__(self, generator: Generator, prompt: Sequence[int], negative: Sequence[int]) -> None:
        self._generator, self._prompt, self._negative = generator, prompt, negative

    def draw(self, params: SamplingParams, n: int) -> tuple[NDArray[np.int32], float]:
        found = self._generator.generate(self._prompt, negative_prompt=self._negative, n=n, params=params)
        return np.stack([np.asarray(codes) for codes in found.codes]), 0.0


class TorchArtist:
    """The whole sequence at every pass, as upstream; drawing codes from logits, in plain NumPy here, does not count."""

    def __init__(
        self,
        oracle: UncachedGenerator,
        autocast: Callable[[], AbstractContextManager[Any]],
        prompts: tuple[list[int], list[int]],
    ) -> None:
        self._oracle, self._autocast, self._prompts = oracle, autocast, prompts

    def draw(self, params: SamplingParams, n: int) -> tuple[NDArray[np.int32], float]:
        if n != 1:
            raise ArgumentError("The PyTorch side draws one picture at a time.", "Compare with its row of one picture.")
        self._oracle.draw_seconds = 0.0
        with self._autocast():
            codes = self._oracle.generate(*self._prompts, params)
        return codes[None], self._oracle.draw_seconds


def standin_generator(directory: Path, sizes: GeneratorSizes) -> tuple[Path, Path]:
    """Checkpoint and bundle of a generator with random weights, for the 256 px tokenizer's scales."""
    config = SIZES | {
        "hidden_size": sizes.hidden,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "intermediate_size": sizes.mlp,
    }
    with bar("generator: random weights, exported"):
        checkpoint, tokenizer = standin(directory, config)
        return checkpoint, export_quietly(checkpoint, tokenizer, directory / "bundle")


def measure_generator(drawing: Drawing, work: Work) -> dict[str, Any]:
    """Figures of one generator.

    Raises:
        BundleError: the bundle cannot be used.
        ParityError: a side of tokenflow-sdk computes something else than its bundle's reference.
    """
    bundle = Bundle.open(drawing.bundle, GeneratorConfig)
    keys = [key for key in work.sides if key != "compile"]
    with _Drawn(bundle, drawing, work) as drawn:
        for key in keys:
            with bar(f"generator: loading and comparing {TITLES[key]}", shown=key not in FLAVOURS):
                drawn.open(key)
        require_right(drawn.parity, "the generator")
        rows = [row for preset in PRESETS for n in drawing.pictures for row in drawn.rows(keys, preset, n)]
        c = bundle.config
        about = {"width": c.width, "layers": c.layers, "codes": c.n_codes, "prompt": drawing.prompt}
        return about | {"parity": drawn.parity, "rows": rows}


class _Drawn:
    """The sides that can draw, open until it is closed."""

    def __init__(self, bundle: Bundle[GeneratorConfig], drawing: Drawing, work: Work) -> None:
        self.bundle, self.drawing, self.work = bundle, drawing, work
        self.parity: dict[str, dict[str, Any]] = {}
        self._prompts = random_prompts(drawing.prompt, bundle.config.image_token_start)
        self._eager: UncachedGenerator | None = None
        self._artists: dict[str, Artist] = {}
        self._before: dict[str, int | None] = {}
        self._why: dict[str, str] = {}
        self._open = ExitStack()

    def __enter__(self) -> _Drawn:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def open(self, key: str) -> None:
        """Open a side and, if it is tokenflow-sdk's, compare it with the bundle's reference."""
        try:
            self._artists[key] = self._torch(key) if key in TORCH else self._sdk(key)
        except EngineRefusedError as error:
            self.parity[key] = {"failures": [error.message]}
        except Exception as error:
            self._why[key] = say_why(error)
            self.work.device.release()

    def _sdk(self, key: str) -> SdkArtist:
        plan = engine_plan(key, self.drawing.pictures) if key in FLAVOURS else None
        options = SessionOptions(self.work.device.sdk, None, self.work.threads)
        open_session, options = choose(self.bundle, options, EngineOptions(key, plan))
        pages = default_pages(self.bundle.config, PAGE_SIZE)
        certificate = certify(self.bundle, _on(open_session, options), "fp16" if plan else "fp32", pages, PAGE_SIZE)
        self.parity[key] = {**certificate.figures, "failures": list(certificate.failures)}
        self._before[key] = self.work.device.used()
        # It only says whose codes they are: no graph of it is opened.
        tokenizer = self._open.enter_context(self._tokenizer())
        generator = Generator(self.bundle, tokenizer, options, open_session=open_session)
        return SdkArtist(self._open.enter_context(generator), *self._prompts)

    def _tokenizer(self) -> Tokenizer:
        return tokenizer_of(self.bundle, None, SessionOptions("cpu"), EngineOptions("onnxruntime"))

    def _torch(self, key: str) -> TorchArtist:
        if self.drawing.checkpoint is None:
            raise ArgumentError("PyTorch needs the checkpoint of the bundle.", "Give it with --generator-checkpoint.")
        where = self.work.device.torch
        if self._eager is None:
            checkpoint, codebook = HfDirectory(self.drawing.checkpoint), load_codebook(self.bundle)
            self._eager = UncachedGenerator(checkpoint, self.bundle.config, codebook, str(where))

        def autocast() -> torch.autocast:
            return torch.autocast(where.type, torch.float16, enabled=key == "torch-fp16")

        return TorchArtist(self._eager, autocast, self._prompts)

    def rows(self, keys: Sequence[str], preset: str, n: int) -> Iterator[dict[str, Any]]:
        """Draw once with each side, then time them against each other; a row for each side."""
        params, work = SamplingParams.preset(preset, seed=_SEED), self.work
        codes: dict[str, NDArray[np.int32]] = {}
        memory: dict[str, int | None] = {}
        why = dict(self._why)
        with bar(f"generator: {preset}, warming up with {n}"):
            for key, artist in self._artists.items():
                try:
                    codes[key], memory[key] = self._warm_up(key, artist, params, n)
                except Exception as error:
                    why[key] = say_why(error)
                    work.device.release()
        calls = {key: _call(self._artists[key], params, n) for key in codes}
        with bar(f"generator: {preset}, timing {n}", work.pace.rounds + 1) as advance:
            found = alternate(calls, work.device.synchronize, work.pace, advance)
        for key in keys:
            figures = result(found.get(key) or why[key], n, memory.get(key))
            yield {"preset": preset, "pictures": n, "side": key} | figures | _equal(codes, key)

    def _warm_up(self, key: str, artist: Artist, params: SamplingParams, n: int) -> tuple[NDArray[np.int32], int | None]:
        device = self.work.device
        device.reset_peak()
        codes, _ = artist.draw(params, n)
        if key not in self._before:
            return codes, device.peak()
        used, before = device.used(), self._before[key]
        return codes, None if used is None or before is None else used - before


def _on(open_session: OpenSession, options: SessionOptions) -> OpenSession:
    def open_there(path: Path, entry: GraphEntry, _: SessionOptions) -> Session:
        return open_session(path, entry, options)

    return open_there


def _call(artist: Artist, params: SamplingParams, n: int) -> Call:
    return lambda: artist.draw(params, n)[1]


def _equal(codes: Mapping[str, NDArray[np.int32]], key: str) -> dict[str, Any]:
    """Share of codes that float32 PyTorch draws as well, where both drew."""
    if key not in codes or "torch" not in codes:
        return {}
    return {"equal_codes": float((codes[key] == codes["torch"]).mean())}
