"""`Generator`: text to image, scale by scale, over a shared pool of key/value pages."""

from __future__ import annotations

from collections.abc import Generator as Pieces
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial

import numpy as np

from tokenflow_sdk.arguments import integer, items, shown
from tokenflow_sdk.backends.session import Session
from tokenflow_sdk.bundle.arrays import load_codebook
from tokenflow_sdk.bundle.bundle import Bundle
from tokenflow_sdk.bundle.model_config import GeneratorConfig
from tokenflow_sdk.errors import ArgumentError
from tokenflow_sdk.generation.prompt import Prompt, PromptEncoder
from tokenflow_sdk.generation.results import GeneratedScale, Generation
from tokenflow_sdk.generation.scale_loop import ScaleLoop
from tokenflow_sdk.generation.scheduler import ImageRequest, ScaleScheduler
from tokenflow_sdk.language_model import LanguageModel
from tokenflow_sdk.loaded_model import Progress
from tokenflow_sdk.model.sampling import SamplingParams, random_seed
from tokenflow_sdk.model.transformer import PagedTransformer
from tokenflow_sdk.pictures.codes import Codes
from tokenflow_sdk.request_runner import RequestStream

__all__ = ["Generator", "model_id"]


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
            preset: `fast` (1 pass), `balanced` (2) or `paper` (3); `turbo`, see `SamplingParams.preset`; None takes the
                model's own.
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
        return RequestStream(request, self._scales(request), partial(self._generation, request, prompt, negative_prompt))

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
        request = self._request(prompt, n, negative_prompt, params, strict, timeout)
        self._run([request])
        return self._generation(request, prompt, negative_prompt)

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
        requests = [self._request(prompt, n, negative_prompt, params, strict, timeout) for prompt in prompts]
        self._run(requests)
        return [self._generation(*made, negative_prompt) for made in zip(requests, prompts, strict=True)]

    def _params(
        self, preset: str | None, cfg_scale: float | None, seed: int | None, params: SamplingParams | None
    ) -> SamplingParams:
        if params is not None:
            if not isinstance(params, SamplingParams):
                raise ArgumentError(f"params={shown(params)} are no settings of sampling.", "Give SamplingParams(...).")
            return params if seed is None else replace(params, seed=seed)
        chosen = self.config.cfg_scale if cfg_scale is None else cfg_scale
        return SamplingParams.preset(
            self.config.preset if preset is None else preset, chosen, random_seed() if seed is None else seed
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

    def _run(self, requests: Sequence[ImageRequest]) -> None:
        """Run requests together to their ends."""
        with self._runner.submitted(requests) as model:
            for request in requests:
                self._runner.advance(model, request, len(self.config.scales))

    def _generation(self, request: ImageRequest, prompt: Prompt, negative_prompt: Prompt | None) -> Generation:
        codes, timings = self._codes(request, len(self.config.scales)), tuple(request.timings)
        text = prompt if isinstance(prompt, str) else request.prompt
        negative = negative_prompt if negative_prompt is None or isinstance(negative_prompt, str) else request.negative
        return Generation(
            codes, request.params, timings, self.tokenizer, text, negative, model_id(self.bundle), len(request.prompt)
        )

    def _codes(self, request: ImageRequest, scales: int) -> tuple[Codes, ...]:
        return tuple(self.tokenizer.codes(np.concatenate(image.codes[:scales])) for image in request.images)

    @cached_property
    def _prompts(self) -> PromptEncoder:
        return PromptEncoder(self._text_tokenizer, self.config)

    def _reach(self) -> str:
        return f"{len(self.config.patch_nums)} scales, {self.config.n_codes} codes of {self.config.codebook_size}"

    def _schedule(self, sessions: Mapping[str, Session], transformer: PagedTransformer) -> ScaleScheduler:
        return ScaleScheduler(ScaleLoop(self.config, sessions, transformer, load_codebook(self.bundle)))


def model_id(bundle: Bundle[GeneratorConfig]) -> str:
    """The first 16 hex digits of the SHA-256 of the transformer's weights, or of its graph if that holds the weights."""
    return bundle.graph("transformer").files[-1].sha256[:16]
