"""`Tokenizer`: images to codes and back, on any backend."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterable, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Literal, overload

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tokenflow_sdk.arguments import flag, instance, integer, items, seconds, shown
from tokenflow_sdk.backends.cores import available_cores
from tokenflow_sdk.backends.onnxruntime import open_onnxruntime
from tokenflow_sdk.backends.session import OpenSession, SessionOptions
from tokenflow_sdk.bundle.bundle import Bundle, find_bundle
from tokenflow_sdk.bundle.hub import HubOptions
from tokenflow_sdk.bundle.model_config import TokenizerConfig
from tokenflow_sdk.engines.build_config import BuildConfig
from tokenflow_sdk.engines.choice import Needs, choose, engines_for, suitable_batch_limit
from tokenflow_sdk.engines.hot_swap import EngineSwap, SwappingSessions
from tokenflow_sdk.engines.options import RuntimeOptions
from tokenflow_sdk.errors import ArgumentError, ArrayError, CodesRangeError, TokenFlowError
from tokenflow_sdk.model.tokenizer_graphs import TokenizerGraphs
from tokenflow_sdk.pictures.codes import Codes
from tokenflow_sdk.pictures.decode import MAX_PIXELS
from tokenflow_sdk.pictures.images import check_batch
from tokenflow_sdk.pictures.images import preprocess as load_and_fit
from tokenflow_sdk.pictures.preparation import Color, Preparation, Preprocess
from tokenflow_sdk.pictures.sources import ImageSource, several, to_array
from tokenflow_sdk.pipeline import Pipeline, Prepared
from tokenflow_sdk.reopening import Reopening

__all__ = ["Tokenizer"]

GRAPHS = ("encode", "decode", "semantic", "features")
_LARGE = 100_000_000
"""Bytes of weights for each thread from which on a call leaves its threads no gaps."""


class Tokenizer(Reopening):
    """Encodes images to code indices and decodes them, as the released TokenFlow tokenizers do (arXiv 2412.03069).

    Make one with `from_pretrained`. Graphs are loaded when they are first needed, or by `load`. All methods are safe to call
    from several threads. It is a context manager. It can be pickled: a copy opens the same bundle when it is first used.

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
        batch_limit = _checked_batch_limit(batch_limit)
        hint = "Open tokenizers with Tokenizer.from_pretrained."
        instance("bundle.config", instance("bundle", bundle, Bundle, hint).config, TokenizerConfig, hint)
        options = SessionOptions() if options is None else instance("options", options, SessionOptions, hint)
        self.bundle = bundle
        self.batch_limit = batch_limit
        self._threads = options.threads
        self.graphs = TokenizerGraphs(bundle, open_session, options, batch_limit)
        """The graphs as functions of arrays, for comparing backends; what is fed to them is not checked."""
        self._swap: EngineSwap | None = None

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str],
        *,
        device: str = "auto",
        providers: Sequence[str] | None = None,
        threads: int | None = None,
        batch_limit: int | None = None,
        backend: str = "auto",
        build_config: BuildConfig | str | None = None,
        build: bool = True,
        serve_while_building: bool = False,
        execution_contexts: int = 1,
        cuda_graphs: bool = False,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        sha256: str | None = None,
    ) -> Tokenizer:
        """Open a bundle and verify its files; graphs are loaded on first use.

        Args:
            name: a bundle's directory, a Hugging Face hub id (`org/name`), or `tiny`, which comes with the SDK.
            batch_limit: most images in one call of a session; larger batches are split. Memory grows with it. None: 1 on a CPU,
                where it is the fastest, 8 with CUDA, and with TensorRT as many as the engines were built for.
            device, providers, threads, backend, build_config, build, serve_while_building, execution_contexts, cuda_graphs:
                see `RuntimeOptions`.
            revision: branch, tag or commit of a hub id; None: the newest. A commit always gives the same files.
            token: for a private repository; None: `HF_TOKEN`, or that of `hf auth login`. Copies for other processes lack it.
            cache_dir: where files of the hub are kept; None: the hub's own cache, which `HF_HOME` moves.
            local_files_only: of a hub id, use what was fetched before, without a request.
            sha256: SHA-256 that bundle.json must have, as `tokenflow info` prints it. It holds the hashes of all other files,
                so that none can be another than meant. None: any.

        Raises:
            BundleNotFoundError, BundleVersionError, CorruptBundleError: see `tokenflow_sdk.errors`.
            MissingPackageError: a hub id without huggingface_hub; a backend that is not installed.
            ArgumentError: an option that cannot work.
            BackendError: the backend asked for does not work here; `EngineBuildError`, `EngineRefusedError` say more.
        """
        options = RuntimeOptions(
            device=device,
            providers=providers,
            threads=threads,
            backend=backend,
            build_config=build_config,
            build=build,
            serve_while_building=serve_while_building,
            execution_contexts=execution_contexts,
            cuda_graphs=cuda_graphs,
        )
        hub = HubOptions(revision, token, cache_dir, local_files_only)
        return cls.open(name, options, batch_limit, hub, sha256)

    @classmethod
    def open(
        cls,
        name: str | os.PathLike[str],
        options: RuntimeOptions,
        batch_limit: int | None = None,
        hub: HubOptions | None = None,
        sha256: str | None = None,
    ) -> Tokenizer:
        """`from_pretrained`, with the runtime options in one object."""
        instance("options", options, RuntimeOptions, "Give RuntimeOptions(...).")
        bundle = Bundle.open(find_bundle(name, TokenizerConfig.kind, hub), TokenizerConfig, sha256)
        bundle.verify()
        given = None if batch_limit is None else _checked_batch_limit(batch_limit)
        needs = Needs(batch=given or 1)
        if not options.serve_while_building:
            open_session, session_options = choose(bundle, options, needs)
            limit = given or suitable_batch_limit(open_session, session_options)
            tokenizer = cls(bundle, session_options, limit, open_session)
        else:
            engines, sessions = engines_for(bundle, options, needs), SwappingSessions(open_onnxruntime)
            limit = given or suitable_batch_limit(engines.open, options.session)
            tokenizer = cls(bundle, options.session, limit, sessions.open)
            tokenizer._swap = EngineSwap(engines.prepare, lambda: sessions.swap(engines.open))
        portable_hub = hub and hub.portable()
        tokenizer._arguments = bundle.portable_name(name), options.portable(), given, portable_hub, bundle.sha256
        return tokenizer

    @property
    def config(self) -> TokenizerConfig:
        """Sizes of this tokenizer."""
        return self.bundle.config

    @property
    def device(self) -> str:
        """Where the graphs loaded so far run: `cpu`, `cuda:0`, or `not loaded`."""
        return ", ".join(self.graphs.devices) or "not loaded"

    def wait_for_engines(self, timeout: float | None = None) -> bool:
        """Whether everything runs on its engines, after at most `timeout` seconds; with `serve_while_building`, not at once.

        Raises:
            EngineBuildError, EngineRefusedError, BackendError: it never will; onnxruntime goes on.
        """
        timeout = seconds("timeout", timeout)
        return self._swap is None or self._swap.wait(timeout)

    def load(self, *graphs: str) -> Tokenizer:
        """Load graphs now instead of on first use: any of `encode`, `decode`, `semantic`, `features`; none means all.

        Raises:
            ArgumentError: there is no such graph.
            CorruptBundleError, BackendError, MissingPackageError: a graph is missing or cannot be loaded.
        """
        if unknown := [name for name in graphs if not isinstance(name, str) or name not in GRAPHS]:
            raise ArgumentError(f"A tokenizer has no graph {shown(unknown[0])}.", f"Choose of: {', '.join(GRAPHS)}.")
        for name in graphs or tuple(self.bundle.graphs):
            self.graphs.load(name)
        return self

    def encode(
        self,
        image: ImageSource,
        *,
        preprocess: Preprocess | None = None,
        color: Color = "srgb",
        fast: bool = False,
        max_pixels: int = MAX_PIXELS,
    ) -> Codes:
        """Encode one image.

        Args:
            image: a path, bytes, file object, PIL image, or u8 array [H, W], [H, W, 3] or [H, W, 4], also of another library,
                such as a PyTorch tensor in host memory.
            preprocess: how the image is made square: `crop` (short side, centre), `squash` (all of it, aspect lost), `pad` (all
                of it, on white) or `pad-grey` (all of it, on grey, as most understanding models read pictures); None takes the
                tokenizer's own way.
            color: `srgb` converts the colours of an image with an ICC profile, such as photos of telephones, to sRGB;
                `as-stored` reads past profiles, as the released system does. Without a profile they are the same.
            fast: decode JPEGs at a reduced size where that suffices. Quicker for large photos; codes may differ slightly.
            max_pixels: pixels of the largest image accepted.

        Raises:
            ImageError, ArrayError: the image cannot be used; see `tokenflow_sdk.errors`.
            BackendError, MissingPackageError: the backend cannot run.
        """
        prepared = self._prepare(image, preprocess=preprocess, color=color, fast=fast, max_pixels=max_pixels)
        return self._encode([prepared])[0]

    def encode_batch(
        self,
        images: Iterable[ImageSource],
        *,
        preprocess: Preprocess | None = None,
        color: Color = "srgb",
        fast: bool = False,
        max_pixels: int = MAX_PIXELS,
    ) -> list[Codes]:
        """Encode several images, in order: `encode_iter` as a list. Arguments and errors as there."""
        source = several("encode_batch", images)
        return list(self.encode_iter(source, preprocess=preprocess, color=color, fast=fast, max_pixels=max_pixels))

    @overload
    def encode_iter(
        self,
        images: Iterable[ImageSource],
        *,
        workers: int | None = None,
        errors: Literal["raise"] = "raise",
        preprocess: Preprocess | None = None,
        color: Color = "srgb",
        fast: bool = False,
        max_pixels: int = MAX_PIXELS,
    ) -> Generator[Codes, None, None]: ...

    @overload
    def encode_iter(
        self,
        images: Iterable[ImageSource],
        *,
        workers: int | None = None,
        errors: Literal["yield"],
        preprocess: Preprocess | None = None,
        color: Color = "srgb",
        fast: bool = False,
        max_pixels: int = MAX_PIXELS,
    ) -> Generator[Codes | TokenFlowError, None, None]: ...

    def encode_iter(
        self,
        images: Iterable[ImageSource],
        *,
        workers: int | None = None,
        errors: Literal["raise", "yield"] = "raise",
        preprocess: Preprocess | None = None,
        color: Color = "srgb",
        fast: bool = False,
        max_pixels: int = MAX_PIXELS,
    ) -> Generator[Any, None, None]:
        """Encode images as they come, in order, to the same codes as one by one. Threads decode files beside the engine.

        `images` is read in the caller's thread, a few batches ahead of the codes that are asked for, so it may be endless or
        larger than memory. Arrays, images and open files may be changed as soon as the next picture is asked for; files
        given by their paths are read later. Closing the iterator, or dropping it, ends its threads after the calls that run.

        Args:
            images: a list or another iterable; or one u8 array [B, H, W, 3].
            workers: threads that decode pictures; None: as many as the process may use cores.
            errors: what becomes of a picture that cannot be used: `raise` its error after the codes of those before it, or
                `yield` the error in its place and go on. Errors of the engine are raised.
            preprocess, color, fast, max_pixels: see `encode`.

        Raises:
            ArgumentError: one image instead of several, or an argument that cannot work.
            ImageError, ArrayError: an image cannot be used; see `tokenflow_sdk.errors`.
            BackendError, MissingPackageError: the backend cannot run.

        >>> for codes in tok.encode_iter(Path("photos").glob("*.jpg")): ...   # doctest: +SKIP
        """
        source = several("encode_iter", images)
        if not (isinstance(errors, str) and errors in ("raise", "yield")):
            raise ArgumentError(f"errors={shown(errors)} is no way to treat errors.", "Choose one of: raise, yield.")
        wrong = "decodes no pictures."
        workers = available_cores() if workers is None else integer("workers", workers, 1, 1024, wrong, "Give 1 to 1024.")
        self.preparation(preprocess, color, fast)
        prepare = partial(self._prepare, preprocess=preprocess, color=color, fast=fast, max_pixels=max_pixels)
        pipeline = Pipeline(prepare, self._encode, self.batch_limit, workers, self.lanes())
        return pipeline.codes(source, errors == "raise")

    def preparation(self, preprocess: Preprocess | None = None, color: Color = "srgb", fast: bool = False) -> Preparation:
        """How `encode` prepares a picture with these options, for `codes`.

        Raises:
            ArgumentError: there is no such preprocessing or colour.
        """
        return Preparation(self.config.preprocess if preprocess is None else preprocess, color, flag("fast", fast))

    def preprocess(
        self,
        image: ImageSource,
        *,
        preprocess: Preprocess | None = None,
        color: Color = "srgb",
        fast: bool = False,
        max_pixels: int = MAX_PIXELS,
    ) -> NDArray[np.uint8]:
        """What `encode` feeds the engine: u8 [H, W, 3], H = W = `config.image_size`. Options and errors as in `encode`."""
        chosen = self.preparation(preprocess, color, fast)
        size = self.config.image_size
        return load_and_fit(image, size, chosen.preprocess, color=chosen.color, fast=chosen.fast, max_pixels=max_pixels)

    def encode_array(self, images: NDArray[np.uint8]) -> NDArray[np.int32]:
        """u8 [B, H, W, 3], of NumPy or another library, already of the tokenizer's size -> code indices int32 [B, L].

        Raises:
            ArrayError, ImageShapeError: wrong dtype, rank or size.
        """
        images = check_batch(images, self.config.image_size)
        return self.graphs.encode(images)

    def codes(self, code_indices: NDArray[np.int32], preparation: Preparation | None = None) -> Codes:
        """Wrap one row of code indices [l], l whole scales, as `Codes` of this tokenizer.

        Args:
            code_indices: integers in [0, K).
            preparation: how the picture was prepared, if that is known.

        Raises:
            CodesRangeError: an index outside the codebook, or a length that is no whole number of scales.
        """
        c = self.config
        return Codes(code_indices, c.patch_nums, c.codebook_size, c.variant, c.codebook_sha256, preparation)

    def require(self, codes: Codes) -> None:
        """Check that codes are of this tokenizer.

        Raises:
            ArgumentError: something else than `Codes`.
            CodebookMismatchError: the codes come from another tokenizer.
        """
        c = self.config
        if not isinstance(codes, Codes):
            raise ArgumentError(
                f"Expected Codes, got {type(codes).__name__}.",
                "Use Codes.load(path) for files, decode_batch for lists of Codes and decode_array for arrays.",
            )
        codes.require(c.variant, c.codebook_sha256, c.codebook_size, c.patch_nums)

    def decode(self, codes: Codes) -> Image.Image:
        """Decode codes to an image; with coarse scales only, a coarser image.

        Raises:
            CodebookMismatchError: the codes come from another tokenizer.
        """
        return self.decode_batch([codes])[0]

    def decode_batch(self, codes: Sequence[Codes]) -> list[Image.Image]:
        """Decode several codes, in order; they may have different numbers of scales. Errors as in `decode`.

        Raises:
            ArgumentError: not a list of codes.
        """
        hint = "Use decode(codes), or decode_batch([codes]); decode_array is for arrays of code indices."
        if isinstance(codes, (Codes, np.ndarray, int)):
            raise ArgumentError(f"decode_batch takes a list of Codes, not {type(codes).__name__}.", hint)
        codes = list(items("codes", codes, hint))
        return [Image.fromarray(image) for image in self.decode_array(self._indices(codes))] if codes else []

    def decode_array(self, code_indices: NDArray[np.int32]) -> NDArray[np.uint8]:
        """Code indices int32 [B, l] -> u8 [B, H, W, 3].

        l is the length of some whole scales; in a full-length row, -1 throughout a scale leaves that scale out.

        Raises:
            ArrayError: not an integer array of rank 2.
            CodesRangeError: an index outside the codebook, or a length that is no whole number of scales.
        """
        return self.graphs.decode(self.check_indices(code_indices))

    def check_indices(self, code_indices: NDArray[np.int32]) -> NDArray[np.int32]:
        """Code indices as `decode_array` takes them -> int32 [B, L], -1 in absent scales. Errors as there."""
        c = self.config
        try:
            array = np.asarray(to_array(code_indices))
        except (TypeError, ValueError) as error:
            raise ArrayError(f"Code indices cannot become an array: {error}.", "Give an integer array [B, l].") from error
        if array.ndim != 2 or array.dtype.kind not in "iu" or len(array) == 0:
            raise ArrayError(
                f"Code indices must be an integer array [B, l], B >= 1, not {array.dtype}{list(array.shape)}.",
                "For one image use codes[None].",
            )
        if array.shape[1] not in c.scales.ends:
            raise CodesRangeError(
                f"{array.shape[1]} codes are no whole number of {c.variant}'s scales.",
                f"Valid lengths are {', '.join(map(str, c.scales.ends))}.",
            )
        if array.min() < -1 or array.max() >= c.codebook_size:
            bad = np.argwhere((array < -1) | (array >= c.codebook_size))[0]
            raise CodesRangeError(
                f"Code {array[tuple(bad)]} at {bad.tolist()} is outside the codebook.",
                f"Codes are 0 .. {c.codebook_size - 1}, or -1 throughout an absent scale.",
            )
        full = np.full((len(array), c.n_codes), -1, np.int32)
        full[:, : array.shape[1]] = array
        for i, scale in enumerate(c.scales.split(full < 0)):
            if (scale.any(axis=1) & ~scale.all(axis=1)).any():
                raise CodesRangeError(
                    f"Scale {i + 1} is absent (-1) in part.", "Leave a scale out as a whole, or give all of its codes."
                )
        return full

    def features(self, codes: Codes | Iterable[Codes] | NDArray[np.int32]) -> NDArray[np.float32]:
        """The quantized feature, row-major: what a language model reads (docs/model.md, section 2).

        Args:
            codes: of one image, or of several: a list of them, or an array of code indices [B, l] as for `decode_array`.

        Returns:
            float32 [g * g, C] of one image, [B, g * g, C] of several.

        Raises:
            CodebookMismatchError: the codes come from another tokenizer.
            ArgumentError, ArrayError, CodesRangeError: they are no codes; see `decode_array`.
        """
        return self._of_codes(self.graphs.features, codes, self.config.code_dim)

    def semantic(
        self, codes: Codes | Iterable[Codes] | NDArray[np.int32], *, pool: Literal["mean"] | None = None
    ) -> NDArray[np.float32]:
        """The semantic decoder's features, row-major, for search and classification. Errors as in `features`.

        Args:
            codes: of one image or of several, as in `features`.
            pool: `mean` averages them over the image, so that each image has one vector; None leaves one a cell.

        Returns:
            float32 [g * g, W] of one image, [B, g * g, W] of several; pooled [W] and [B, W].
        """
        if not (pool is None or (isinstance(pool, str) and pool == "mean")):
            raise ArgumentError(f"pool={shown(pool)} is no way to pool.", "Give 'mean', or None for a vector of each cell.")

        def run(indices: NDArray[np.int32]) -> NDArray[np.float32]:
            found = self.graphs.semantic(indices)
            return found if pool is None else found.mean(axis=1)

        return self._of_codes(run, codes, self.config.semantic_width, pooled=pool is not None)

    def reconstruct(self, image: ImageSource, *, preprocess: Preprocess | None = None, color: Color = "srgb") -> Image.Image:
        """Encode and decode an image. Options and errors as in `encode`."""
        return self.decode(self.encode(image, preprocess=preprocess, color=color))

    def latent(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """u8 [B, H, W, 3] -> float32 [B, C, g, g]: the encoders' output before the codebook search, for checking engines."""
        return self.graphs.latent(check_batch(images, self.config.image_size))

    def lanes(self) -> int:
        """Calls of the encode graph at once: two, so that one fills the gaps of the other.

        On a CPU more where one takes few cores; and one where it takes all and leaves no gaps, as with a large model on few
        cores: two would only take each other's caches.
        """
        if self.graphs.load("encode").device != "cpu":
            return 2
        cores = available_cores()
        threads = self._threads or cores
        size = sum(file.size for file in self.bundle.graph("encode").files)
        return 1 if threads >= cores and size >= threads * _LARGE else max(2, cores // threads)

    def close(self) -> None:
        """Free the graphs. Closing twice is fine; anything else afterwards raises ArgumentError."""
        self._closed = True
        if self._unopened is None:
            self.graphs.close()

    def __enter__(self) -> Tokenizer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        if self._unopened is not None:
            return "Tokenizer(a copy that opens when it is used)"
        c = self.config
        return f"Tokenizer({c.variant}: {c.image_size} px, {len(c.patch_nums)} scales, {c.n_codes} codes of {c.codebook_size})"

    def _prepare(
        self, image: ImageSource, *, preprocess: Preprocess | None, color: Color, fast: bool, max_pixels: int
    ) -> Prepared:
        pixels = self.preprocess(image, preprocess=preprocess, color=color, fast=fast, max_pixels=max_pixels)
        array, size = to_array(image), self.config.image_size
        # An array of the tokenizer's size was prepared by the caller.
        own = isinstance(array, np.ndarray) and array.shape[:2] == (size, size)
        return Prepared(pixels, None if own else self.preparation(preprocess, color, fast))

    def _encode(self, pictures: Sequence[Prepared]) -> list[Codes]:
        rows = self.encode_array(np.stack([picture.pixels for picture in pictures]))
        return [self.codes(row, picture.preparation) for row, picture in zip(rows, pictures, strict=True)]

    def _of_codes(
        self,
        run: Callable[[NDArray[np.int32]], NDArray[np.float32]],
        codes: Codes | Iterable[Codes] | NDArray[np.int32],
        width: int,
        pooled: bool = False,
    ) -> NDArray[np.float32]:
        """Run a graph on one row of codes, or on several, of which no more are in memory unpooled than a call takes."""
        if isinstance(codes, (Codes, str, bytes, bytearray)):
            one: NDArray[np.float32] = run(self._indices([codes]))[0]  # what are no codes is named there
            return one
        given = to_array(codes)
        if isinstance(given, np.ndarray):
            indices = self.check_indices(given)
        elif rows := list(items("codes", given, "Give Codes, a list of them or an array of code indices.")):
            indices = self._indices(rows)
        else:
            return np.zeros((0, width) if pooled else (0, self.config.grid**2, width), np.float32)
        return np.concatenate([run(indices[i : i + self.batch_limit]) for i in range(0, len(indices), self.batch_limit)])

    def _indices(self, codes: Sequence[Codes]) -> NDArray[np.int32]:
        for item in codes:
            self.require(item)
        return np.stack([item.padded() for item in codes])


def _checked_batch_limit(value: object) -> int:
    return integer("batch_limit", value, 1, None, "leaves no room for an image.", "Give at least 1.")
