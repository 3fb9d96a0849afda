"""`Generator`: text to image, scale by scale, over a shared pool of key/value pages."""

from __future__ import annotations

import os
import secrets
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from tokenflow_sdk.backends.base import OpenSession, Session, SessionOptions, open_onnxruntime
from tokenflow_sdk.backends.choice import EngineOptions
from tokenflow_sdk.bundle import Bundle, find_bundle, load_codebook
from tokenflow_sdk.codes import Codes
from tokenflow_sdk.config import GeneratorConfig
from tokenflow_sdk.errors import ArgumentError
from tokenflow_sdk.paged_model import PagedModel, Running
from tokenflow_sdk.sampling import SamplingParams
from tokenflow_sdk.scale_loop import ScaleLoop
from tokenflow_sdk.scheduler import PAGE_SIZE, Request, Scheduler, default_pages
from tokenflow_sdk.text import Prompt, PromptEncoder
from tokenflow_sdk.tokenizer import Tokenizer
from tokenflow_sdk.transformer import PagedTransformer

if TYPE_CHECKING:
    from tokenflow_sdk.engine_recipe import EnginePlan

__all__ = ["GeneratedScale", "Generation", "Generator"]


@dataclass(frozen=True)
class GeneratedScale:
    """What `stream` yields after every scale: its number from 1, and the codes so far, one for each picture."""

    scale: int
    codes: tuple[Codes, ...]
    tokenizer: Tokenizer

    def preview(self) -> list[Image.Image]:
        """The pictures so far, decoded when this is called."""
        return self.tokenizer.decode_batch(self.codes)


@dataclass(frozen=True)
class Generation:
    """A finished request. `timings` are seconds from the request's beginning to the end of each scale."""

    codes: tuple[Codes, ...]
    params: SamplingParams
    timings: tuple[float, ...]
    tokenizer: Tokenizer

    @property
    def seed(self) -> int:
        """The seed; with the same request it draws the same codes again."""
        return self.params.seed

    @property
    def images(self) -> list[Image.Image]:
        """The pictures, decoded when this is read."""
        return self.tokenizer.decode_batch(self.codes)


