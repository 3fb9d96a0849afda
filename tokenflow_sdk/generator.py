"""`Generator`: text to image, scale by scale, over a shared pool of key/value pages."""

from __future__ import annotations

import os
import secrets
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from types import TracebackType

import numpy as np
from PIL import Image

from tokenflow_sdk.backends.base import Session, SessionOptions
from tokenflow_sdk.bundle import Bundle, find_bundle
from tokenflow_sdk.codes import Codes
from tokenflow_sdk.config import GeneratorConfig
from tokenflow_sdk.errors import ArgumentError, CorruptBundleError
from tokenflow_sdk.pairing import require_tokenizer, tokenizer_of
from tokenflow_sdk.sampling import SamplingParams
from tokenflow_sdk.scale_loop import ScaleLoop
from tokenflow_sdk.scheduler import PAGE_SIZE, Request, Scheduler, default_pages
from tokenflow_sdk.text import Prompt, PromptEncoder
from tokenflow_sdk.tokenizer import OpenSession, Tokenizer, open_onnxruntime
from tokenflow_sdk.transformer import PagedTransformer

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


class Generator:
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
        config = bundle.config
        if page_size < 1 or (pages is not None and pages < 1):
            raise ArgumentError(f"pages={pages}, page_size={page_size} hold nothing.", "Give at least 1 of each.")
        require_tokenizer(tokenizer, config, bundle.path)
        self.bundle = bundle
        self.tokenizer = tokenizer
        self._sessions: dict[str, Session] = {
            name: open_session(bundle.path / entry.files[0].name, entry, options) for name, entry in bundle.graphs.items()
        }
        pages = pages or default_pages(config, page_size)
        transformer = PagedTransformer(
            self._sessions["transformer"], config.layers, config.kv_heads, config.head_dim, pages, page_size
        )
        self._prompts = PromptEncoder(bundle.path / bundle.asset("tokenizer").name, config)
        self._scheduler = Scheduler(ScaleLoop(config, self._sessions, transformer, _codebook(bundle)))
        self._lock = threading.Lock()
        self._closed = False

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
    ) -> Generator:
        """Open a generator bundle, verify its files, and load its graphs.

        Args:
            name: `tiny` (comes with the SDK), a bundle's directory, or a Hugging Face hub id.
            tokenizer: the tokenizer that decodes its codes; None looks where the bundle was exported with it.
            device, providers, threads: as in `Tokenizer.from_pretrained`.
            pages: pages in the pool; None holds eight pictures.
            page_size: tokens in a page.

        Raises:
            BundleError, MissingPackageError, ArgumentError: see `tokenflow_sdk.errors`.
            CodebookMismatchError: the tokenizer has another codebook.
        """
        options = SessionOptions(device, None if providers is None else tuple(providers), threads)
        bundle = Bundle.open(find_bundle(name, GeneratorConfig.kind), GeneratorConfig)
        bundle.verify()
        tokenizer = tokenizer_of(bundle, tokenizer, options)
        return cls(bundle, tokenizer, options, pages, page_size)

    @property
    def config(self) -> GeneratorConfig:
        """Sizes of this generator."""
        return self.bundle.config

    @property
    def device(self) -> str:
        """Where the transformer runs, e.g. `cpu` or `cuda:0`."""
        return self._sessions["transformer"].device

    @property
    def token_forwards(self) -> int:
        """Tokens run through the transformer so far."""
        return self._scheduler.loop.transformer.token_forwards

    def stream(
        self,
        prompt: Prompt,
        *,
        n: int = 1,
        negative_prompt: Prompt | None = None,
        preset: str = "paper",
        cfg_scale: float = 7.5,
        seed: int | None = None,
        params: SamplingParams | None = None,
        strict: bool = False,
    ) -> Iterator[GeneratedScale]:
        """Draw `n` pictures and yield after every scale. Closing the iterator cancels the request and frees its pages.

        Args:
            prompt: text, or token ids without BOS.
            n: pictures, each with noise of its own.
            negative_prompt: what guidance leads away from; None takes the model's own.
            preset: `fast` (1 pass), `balanced` (2) or `paper` (3).
            cfg_scale: strength of guidance; 0 is none.
            seed: 0 .. 2**63 - 1; None draws one (`Generation.seed` tells it).
            params: passes, guidance and seed in one, instead of preset, cfg_scale and seed.
            strict: refuse a prompt that is too long instead of cutting it with a warning.

        Raises:
            PromptError, ArgumentError: the request cannot work.
            PagesExhausted: it needs more pages than the pool has.
        """
        request = self._request(prompt, n, negative_prompt, _params(preset, cfg_scale, seed, params), strict)
        return self._stream(request)

    def generate(
        self,
        prompt: Prompt,
        *,
        n: int = 1,
        negative_prompt: Prompt | None = None,
        preset: str = "paper",
        cfg_scale: float = 7.5,
        seed: int | None = None,
        params: SamplingParams | None = None,
        strict: bool = False,
    ) -> Generation:
        """Draw `n` pictures; arguments and errors as in `stream`."""
        params = _params(preset, cfg_scale, seed, params)
        return self._drain([self._request(prompt, n, negative_prompt, params, strict)])[0]

    def generate_batch(
        self,
        prompts: Sequence[Prompt],
        *,
        n: int = 1,
        negative_prompt: Prompt | None = None,
        preset: str = "paper",
        cfg_scale: float = 7.5,
        seed: int | None = None,
        params: SamplingParams | None = None,
        strict: bool = False,
    ) -> list[Generation]:
        """Draw several prompts together; each as `generate` draws it alone. Arguments and errors as in `stream`."""
        params = _params(preset, cfg_scale, seed, params)
        return self._drain([self._request(prompt, n, negative_prompt, params, strict) for prompt in prompts])

    def close(self) -> None:
        """Free the engines, not the tokenizer. Closing twice is fine; anything else afterwards raises ArgumentError."""
        with self._lock:
            self._closed = True
            for session in self._sessions.values():
                session.close()

    def __enter__(self) -> Generator:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def _request(self, prompt: Prompt, n: int, negative_prompt: Prompt | None, params: SamplingParams, strict: bool) -> Request:
        if type(n) is not int or n < 1:
            raise ArgumentError(f"n={n!r} asks for no picture.", "Give at least 1.")
        negative = self.config.negative_prompt if negative_prompt is None else negative_prompt
        return Request(self._prompts.encode(prompt, strict), self._prompts.encode(negative, strict), params, n)

    def _stream(self, request: Request) -> Iterator[GeneratedScale]:
        try:
            self._submit(request)
            for scale in range(1, len(self.config.patch_nums) + 1):
                self._advance(request, scale)
                yield GeneratedScale(scale, self._codes(request, scale), self.tokenizer)
        finally:
            with self._lock:
                self._scheduler.remove(request)

    def _drain(self, requests: Sequence[Request]) -> list[Generation]:
        began = perf_counter()
        count, timings = len(self.config.patch_nums), [deque[float]() for _ in requests]
        try:
            for request in requests:
                self._submit(request)
            for scale in range(1, count + 1):
                for request, times in zip(requests, timings, strict=True):
                    self._advance(request, scale)
                    times.append(perf_counter() - began)
        finally:
            with self._lock:
                for request in requests:
                    self._scheduler.remove(request)
        return [
            Generation(self._codes(request, count), request.params, tuple(times), self.tokenizer)
            for request, times in zip(requests, timings, strict=True)
        ]

    def _submit(self, request: Request) -> None:
        with self._lock:
            self._check_open()
            self._scheduler.submit(request)

    def _advance(self, request: Request, scale: int) -> None:
        """Run steps, whoever they are for, until `request` has drawn `scale` scales."""
        while request.scale < scale:
            with self._lock:
                self._check_open()
                if request.error is not None:
                    raise request.error
                if request.scale < scale:
                    self._scheduler.step()

    def _check_open(self) -> None:
        if self._closed:
            raise ArgumentError("This Generator is closed.", "Make a new one with Generator.from_pretrained.")

    def _codes(self, request: Request, scales: int) -> tuple[Codes, ...]:
        return tuple(self.tokenizer.codes(np.concatenate(picture.codes[:scales])) for picture in request.pictures)


def _params(preset: str, cfg_scale: float, seed: int | None, params: SamplingParams | None) -> SamplingParams:
    if params is not None:
        return params if seed is None else replace(params, seed=seed)
    return SamplingParams.preset(preset, cfg_scale, secrets.randbelow(2**63) if seed is None else seed)


def _codebook(bundle: Bundle[GeneratorConfig]) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    path = bundle.path / bundle.asset("codebook").name
    try:
        codebook = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise CorruptBundleError(f"{path} is no array: {error}.", "Export the bundle again.") from error
    if codebook.ndim != 2 or codebook.dtype != np.float32 or len(codebook) != bundle.config.codebook_size:
        raise CorruptBundleError(f"{path} is no codebook of {bundle.config.codebook_size} entries.", "Export the bundle again.")
    found: np.ndarray[tuple[int, ...], np.dtype[np.float32]] = codebook
    return found
