"""`Models`: the one copy of each model that a server has, and its operations on pictures and codes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tokenflow_sdk.backends.cores import available_cores
from tokenflow_sdk.bundle.bundle import TINY, Bundle, find_bundle
from tokenflow_sdk.bundle.model_config import GeneratorConfig, TokenizerConfig, UnderstanderConfig
from tokenflow_sdk.engines.options import RuntimeOptions
from tokenflow_sdk.generation.generator import Generator
from tokenflow_sdk.pictures.codes import Codes
from tokenflow_sdk.pictures.preparation import Color, Preprocess
from tokenflow_sdk.server.errors import ApiError
from tokenflow_sdk.server.lanes import Lanes, Operation
from tokenflow_sdk.server.metrics import Metrics
from tokenflow_sdk.server.settings import NONE, Settings
from tokenflow_sdk.tokenizer import Tokenizer
from tokenflow_sdk.understanding.understander import Understander

__all__ = ["Models"]

T = TypeVar("T")


class Models:
    """The models of a server, opened by `open`. Pictures are decoded by threads of their own, and engines run in lanes.

    Args:
        settings: which models, and how they run.
        metrics: told how long things take.

    Raises:
        TokenFlowError: a bundle is not there or is damaged; see `tokenflow_sdk.errors`.
    """

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self.settings, self.metrics = settings, metrics
        # Found and checked before anybody listens, so that a mistake is told to whoever starts the server.
        self.tokenizer_config: TokenizerConfig = _checked(settings.tokenizer, TokenizerConfig).config
        beside = TINY if settings.tokenizer == TINY else NONE
        self.generator_name, self.understander_name = settings.generator or beside, settings.understander or beside
        if self.generator_name != NONE:
            _checked(self.generator_name, GeneratorConfig)
        if self.understander_name != NONE:
            _checked(self.understander_name, UnderstanderConfig)
        self.names = self._names()
        """Names of the models, and what each can do."""
        self.generator: Generator | None = None
        self.understander: Understander | None = None
        self.ready = False
        self.ending = False
        """Set where the server ends: `open` leaves out the models that it has not begun with, and nothing gets ready."""
        # Apart, because a thread that makes pixels of a picture file may go on to encode them.
        self._pictures = ThreadPoolExecutor(available_cores(), "tokenflow-picture")
        self._others = ThreadPoolExecutor(available_cores(), "tokenflow-work")
        # As many as requests: each waits for its next piece in a thread, and asyncio's own are few.
        self.stream_threads = ThreadPoolExecutor(settings.max_queue, "tokenflow-stream")
        self._closing = ExitStack()
        self._closing.callback(self.stream_threads.shutdown)

    def open(self) -> None:
        """Open the models and run each once, so that the first request is as quick as the others. Takes as long as that.

        Raises:
            TokenFlowError: a model cannot be opened.
        """
        s = self.settings
        options = RuntimeOptions(
            device=s.device,
            backend=s.backend,
            build_config=s.build_config,
            threads=s.threads,
            serve_while_building=s.serve_while_building,
        )
        for_language = options.for_language_models()
        opened = self._closing.enter_context
        tok = self.tokenizer = opened(Tokenizer.open(s.tokenizer, options, s.batch_limit)).load()
        # Two at least, so that nothing waits for the decode of another request alone.
        self._lanes = Lanes(max(2, tok.lanes()), tok.batch_limit, s.batch_wait_ms / 1000, self.metrics)
        self._closing.callback(self._lanes.close)
        self._encode = Operation("encode", lambda items: tok.encode_array(np.stack(items)))
        self._decode = Operation("decode", lambda items: tok.decode_array(np.stack(items)))
        self._features = Operation("features", lambda items: tok.features(np.stack(items)))
        self._semantic = Operation("semantic", lambda items: tok.semantic(np.stack(items)))
        self._pooled = Operation("semantic_mean", lambda items: tok.semantic(np.stack(items), pool="mean"))
        size = tok.config.image_size
        codes = tok.codes(tok.encode_array(np.zeros((1, size, size, 3), np.uint8))[0])
        for warm in (tok.decode, tok.features, tok.semantic):
            warm(codes)
        if self.generator_name != NONE and not self.ending:
            self.generator = opened(Generator.open(self.generator_name, for_language, tok, s.pages))
            self.generator.generate("a red apple", seed=0)
        if self.understander_name != NONE and not self.ending:
            self.understander = opened(Understander.open(self.understander_name, for_language, tok, s.pages))
            self.understander.answer(codes, "What is this?", max_tokens=2)
        self.ready = not self.ending

    def close(self) -> None:
        """Free everything after the calls that run."""
        self.ready = False
        for threads in (self._pictures, self._others):
            threads.shutdown(wait=True, cancel_futures=True)
        self._closing.close()

    def require_ready(self) -> None:
        """Raises:
        ApiError: the models are not open and warm yet.
        """
        if not self.ready:
            raise ApiError(503, "The models are being opened. Try again in a moment.")

    async def picture(self, read: Callable[[], bytes], preprocess: Preprocess | None = None, color: Color = "srgb") -> Codes:
        """Codes of a picture file; see `prepared_picture`."""
        return (await self.prepared_picture(read, preprocess, color))[1]

    async def prepared_picture(
        self, read: Callable[[], bytes], preprocess: Preprocess | None = None, color: Color = "srgb"
    ) -> tuple[NDArray[np.uint8], Codes]:
        """A picture as it is encoded, u8 [H, W, 3] of the tokenizer's size, and its codes. A thread for pictures makes the
        pixels of the file, and encodes them where a lane is free; otherwise they wait for one.

        Args:
            read: gives the file's content; called by that thread.
            preprocess, color: as in `Tokenizer.encode`.
        """
        tok, limit, loop = self.tokenizer, self.settings.max_pixels, asyncio.get_running_loop()

        def prepared() -> tuple[NDArray[np.uint8], NDArray[np.int32] | None]:
            with self.metrics.stage("picture"):
                pixels = tok.preprocess(read(), preprocess=preprocess, color=color, max_pixels=limit)
            return pixels, self._lanes.run_here(self._encode, pixels, loop) if wanted else None

        wanted = True
        try:
            pixels, row = await loop.run_in_executor(self._pictures, prepared)
        finally:
            wanted = False  # by nobody, if the thread has not encoded it yet
        row = await self.encoded(pixels) if row is None else row
        return pixels, tok.codes(row, tok.preparation(preprocess, color))

    async def encoded(self, pixels: NDArray[np.uint8]) -> NDArray[np.int32]:
        """u8 [H, W, 3] of the tokenizer's size -> code indices int32 [L]."""
        found: NDArray[np.int32] = await self._lanes.run(self._encode, pixels)
        return found

    async def decoded(self, codes: Codes) -> Image.Image:
        """The picture of codes."""
        return Image.fromarray(await self._lanes.run(self._decode, self._row(codes)))

    async def decoded_array(self, row: NDArray[np.int32]) -> NDArray[np.uint8]:
        """Code indices int32 [L], -1 in absent scales -> u8 [H, W, 3]."""
        found: NDArray[np.uint8] = await self._lanes.run(self._decode, self._checked(row))
        return found

    async def features(self, codes: Codes) -> NDArray[np.float32]:
        """float32 [g * g, C]."""
        found: NDArray[np.float32] = await self._lanes.run(self._features, self._row(codes))
        return found

    async def semantic(self, codes: Codes) -> NDArray[np.float32]:
        """float32 [g * g, W]."""
        found: NDArray[np.float32] = await self._lanes.run(self._semantic, self._row(codes))
        return found

    async def semantic_array(self, row: NDArray[np.int32]) -> NDArray[np.float32]:
        """Code indices int32 [L], -1 in absent scales -> float32 [g * g, W]."""
        found: NDArray[np.float32] = await self._lanes.run(self._semantic, self._checked(row))
        return found

    async def embedding(self, codes: Codes) -> NDArray[np.float32]:
        """The mean semantic feature, float32 [W]."""
        found: NDArray[np.float32] = await self._lanes.run(self._pooled, self._row(codes))
        return found

    async def in_thread(self, function: Callable[[], T]) -> T:
        """Run what takes a while, such as writing a picture file or reading much JSON, in a thread."""
        return await asyncio.get_running_loop().run_in_executor(self._others, function)

    def opened(self) -> dict[str, Tokenizer | Generator | Understander]:
        """The models that are open, by what they are."""
        found = {"tokenizer": self.tokenizer, "generator": self.generator, "understander": self.understander}
        return {name: model for name, model in found.items() if model is not None}

    def _names(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {_name(self.settings.tokenizer): ["tokens", "embeddings"]}
        for name, ability in ((self.generator_name, "generations"), (self.understander_name, "chat")):
            if name != NONE:
                found.setdefault(_name(name), []).append(ability)
        return found

    def require(self, name: str | None, ability: str) -> str:
        """The name of the model that does something, if it is the one asked for.

        Raises:
            ApiError: there is none that does it, or none of this name.
        """
        able = next((each for each, abilities in self.names.items() if ability in abilities), None)
        if able is None:
            what = {"generations": "draws pictures", "chat": "answers questions"}[ability]
            raise ApiError(404, f"No model of this server {what}.", "model_not_found", "model")
        if name is not None and name != able and name not in self.settings.aliases:
            raise ApiError(404, f"There is no model {name!r} here; there is {able!r}.", "model_not_found", "model")
        return able

    def _checked(self, row: NDArray[np.int32]) -> NDArray[np.int32]:
        """The row alone is refused if it is wrong, not the call that it shares with others."""
        checked: NDArray[np.int32] = self.tokenizer.check_indices(row[None])[0]
        return checked

    def _row(self, codes: Codes) -> NDArray[np.int32]:
        self.tokenizer.require(codes)
        return codes.padded()


def _checked(name: str, config: type[Any]) -> Bundle[Any]:
    return Bundle.open(find_bundle(name, config.kind), config)


def _name(bundle: str) -> str:
    """What clients call a bundle: of a path its last part, else the name itself."""
    path = Path(bundle)
    return path.resolve().name if path.exists() else bundle
