"""What `Generator` and `Understander` share: opening a bundle with its paired tokenizer, and running requests over pages."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import update_wrapper
from pathlib import Path
from time import perf_counter
from types import FunctionType, TracebackType
from typing import Any, ClassVar, Generic, TypeVar

from tokenflow_sdk.arguments import instance, integer, seconds
from tokenflow_sdk.backends.onnxruntime import open_onnxruntime
from tokenflow_sdk.backends.openvino import OPENVINO
from tokenflow_sdk.backends.session import OpenSession, Session, SessionOptions
from tokenflow_sdk.bundle.bundle import Bundle, find_bundle
from tokenflow_sdk.bundle.hub import HubOptions
from tokenflow_sdk.bundle.model_config import PAGE_SIZE, LanguageModelConfig
from tokenflow_sdk.engines.build_config import BuildConfig
from tokenflow_sdk.engines.choice import Needs, choose, engines_for, require_by_picture
from tokenflow_sdk.engines.hot_swap import EngineSwap
from tokenflow_sdk.engines.options import RuntimeOptions
from tokenflow_sdk.errors import BundleNotFoundError, CodebookMismatchError
from tokenflow_sdk.loaded_model import LoadedModel, Request, Scheduler
from tokenflow_sdk.model.transformer import PagedTransformer
from tokenflow_sdk.reopening import Reopening
from tokenflow_sdk.request_runner import RequestRunner
from tokenflow_sdk.tokenizer import Tokenizer

__all__ = ["LanguageModel", "paired_tokenizer", "require_paired"]

M = TypeVar("M", bound="LanguageModel[Any, Any]")
C = TypeVar("C", bound=LanguageModelConfig)
R = TypeVar("R", bound=Request)


class LanguageModel(Reopening, ABC, Generic[C, R]):
    """A language model over pages of keys and values. Requests may come from several threads.

    It can be pickled: a copy opens the same bundle when it is first used.

    Args:
        bundle: whose graphs.
        tokenizer: the one that it was exported with.
        options: of sessions.
        pages: pages in the pool, if the session does not say; None: as many as the bundle's config says.
        page_size: tokens in a page.
        open_session: loads a graph.

    Raises:
        ArgumentError: a pool that holds nothing.
        CodebookMismatchError: the tokenizer has another codebook.
    """

    config_type: ClassVar[type[LanguageModelConfig]]

    def __init__(
        self,
        bundle: Bundle[C],
        tokenizer: Tokenizer,
        options: SessionOptions,
        pages: int | None = None,
        page_size: int = PAGE_SIZE,
        open_session: OpenSession = open_onnxruntime,
    ) -> None:
        pages, page_size = _checked_pool(pages, page_size)
        hint = f"Open models with {type(self).__name__}.from_pretrained."
        instance("bundle.config", instance("bundle", bundle, Bundle, hint).config, self.config_type, hint)
        instance("tokenizer", tokenizer, Tokenizer, hint)
        instance("options", options, SessionOptions, hint)
        require_paired(tokenizer, bundle.config, bundle.path)
        self.bundle = bundle
        self.tokenizer = tokenizer
        self._options, self._pages, self._page_size = options, pages, page_size
        self._text_tokenizer = bundle.asset_path("tokenizer")
        self._swap: EngineSwap | None = None
        self._runner: RequestRunner[R] = RequestRunner(type(self).__name__, self._load(open_session))

    def __init_subclass__(cls) -> None:
        """Let Python's errors about arguments of `from_pretrained` name the class that was called, not this one."""
        shared: Any = vars(LanguageModel)["from_pretrained"].__func__
        own: Any = FunctionType(shared.__code__, shared.__globals__, shared.__name__)
        update_wrapper(own, shared)
        own.__kwdefaults__, own.__qualname__ = shared.__kwdefaults__, f"{cls.__qualname__}.from_pretrained"
        cls.from_pretrained = classmethod(own)  # type: ignore[assignment]

    @classmethod
    def from_pretrained(
        cls: type[M],
        name: str | os.PathLike[str],
        *,
        tokenizer: Tokenizer | str | os.PathLike[str] | None = None,
        device: str = "auto",
        providers: Sequence[str] | None = None,
        threads: int | None = None,
        pages: int | None = None,
        page_size: int = PAGE_SIZE,
        backend: str = "auto",
        build_config: BuildConfig | str | None = None,
        build: bool = True,
        serve_while_building: bool = False,
        cuda_graphs: bool = False,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        sha256: str | None = None,
    ) -> M:
        """Open a bundle, verify its files, and load its graphs.

        Args:
            name: a bundle's directory, a Hugging Face hub id, or `tiny`, which comes with the SDK.
            tokenizer: the paired tokenizer; None looks where the bundle was exported with it.
            pages: pages in the pool; None holds eight images, or eight questions about images.
            page_size: tokens in a page; TensorRT engines take the default only.
            device, providers, threads, backend, build_config, build, serve_while_building, cuda_graphs: see `RuntimeOptions`.
            revision: branch, tag or commit of a hub id; None: the newest. A commit always gives the same files.
            token: for a private repository; None: `HF_TOKEN`, or that of `hf auth login`. Copies for other processes lack it.
            cache_dir: where files of the hub are kept; None: the hub's own cache, which `HF_HOME` moves.
            local_files_only: of a hub id, use what was fetched before, without a request.
            sha256: SHA-256 that bundle.json must have, as `tokenflow info` prints it. It holds the hashes of all other files,
                so that none can be another than meant. None: any. The paired
                tokenizer is another bundle: to pin it as well, open it with its own and give tokenizer=.

        Raises:
            BundleError, MissingPackageError, ArgumentError: see `tokenflow_sdk.errors`.
            CodebookMismatchError: the tokenizer has another codebook.
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
            cuda_graphs=cuda_graphs,
        )
        hub = HubOptions(revision, token, cache_dir, local_files_only)
        return cls.open(name, options, tokenizer, pages, page_size, hub, sha256)

    @classmethod
    def open(
        cls: type[M],
        name: str | os.PathLike[str],
        options: RuntimeOptions,
        tokenizer: Tokenizer | str | os.PathLike[str] | None = None,
        pages: int | None = None,
        page_size: int = PAGE_SIZE,
        hub: HubOptions | None = None,
        sha256: str | None = None,
    ) -> M:
        """`from_pretrained`, with the runtime options in one object."""
        instance("options", options, RuntimeOptions, "Give RuntimeOptions(...).")
        bundle = Bundle.open(find_bundle(name, cls.config_type.kind, hub), cls.config_type, sha256)
        bundle.verify()
        if options.wanted() == OPENVINO:
            require_by_picture(bundle)  # before its tokenizer is compiled
        paired = paired_tokenizer(bundle, tokenizer, options)
        pages, page_size = _checked_pool(pages, page_size)
        needs = Needs(pages=pages, page_size=page_size)
        if not options.serve_while_building:
            open_session, session_options = choose(bundle, options, needs)
            model = cls(bundle, paired, session_options, pages, page_size, open_session)
        else:
            engines = engines_for(bundle, options, needs)
            # As many pages as the engines will have: what fits now fits after the change.
            model = cls(bundle, paired, options.session, engines.pages, page_size, open_onnxruntime)
            model._swap = EngineSwap(engines.prepare, lambda: model._runner.replace(model._load(engines.open)))
        portable_hub = hub and hub.portable()
        model._arguments = (
            *(bundle.portable_name(name), options.portable(), paired, pages, page_size, portable_hub, bundle.sha256),
        )
        return model

    def __repr__(self) -> str:
        name = type(self).__name__
        if self._unopened is not None:
            return f"{name}(a copy that opens when it is used)"
        c = self.config
        return f"{name}({c.tokenizer_variant}: {self._reach()}, {c.layers} layers of width {c.width}, on {self.device})"

    @abstractmethod
    def _reach(self) -> str:
        """What it draws or reads at once, in words."""

    @abstractmethod
    def _schedule(self, sessions: Mapping[str, Session], transformer: PagedTransformer) -> Scheduler[R]:
        """A scheduler without requests over some sessions."""

    @property
    def config(self) -> C:
        """Sizes of this model."""
        return self.bundle.config

    @property
    def device(self) -> str:
        """Where the transformer runs, e.g. `cpu` or `cuda:0`."""
        return self._runner.model.sessions["transformer"].device

    @property
    def token_forwards(self) -> int:
        """Tokens run through the transformer so far; counted anew after changing over to engines."""
        return self._runner.model.transformer.token_forwards

    @property
    def total_pages(self) -> int:
        """Key/value pages in the pool."""
        return self._runner.model.transformer.pool.pages

    @property
    def free_pages(self) -> int:
        """Pages that no request holds. Prefixes kept for later requests are given up for those that need their pages.

        While requests run, pages may change hands as they are counted, and a few be missed.
        """
        model = self._runner.model
        pool = model.transformer.pool
        return pool.free + pool.held_only_by(model.scheduler.kept())

    def wait_for_engines(self, timeout: float | None = None) -> bool:
        """Whether new requests run on their engines, after at most `timeout` seconds; see `Tokenizer.wait_for_engines`."""
        timeout = seconds("timeout", timeout)
        deadline = None if timeout is None else perf_counter() + timeout
        done = self._swap is None or self._swap.wait(timeout)
        return self.tokenizer.wait_for_engines(None if deadline is None else max(0.0, deadline - perf_counter())) and done

    def close(self) -> None:
        """Free the model, not the tokenizer. Closing twice is fine; anything else afterwards raises ArgumentError."""
        self._closed = True
        if self._unopened is None:
            self._runner.close()

    def __enter__(self: M) -> M:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def _load(self, open_session: OpenSession) -> LoadedModel[R]:
        bundle = self.bundle
        with ExitStack() as opened:
            sessions = {
                name: opened.enter_context(open_session(bundle.graph_path(name), entry, self._options))
                for name, entry in bundle.graphs.items()
            }
            pages = self._pages or bundle.config.default_pages(self._page_size)
            transformer = PagedTransformer.of(bundle.config, sessions["transformer"], pages, self._page_size)
            scheduler = self._schedule(sessions, transformer)
            opened.pop_all()
        return LoadedModel(sessions, transformer, scheduler)


def _checked_pool(pages: object, page_size: object) -> tuple[int | None, int]:
    problem, hint = "makes a pool of pages that hold nothing.", "Give an integer from 1 on."
    return (
        None if pages is None else integer("pages", pages, 1, None, problem, hint),
        integer("page_size", page_size, 1, None, problem, hint),
    )


def paired_tokenizer(
    bundle: Bundle[Any], tokenizer: Tokenizer | str | os.PathLike[str] | None, options: RuntimeOptions
) -> Tokenizer:
    """The tokenizer given, opened if it is a name; None looks where the language model was exported with it.

    Raises:
        BundleNotFoundError: it is not there.
        BundleError: it cannot be used; see `tokenflow_sdk.errors`.
    """
    if isinstance(tokenizer, Tokenizer):
        return tokenizer
    path = bundle.path / bundle.config.tokenizer if tokenizer is None else tokenizer
    try:
        return Tokenizer.open(path, options)
    except BundleNotFoundError as error:
        raise BundleNotFoundError(
            f"The tokenizer of {bundle.path} is not at {path}.",
            f"Give tokenizer=, the path of its {bundle.config.tokenizer_variant} bundle.",
        ) from error


def require_paired(tokenizer: Tokenizer, config: LanguageModelConfig, path: Path) -> None:
    """Check that a tokenizer has the codebook and the scales of the language model at `path`.

    Raises:
        CodebookMismatchError: it has others.
    """
    if tokenizer.config.codebook_sha256 != config.codebook_sha256 or tokenizer.config.patch_nums != config.patch_nums:
        raise CodebookMismatchError(
            f"{path} works with codes of {config.tokenizer_variant} (codebook {config.codebook_sha256[:16]}), not of "
            f"{tokenizer.config.variant} (codebook {tokenizer.config.codebook_sha256[:16]}).",
            "Give tokenizer=, the bundle that the model was exported with, or a model that was exported with this one.",
        )
