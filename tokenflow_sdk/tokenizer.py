"""`Tokenizer`: pictures to codes and back, over any backend."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from types import TracebackType
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tokenflow_sdk.backends.base import Array, OpenSession, Session, SessionOptions, open_onnxruntime
from tokenflow_sdk.backends.swapping import EngineSwap, SwappingSessions
from tokenflow_sdk.bundle import Bundle, find_bundle
from tokenflow_sdk.codes import Codes
from tokenflow_sdk.config import TokenizerConfig
from tokenflow_sdk.errors import ArgumentError, ArrayError, CodesRangeError
from tokenflow_sdk.images import MAX_PIXELS, ImageSource, Preprocess, check_batch
from tokenflow_sdk.images import preprocess as load_and_fit

if TYPE_CHECKING:
    from tokenflow_sdk.backends.choice import EngineOptions
    from tokenflow_sdk.engine_recipe import EnginePlan

__all__ = ["Tokenizer"]

T = TypeVar("T")


class Tokenizer:
    """Encodes pictures to code indices and decodes them, as the released TokenFlow tokenizers do (arXiv 2412.03069).

    Make one with `from_pretrained`. A graph is loaded when it is first needed; `load` does it ahead of time. All methods
    are safe to call from several threads. It is a context manager.

    >>> tok = Tokenizer.from_pretrained("bundles/clipb_256")   # doctest: +SKIP
    >>> codes = tok.encode("photo.jpg")                        # doctest: +SKIP
    >>> tok.decode(codes).save("out.png")                      # doctest: +SKIP
    """

    def __init__(
        self,
        bundle: Bundle[TokenizerConfig],
        options: SessionOptions | None = None,
        batch_limit: int = 1,
        open_session: OpenSession = open_onnxruntime,
    ) -> None:
        if batch_limit < 1:
            raise ArgumentError(f"batch_limit={batch_limit} leaves no room for a picture.", "Give at least 1.")
        self.bundle = bundle
        self.batch_limit = batch_limit
        self._options = options or SessionOptions()
        self._open_session = open_session
        self._sessions: dict[str, Session] = {}
        self._lock = threading.Lock()
        self._closed = False
        self._swap: EngineSwap | None = None

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str],
        *,
        device: str = "auto",
        providers: Sequence[str] | None = None,
        threads: int | None = None,
        batch_limit: int = 1,
        backend: str = "auto",
        plan: EnginePlan | str | None = None,
        build: bool = True,
        serve_while_building: bool = False,
        lanes: int = 1,
        cuda_graphs: bool = False,
    ) -> Tokenizer:
        """Open a bundle and verify its files; graphs are loaded on first use.

        Args:
            name: a bundle's directory, or a Hugging Face hub id (`org/name`).
            device: `auto` (CUDA where it works, else CPU), `cpu`, `cuda` or `cuda:N`.
            providers: onnxruntime execution providers, overriding `device`.
            threads: CPU threads of one call; None takes every core this process may use.
            batch_limit: most pictures in one engine call; larger batches are split. Memory grows with it. On a CPU 1 is
                the fastest as well; on a GPU try 8 to 32.
            backend, plan, build, serve_while_building, lanes, cuda_graphs: see `tokenflow_sdk.backends.choice.EngineOptions`.

        Raises:
            BundleNotFoundError, BundleVersionError, CorruptBundleError: see `tokenflow_sdk.errors`.
            MissingPackageError: a hub id without huggingface_hub; a backend that is not installed.
            ArgumentError: an option that cannot work.
            BackendError: the backend asked for does not work here; `EngineBuildError`, `EngineRefusedError` say more.
        """
        from tokenflow_sdk.backends.choice import EngineOptions

        options = SessionOptions(device, None if providers is None else tuple(providers), threads)
        wanted = EngineOptions(backend, plan, build, serve_while_building, lanes, cuda_graphs)
        return cls.open(name, options, wanted, batch_limit)

    @classmethod
    def open(
        cls, name: str | os.PathLike[str], options: SessionOptions, wanted: EngineOptions, batch_limit: int = 1
    ) -> Tokenizer:
        """`from_pretrained`, with its options in two parts."""
        from tokenflow_sdk.backends.choice import Needs, choose

        bundle = Bundle.open(find_bundle(name, TokenizerConfig.kind), TokenizerConfig)
        bundle.verify()
        needs = Needs(batch=batch_limit)
        if not wanted.serve_while_building:
            open_session, options = choose(bundle, options, wanted, needs)
            return cls(bundle, options, batch_limit, open_session)
        engines, sessions = wanted.engines(bundle, options, needs), SwappingSessions(open_onnxruntime)
        tokenizer = cls(bundle, options, batch_limit, sessions.open)
        tokenizer._swap = EngineSwap(engines.prepare, lambda: sessions.move(engines.open))
        return tokenizer

    @property
    def config(self) -> TokenizerConfig:
        """Sizes of this tokenizer."""
        return self.bundle.config

    @property
    def device(self) -> str:
        """Where the graphs loaded so far run: `cpu`, `cuda:0`, or `not loaded`."""
        with self._lock:
            return ", ".join(sorted({session.device for session in self._sessions.values()})) or "not loaded"

    def wait_for_engines(self, timeout: float | None = None) -> bool:
        """Whether everything runs on its engines, after at most `timeout` seconds; with `serve_while_building`, not at once.

        Raises:
            EngineBuildError, EngineRefusedError, BackendError: it never will; onnxruntime goes on.
        """
        return self._swap is None or self._swap.wait(timeout)

    def load(self, *graphs: str) -> Tokenizer:
        """Load graphs now instead of on first use: any of `encode`, `decode`, `semantic`, `features`; none means all."""
        for name in graphs or tuple(self.bundle.graphs):
            self._session(name)
        return self

    def encode(
        self, image: ImageSource, *, preprocess: Preprocess | None = None, fast: bool = False, max_pixels: int = MAX_PIXELS
    ) -> Codes:
        """The codes of one picture.

        Args:
            image: a path, bytes, file object, PIL image, or u8 array [H, W], [H, W, 3] or [H, W, 4].
            preprocess: `crop` (short side, centre), `squash` (whole picture, aspect lost) or `pad` (whole picture on white);
                None does what the tokenizer was released with.
            fast: decode JPEGs at a reduced size where that suffices. Quicker for large photos; codes may differ slightly.
            max_pixels: largest picture accepted.

        Raises:
            ImageError, ArrayError: the picture cannot be used; see `tokenflow_sdk.errors`.
            BackendError, MissingPackageError: the engine cannot run.
        """
        return self.encode_batch([image], preprocess=preprocess, fast=fast, max_pixels=max_pixels)[0]

    def encode_batch(
        self,
        images: Iterable[ImageSource],
        *,
        preprocess: Preprocess | None = None,
        fast: bool = False,
        max_pixels: int = MAX_PIXELS,
    ) -> list[Codes]:
        """The codes of several pictures, in order; the same codes as one by one. Options and errors as in `encode`."""
        found: list[Codes] = []
        for chunk in _chunks(images, self.batch_limit):
            array = np.stack(
                [self.preprocess(image, preprocess=preprocess, fast=fast, max_pixels=max_pixels) for image in chunk]
            )
            found.extend(self.codes(row) for row in self.encode_array(array))
        return found

    def preprocess(
        self, image: ImageSource, *, preprocess: Preprocess | None = None, fast: bool = False, max_pixels: int = MAX_PIXELS
    ) -> NDArray[np.uint8]:
        """What `encode` feeds the engine: u8 [H, W, 3], H = W = `config.image_size`. Options and errors as in `encode`."""
        mode = preprocess or self.config.preprocess
        return load_and_fit(image, self.config.image_size, mode, fast=fast, max_pixels=max_pixels)

    def encode_array(self, images: NDArray[np.uint8]) -> NDArray[np.int32]:
        """u8 [B, H, W, 3] already of the tokenizer's size -> code indices int32 [B, L].

        Raises:
            ArrayError, ImageShapeError: wrong dtype, rank or size.
        """
        images = check_batch(images, self.config.image_size)
        return self._run("encode", "images", images, "code_indices").astype(np.int32, copy=False)

    def codes(self, code_indices: NDArray[np.int32]) -> Codes:
        """Wrap one row of code indices [l], l whole scales, as `Codes` of this tokenizer.

        Raises:
            CodesRangeError: an index outside the codebook, or a length that is no whole number of scales.
        """
        c = self.config
        return Codes(code_indices, c.patch_nums, c.codebook_size, c.variant, c.codebook_sha256)

    def decode(self, codes: Codes) -> Image.Image:
        """The picture of some codes; with coarse scales only, a coarser picture.

        Raises:
            CodebookMismatchError: the codes come from another tokenizer.
        """
        return self.decode_batch([codes])[0]

    def decode_batch(self, codes: Sequence[Codes]) -> list[Image.Image]:
        """The pictures of several codes, in order; they may have different numbers of scales."""
        return [Image.fromarray(picture) for picture in self.decode_array(self._indices(codes))] if codes else []

    def decode_array(self, code_indices: NDArray[np.int32]) -> NDArray[np.uint8]:
        """Code indices int32 [B, l] -> u8 [B, H, W, 3].

        l is the length of some whole scales; in a full-length row, -1 throughout a scale leaves that scale out.

        Raises:
            ArrayError: not an integer array of rank 2.
            CodesRangeError: an index outside the codebook, or a length that is no whole number of scales.
        """
        return self._run("decode", "code_indices", self._checked(code_indices), "images").astype(np.uint8, copy=False)

    def features(self, codes: Codes) -> NDArray[np.float32]:
        """The quantized feature float32 [g * g, 40], row-major: what a language model's projector reads (paper section 3.3)."""
        return self._one("features", codes)

    def semantic(self, codes: Codes) -> NDArray[np.float32]:
        """Teacher-like features float32 [g * g, 512 or 1152], row-major, for search and classification."""
        return self._one("semantic", codes)

    def reconstruct(self, image: ImageSource, *, preprocess: Preprocess | None = None) -> Image.Image:
        """`decode(encode(image))`: the picture as the codes keep it. Options and errors as in `encode`."""
        return self.decode(self.encode(image, preprocess=preprocess))

    def latent(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """u8 [B, H, W, 3] -> float32 [B, 40, g, g]: the encoders' output before the codebook search, for checking engines."""
        images = check_batch(images, self.config.image_size)
        return self._run("encode", "images", images, "latent").astype(np.float32, copy=False)

    def close(self) -> None:
        """Free the engines. Closing twice is fine; anything else afterwards raises ArgumentError."""
        with self._lock:
            self._closed = True
            for session in self._sessions.values():
                session.close()
            self._sessions.clear()

    def __enter__(self) -> Tokenizer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        c = self.config
        return f"Tokenizer({c.variant}: {c.image_size} px, {len(c.patch_nums)} scales, {c.n_codes} codes of {c.codebook_size})"

    def _session(self, name: str) -> Session:
        with self._lock:
            if self._closed:
                raise ArgumentError("This Tokenizer is closed.", "Make a new one with Tokenizer.from_pretrained.")
            if name not in self._sessions:
                entry = self.bundle.graph(name)
                self._sessions[name] = self._open_session(self.bundle.path / entry.files[0].name, entry, self._options)
            return self._sessions[name]

    def _run(self, graph: str, feed: str, array: Array, output: str) -> Array:
        session = self._session(graph)
        parts = [
            session.run({feed: array[start : start + self.batch_limit]}, [output])[output]
            for start in range(0, len(array), self.batch_limit)
        ]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _one(self, graph: str, codes: Codes) -> NDArray[np.float32]:
        features: NDArray[np.float32] = self._run(graph, "code_indices", self._indices([codes]), "features")[0]
        return features

    def _indices(self, codes: Sequence[Codes]) -> NDArray[np.int32]:
        c = self.config
        for item in codes:
            if not isinstance(item, Codes):
                raise ArgumentError(
                    f"Expected Codes, got {type(item).__name__}.", "Use Codes.load(path) for files and decode_array for arrays."
                )
            item.require(c.variant, c.codebook_sha256, c.codebook_size, c.patch_nums)
        return np.stack([item.padded() for item in codes])

    def _checked(self, code_indices: NDArray[np.int32]) -> NDArray[np.int32]:
        c = self.config
        array = np.asarray(code_indices)
        if array.ndim != 2 or array.dtype.kind not in "iu" or len(array) == 0:
            raise ArrayError(
                f"Code indices must be an integer array [B, l], B >= 1, not {array.dtype}{list(array.shape)}.",
                "For one picture use codes[None].",
            )
        ends = np.cumsum([side * side for side in c.patch_nums])
        if array.shape[1] not in ends:
            raise CodesRangeError(
                f"{array.shape[1]} codes are no whole number of {c.variant}'s scales.",
                f"Valid lengths are {', '.join(map(str, ends))}.",
            )
        if array.min() < -1 or array.max() >= c.codebook_size:
            bad = np.argwhere((array < -1) | (array >= c.codebook_size))[0]
            raise CodesRangeError(
                f"Code {array[tuple(bad)]} at {bad.tolist()} is outside the codebook.",
                f"Codes are 0 .. {c.codebook_size - 1}, or -1 throughout an absent scale.",
            )
        full = np.full((len(array), c.n_codes), -1, np.int32)
        full[:, : array.shape[1]] = array
        absent = np.split(full < 0, ends[:-1], axis=1)
        for i, scale in enumerate(absent):
            if (scale.any(axis=1) & ~scale.all(axis=1)).any():
                raise CodesRangeError(
                    f"Scale {i + 1} is absent (-1) in part.", "Leave a scale out as a whole, or give all of its codes."
                )
        return full


def _chunks(items: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk
