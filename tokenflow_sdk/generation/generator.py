"""`Generator`: text to image, scale by scale, over a shared pool of key/value pages."""

from __future__ import annotations

import secrets
from collections.abc import Generator as Pieces
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

import numpy as np
from PIL import Image

from tokenflow_sdk.arguments import instance, integer, items, shown
from tokenflow_sdk.backends.session import Session
from tokenflow_sdk.bundle.arrays import load_codebook
from tokenflow_sdk.bundle.model_config import GeneratorConfig
from tokenflow_sdk.errors import ArgumentError
from tokenflow_sdk.generation.prompt import Prompt, PromptEncoder
from tokenflow_sdk.generation.scale_loop import ScaleLoop
from tokenflow_sdk.generation.scheduler import ImageRequest, ScaleScheduler
from tokenflow_sdk.language_model import LanguageModel
from tokenflow_sdk.loaded_model import Progress
from tokenflow_sdk.model.sampling import SamplingParams
from tokenflow_sdk.model.transformer import PagedTransformer
from tokenflow_sdk.pictures.codes import Codes
from tokenflow_sdk.request_runner import RequestStream
from tokenflow_sdk.tokenizer import Tokenizer

__all__ = ["GeneratedScale", "Generation", "Generator"]


@dataclass(frozen=True)
class GeneratedScale:
    """One scale of a request, as `Generator.stream` yields it: its number from 1, and the codes so far of each image."""

    scale: int
    codes: tuple[Codes, ...]
    tokenizer: Tokenizer = field(compare=False)

    def __post_init__(self) -> None:
        instance("tokenizer", self.tokenizer, Tokenizer, "Take results from Generator.stream.")

    def preview(self) -> list[Image.Image]:
        """The images so far, decoded now, one for each of the request's images."""
        return self.tokenizer.decode_batch(self.codes)


@dataclass(frozen=True)
class Generation:
    """A finished request: its codes, one for each image, and `timings`, seconds from its start to the end of each scale."""

    codes: tuple[Codes, ...]
    params: SamplingParams
    timings: tuple[float, ...]
    tokenizer: Tokenizer = field(compare=False)

    def __post_init__(self) -> None:
        hint = "Take results from Generator.generate."
        instance("tokenizer", self.tokenizer, Tokenizer, hint)
        instance("params", self.params, SamplingParams, hint)

    @property
    def seed(self) -> int:
        """The seed that was used; the same request with this seed gives the same codes."""
        return self.params.seed

    @property
    def images(self) -> list[Image.Image]:
        """The images, decoded each time this is read."""
        return self.tokenizer.decode_batch(self.codes)