class Generator(PagedModel[GeneratorConfig, Scheduler]):
    """Draws pictures from text, as the released TokenFlow text-to-image model does (arXiv 2412.03069, spec section 4).

    Make one with `from_pretrained`. Requests may come from several threads; live requests at the same scale share steps.
    """

    def __init__(
        self,
        bundle: Bundle[GeneratorConfig],
        tokenizer: Tokenizer,
        options: SessionOptions,
        pages: int | None = None,
        page_size: int = PAGE_SIZE,
        open_session: OpenSession = open_onnxruntime,
    ) -> None:
        self._prompts = PromptEncoder(bundle.path / bundle.asset("tokenizer").name, bundle.config)
        super().__init__(bundle, tokenizer, options, pages, page_size, open_session)

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str],
        *,
        tokenizer: Tokenizer | str | os.PathLike[str] | None = None,
        device: str = "auto",
        providers: Sequence[str] | None = None,
        threads: int | None = None,
        pages: int | None = None,
        page_size: int = PAGE_SIZE,
        backend: str = "auto",
        plan: EnginePlan | str | None = None,
        build: bool = True,
        serve_while_building: bool = False,
        cuda_graphs: bool = False,
    ) -> Generator:
        """Open a generator bundle, verify its files, and load its graphs.

        Args:
            name: `tiny` (comes with the SDK), a bundle's directory, or a Hugging Face hub id.
            tokenizer: the tokenizer that decodes its codes; None looks where the bundle was exported with it.
            device, providers, threads: as in `Tokenizer.from_pretrained`.
            pages: pages in the pool; None holds eight pictures.
            page_size: tokens in a page; TensorRT engines take the default only.
            backend, plan, build, serve_while_building, cuda_graphs: see `tokenflow_sdk.backends.choice.EngineOptions`.

        Raises:
            BundleError, MissingPackageError, ArgumentError: see `tokenflow_sdk.errors`.
            CodebookMismatchError: the tokenizer has another codebook.
            BackendError: the backend asked for does not work here; `EngineBuildError`, `EngineRefusedError` say more.
        """
        options = SessionOptions(device, None if providers is None else tuple(providers), threads)
        bundle = Bundle.open(find_bundle(name, GeneratorConfig.kind), GeneratorConfig)
        wanted = EngineOptions(backend, plan, build, serve_while_building, 1, cuda_graphs)
        return cls._open_pretrained(bundle, tokenizer, options, wanted, pages, page_size)

    @staticmethod
    def _default_pages(config: GeneratorConfig, page_size: int) -> int:
        return default_pages(config, page_size)

    def _schedule(self, sessions: Mapping[str, Session], transformer: PagedTransformer) -> Scheduler:
        return Scheduler(ScaleLoop(self.config, sessions, transformer, load_codebook(self.bundle)))

    def stream(
        self,
        prompt: Prompt,
        *,
        n: int = 1,
        negative_prompt: Prompt | None = None,
        preset: str | None = None,
        cfg_scale: float | None = None,
        seed: int | None = None,
        params: SamplingParams | None = None,
        strict: bool = False,
    ) -> Iterator[GeneratedScale]:
        """Draw `n` pictures and yield after every scale. Closing the iterator cancels the request and frees its pages.

        Args:
            prompt: text, or token ids without BOS.
            n: pictures, each with noise of its own.
            negative_prompt: what guidance leads away from; None takes the model's own.
            preset: `fast` (1 pass), `balanced` (2) or `paper` (3); None takes the model's own.
            cfg_scale: strength of guidance; 0 is none; None takes the model's own.
            seed: 0 .. 2**63 - 1; None draws one (`Generation.seed` tells it).
            params: passes, guidance and seed in one, instead of preset, cfg_scale and seed.
            strict: refuse a prompt that is too long instead of cutting it with a warning.

        Raises:
            PromptError, ArgumentError: the request cannot work.
            PagesExhausted: it needs more pages than the pool has.
        """
        request = self._request(prompt, n, negative_prompt, self._params(preset, cfg_scale, seed, params), strict)
        return self._stream(request)

    def generate(
        self,
        prompt: Prompt,
        *,
        n: int = 1,
        negative_prompt: Prompt | None = None,
        preset: str | None = None,
        cfg_scale: float | None = None,
        seed: int | None = None,
        params: SamplingParams | None = None,
        strict: bool = False,
    ) -> Generation:
        """Draw `n` pictures; arguments and errors as in `stream`."""
        params = self._params(preset, cfg_scale, seed, params)
        return self._drain([self._request(prompt, n, negative_prompt, params, strict)])[0]

    def generate_batch(
        self,
        prompts: Sequence[Prompt],
        *,
        n: int = 1,
        negative_prompt: Prompt | None = None,
        preset: str | None = None,
        cfg_scale: float | None = None,
        seed: int | None = None,
        params: SamplingParams | None = None,
        strict: bool = False,
    ) -> list[Generation]:
        """Draw several prompts together; each as `generate` draws it alone. Arguments and errors as in `stream`."""
        params = self._params(preset, cfg_scale, seed, params)
        return self._drain([self._request(prompt, n, negative_prompt, params, strict) for prompt in prompts])

    def _params(
        self, preset: str | None, cfg_scale: float | None, seed: int | None, params: SamplingParams | None
    ) -> SamplingParams:
        if params is not None:
            return params if seed is None else replace(params, seed=seed)
        chosen = self.config.cfg_scale if cfg_scale is None else cfg_scale
        return SamplingParams.preset(preset or self.config.preset, chosen, secrets.randbelow(2**63) if seed is None else seed)

    def _request(self, prompt: Prompt, n: int, negative_prompt: Prompt | None, params: SamplingParams, strict: bool) -> Request:
        if type(n) is not int or n < 1:
            raise ArgumentError(f"n={n!r} asks for no picture.", "Give at least 1.")
        negative = self.config.negative_prompt if negative_prompt is None else negative_prompt
        return Request(self._prompts.encode(prompt, strict), self._prompts.encode(negative, strict), params, n)

    def _stream(self, request: Request) -> Iterator[GeneratedScale]:
        with self._submitted([request]) as running:
            for scale in range(1, len(self.config.patch_nums) + 1):
                self._advance(running, request, scale)
                yield GeneratedScale(scale, self._codes(request, scale), self.tokenizer)

    def _drain(self, requests: Sequence[Request]) -> list[Generation]:
        began = perf_counter()
        count, timings = len(self.config.patch_nums), [deque[float]() for _ in requests]
        with self._submitted(requests) as running:
            for scale in range(1, count + 1):
                for request, times in zip(requests, timings, strict=True):
                    self._advance(running, request, scale)
                    times.append(perf_counter() - began)
        return [
            Generation(self._codes(request, count), request.params, tuple(times), self.tokenizer)
            for request, times in zip(requests, timings, strict=True)
        ]

    def _advance(self, running: Running[Scheduler], request: Request, scale: int) -> None:
        """Run steps, whoever they are for, until `request` has drawn `scale` scales."""
        while request.scale < scale:
            with self._lock:
                self._check_open()
                if request.error is not None:
                    raise request.error
                if request.scale < scale:
                    running.scheduler.step()

    def _codes(self, request: Request, scales: int) -> tuple[Codes, ...]:
        return tuple(self.tokenizer.codes(np.concatenate(picture.codes[:scales])) for picture in request.pictures)