class Generator(LanguageModel[GeneratorConfig, ImageRequest]):
    """Generates images from text, as the released TokenFlow text-to-image model does (docs/model.md, section 4).

    Make one with `from_pretrained`. Requests may come from several threads; live requests at the same scale share steps.
    """

    config_type = GeneratorConfig

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
        timeout: float | None = None,
    ) -> RequestStream[GeneratedScale, Generation]:
        """Generate `n` images and yield after every scale. Closing the stream cancels the request and frees its pages.

        Args:
            prompt: text, or token ids without BOS.
            n: number of images, each with noise of its own.
            negative_prompt: what guidance leads away from; None takes the model's own.
            preset: `fast` (1 pass), `balanced` (2) or `paper` (3); None takes the model's own.
            cfg_scale: strength of guidance; 0 is none; None takes the model's own.
            seed: 0 .. 2**63 - 1; None takes a random one, which `Generation.seed` tells.
            params: passes, guidance and seed in one, instead of preset, cfg_scale and seed.
            strict: refuse a prompt that is too long instead of cutting it with a warning.
            timeout: most seconds from this call to the last scale, waiting for other requests included; None is no limit.

        Raises:
            PromptError, ArgumentError: the request cannot work.
            PagesExhausted: it needs more pages than the pool has.
            RequestTimeoutError: it was not finished in time.
        """
        params = self._params(preset, cfg_scale, seed, params)
        request = self._request(prompt, n, negative_prompt, params, strict, timeout)
        return RequestStream(request, self._scales(request), partial(self._generation, request))

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
        timeout: float | None = None,
    ) -> Generation:
        """Generate `n` images. Arguments and errors as in `stream`."""
        params = self._params(preset, cfg_scale, seed, params)
        return self._generations([self._request(prompt, n, negative_prompt, params, strict, timeout)])[0]

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
        timeout: float | None = None,
    ) -> list[Generation]:
        """Generate images of several prompts together, the same as one by one. Arguments and errors as in `stream`.

        Raises:
            ArgumentError: one prompt instead of several.
        """
        one, hint = (
            isinstance(prompts, (str, bytes, bytearray)),
            "Use generate(prompt), or give a list: generate_batch([prompt]).",
        )
        prompts = [] if one else list(items("prompts", prompts, hint))
        if one or any(isinstance(prompt, (int, np.integer)) for prompt in prompts):
            raise ArgumentError("generate_batch takes several prompts, and this is one.", hint)
        params = self._params(preset, cfg_scale, seed, params)
        return self._generations([self._request(prompt, n, negative_prompt, params, strict, timeout) for prompt in prompts])

    def _params(
        self, preset: str | None, cfg_scale: float | None, seed: int | None, params: SamplingParams | None
    ) -> SamplingParams:
        if params is not None:
            if not isinstance(params, SamplingParams):
                raise ArgumentError(f"params={shown(params)} are no settings of sampling.", "Give SamplingParams(...).")
            return params if seed is None else replace(params, seed=seed)
        chosen = self.config.cfg_scale if cfg_scale is None else cfg_scale
        return SamplingParams.preset(
            self.config.preset if preset is None else preset, chosen, secrets.randbelow(2**63) if seed is None else seed
        )

    def _request(
        self,
        prompt: Prompt,
        n: int,
        negative_prompt: Prompt | None,
        params: SamplingParams,
        strict: bool,
        timeout: float | None,
    ) -> ImageRequest:
        progress = Progress(timeout)
        n = integer("n", n, 1, None, "asks for no picture.", "Give at least 1.")
        negative = self.config.negative_prompt if negative_prompt is None else negative_prompt
        request = ImageRequest(
            self._prompts.encode(prompt, strict),
            self._prompts.encode(negative, strict, "negative prompt"),
            params,
            n,
            progress=progress,
        )
        self._runner.check(request)
        return request

    def _scales(self, request: ImageRequest) -> Pieces[GeneratedScale, None, None]:
        with self._runner.submitted([request]) as model:
            for scale in range(1, len(self.config.scales) + 1):
                self._runner.advance(model, request, scale)
                yield GeneratedScale(scale, self._codes(request, scale), self.tokenizer)

    def _generations(self, requests: Sequence[ImageRequest]) -> list[Generation]:
        """Run requests together to their ends."""
        with self._runner.submitted(requests) as model:
            for request in requests:
                self._runner.advance(model, request, len(self.config.scales))
        return [self._generation(request) for request in requests]

    def _generation(self, request: ImageRequest) -> Generation:
        codes = self._codes(request, len(self.config.scales))
        return Generation(codes, request.params, tuple(request.timings), self.tokenizer)

    def _codes(self, request: ImageRequest, scales: int) -> tuple[Codes, ...]:
        return tuple(self.tokenizer.codes(np.concatenate(image.codes[:scales])) for image in request.images)

    @cached_property
    def _prompts(self) -> PromptEncoder:
        return PromptEncoder(self._text_tokenizer, self.config)

    def _schedule(self, sessions: Mapping[str, Session], transformer: PagedTransformer) -> ScaleScheduler:
        return ScaleScheduler(ScaleLoop(self.config, sessions, transformer, load_codebook(self.bundle)))
