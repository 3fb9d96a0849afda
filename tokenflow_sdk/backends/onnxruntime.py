"""Run graphs with onnxruntime: on the CPU, or on a GPU with I/O binding where onnxruntime-gpu is installed."""

from __future__ import annotations

import ctypes
import importlib
import logging
import os
import sys
import threading
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from tokenflow_sdk.backends.cores import available_cores, instruction_sets
from tokenflow_sdk.backends.cuda import Cuda, CudaArray, joined
from tokenflow_sdk.backends.cuda_pages import CudaPages
from tokenflow_sdk.backends.providers import CPU, CUDA, TENSORRT, Provider, preload_cuda, require_active, select_providers
from tokenflow_sdk.backends.session import Array, Pages, Session, SessionOptions, Tensor
from tokenflow_sdk.backends.zero_points import refuse_aborting_graph
from tokenflow_sdk.bundle.schema import GraphEntry, TensorSpec
from tokenflow_sdk.errors import ArgumentError, BackendError, CorruptBundleError, MissingPackageError
from tokenflow_sdk.files import reason
from tokenflow_sdk.forking import keep_in_children, no_fork
from tokenflow_sdk.passes.cpu import rewrite_for_cpu

__all__ = ["OnnxRuntimeSession", "import_onnxruntime", "open_onnxruntime"]

_DTYPES = {f"tensor({theirs})": ours for theirs, ours in {"float": "float32", "float16": "float16"}.items()} | {
    f"tensor({name})": name for name in ("uint8", "int32", "int64")
}
_arena_lock = threading.Lock()
_arena_registered = False


def import_onnxruntime() -> Any:
    """onnxruntime, without the telemetry that it has since 1.32 unless `ORT_DISABLE_TELEMETRY` says that it may.

    Telemetry starts threads when onnxruntime is imported, and at its end a forked child would wait for them for ever.

    Raises:
        MissingPackageError: it is not installed.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        return importlib.import_module("onnxruntime")
    except ImportError as error:
        raise MissingPackageError(
            f"onnxruntime is not installed ({error}).",
            "Run `pip install 'tokenflow-sdk[cpu]'`, or 'tokenflow-sdk[gpu]' on a machine with an NVIDIA GPU (never both).",
        ) from None


def _register_shared_arena(ort: Any) -> None:
    """Register one CPU memory arena for all sessions of the process, which grows only by the requested sizes.

    By default every session has an arena, which keeps its peak size: encode and decode of clipb_256 together took 2.85 GB
    instead of 2.08 GB with a shared arena and without memory patterns, at the same speed.
    """
    global _arena_registered
    with no_fork(), _arena_lock:
        if _arena_registered:
            return
        info = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
        try:
            ort.create_and_register_allocator(info, ort.OrtArenaCfg({"arena_extend_strategy": 1}))
        except Exception as error:
            # The application may have registered an arena already, which is then shared.
            if "registered" not in str(error):
                raise
        _arena_registered = True


def _adds_in_32_bits() -> bool:
    """Whether onnxruntime's default kernels add 8-bit products exactly on this processor.

    Without VNNI they add pairs of them in 16 bits, which overflow silently. The setting then chooses exact kernels, which take
    1.7 times as long where there is VNNI. With AVX-512 only the VNNI of AVX-512 counts: onnxruntime prefers those kernels.
    """
    found = set(instruction_sets())
    return "AVX-512 VNNI" in found or ("AVX-VNNI" in found and "AVX-512" not in found)


def _trim_heap() -> None:
    """Return the heap's free memory to the operating system, where the C library has `malloc_trim`.

    While loading, onnxruntime repacks weights and frees the originals, whose memory glibc would keep: 250 MB for the decoder of
    clipb_256.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


class OnnxRuntimeSession(Session):
    """A graph loaded in onnxruntime.

    Args:
        path: the `.onnx` file, with its external data in the same directory.
        entry: the graph's entry in bundle.json.
        options: device, providers, threads.

    Raises:
        MissingPackageError: onnxruntime is not installed.
        ArgumentError: `options` names a provider that onnxruntime does not have.
        BackendError: the graph cannot be loaded, or this version of onnxruntime would abort at it; or the requested device or
            provider does not work.
        CorruptBundleError: the graph's inputs or outputs differ from those in bundle.json.
    """

    def __init__(self, path: Path, entry: GraphEntry, options: SessionOptions) -> None:
        super().__init__(entry.inputs, entry.outputs)
        ort = import_onnxruntime()
        refuse_aborting_graph(path, ort.__version__)
        providers = select_providers(list(ort.get_available_providers()), options)
        if any(name in (CUDA, TENSORRT) for name, _ in providers):
            preload_cuda(ort)
        _register_shared_arena(ort)
        settings = ort.SessionOptions()
        settings.intra_op_num_threads = options.threads or available_cores()
        settings.inter_op_num_threads = 1
        settings.log_severity_level = 3
        # Memory patterns reserve the peak a second time as one block: a third more memory, and not measurably faster.
        settings.enable_mem_pattern = False
        settings.add_session_config_entry("session.use_env_allocators", "1")
        # Spinning threads take time from those of other sessions: two large ones at once ran 15 % slower, one alone no faster.
        # With 50 us of it `tiny` encodes 1.15 times as fast alone, but 0.9 times beside a decode or a generator.
        settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if not _adds_in_32_bits():
            settings.add_session_config_entry("session.x64quantprecision", "1")
        try:
            on_cpu = [name for name, _ in providers] == [CPU]
            rewritten = rewrite_for_cpu(path, settings.intra_op_num_threads) if on_cpu else None
        except OSError as error:
            raise BackendError(f"{path} cannot be read: {reason(error)}.", "Check the file, and free memory.") from error
        if rewritten is not None:
            settings.add_session_config_entry("session.model_external_initializers_file_folder_path", str(rewritten.weights))
        graph = str(path) if rewritten is None else rewritten.graph
        try:
            # The fallback would print a message and run on the CPU instead.
            with no_fork():
                self._session = ort.InferenceSession(graph, settings, providers=providers, enable_fallback=0)
        except Exception as error:
            if not _is_own(error):
                raise
            raise BackendError(
                f"onnxruntime {ort.__version__} cannot load {path.name}: {_first_line(error)}",
                "Check free memory and `tokenflow verify BUNDLE`; an older onnxruntime may not know the graph's operators.",
            ) from error
        keep_in_children(self._session)
        _trim_heap()
        used = self._session.get_providers()
        if options.device == "auto" and options.providers is None and CUDA not in used:
            _warn_if_cuda_inactive(providers)
        else:
            require_active(providers, used)
        gpu = CUDA in used or TENSORRT in used
        self._bound_device = ("cuda", int(options.device.partition(":")[2] or 0)) if gpu else None
        """Device name and number for I/O binding; None on the CPU, which needs none."""
        self._cuda = None if self._bound_device is None else _open_cuda(self._bound_device[1])
        self._check_io(path)

    def _check_io(self, path: Path) -> None:
        for kind, specs, nodes in (
            ("inputs", self.inputs, self._session.get_inputs()),
            ("outputs", self.outputs, self._session.get_outputs()),
        ):
            have = [TensorSpec(n.name, _DTYPES.get(n.type, n.type), tuple(n.shape)) for n in nodes]
            same = len(have) == len(specs) and all(map(_compatible, specs, have))
            if not same:
                raise CorruptBundleError(
                    f"{path.name} has the {kind} {'; '.join(map(str, have))} instead of {'; '.join(map(str, specs))}.",
                    "Export the bundle again with `tokenflow export`.",
                )

    @property
    def device(self) -> str:
        return "cpu" if self._bound_device is None else "{}:{}".format(*self._bound_device)

    def _infer(self, feeds: Mapping[str, Tensor], outputs: tuple[str, ...]) -> Sequence[Array]:
        session = self._open_session()
        try:
            with no_fork():
                if self._bound_device is None:
                    return list(session.run(list(outputs), dict(feeds)))
                return list(self._run_bound(session, feeds, outputs, "cpu").copy_outputs_to_cpu())
        except Exception as error:
            if not _is_own(error):
                raise
            raise _run_error(error) from error

    def _infer_resident(self, feeds: Mapping[str, Tensor], outputs: tuple[str, ...]) -> Sequence[Tensor]:
        if self._cuda is None or self._bound_device is None:
            return self._infer(feeds, outputs)
        session = self._open_session()
        try:
            with no_fork():
                found = self._run_bound(session, feeds, outputs, self._bound_device[0]).get_outputs()
        except Exception as error:
            if not _is_own(error):
                raise
            raise _run_error(error) from error
        specs = {spec.name: np.dtype(spec.dtype) for spec in self.outputs}
        return [
            CudaArray(self._cuda, value.data_ptr(), tuple(value.shape()), specs[name], value)
            for name, value in zip(outputs, found, strict=True)
        ]

    def make_pages(self, shape: tuple[int, int, int, int, int], dtype: np.dtype[Any]) -> Pages:
        return super().make_pages(shape, dtype) if self._cuda is None else CudaPages(self._cuda, shape, dtype)

    def joined(self, parts: Iterable[Tensor], length: int) -> Tensor:
        return super().joined(parts, length) if self._cuda is None else joined(self._cuda, parts, length)

    def _open_session(self) -> Any:
        """The session of onnxruntime; who has it may run it to the end although this is closed meanwhile.

        Raises:
            ArgumentError: this session is closed.
        """
        session = self._session
        if session is None:
            raise ArgumentError("This session is closed.", "Open the bundle again.")
        return session

    def _run_bound(self, session: Any, feeds: Mapping[str, Tensor], outputs: tuple[str, ...], where: str) -> Any:
        """Run with the wanted outputs bound to device `where`, so that no other output is copied, and return the binding."""
        assert self._bound_device is not None
        # onnxruntime copies inputs to the thread's current GPU, and changes it without restoring it.
        with nullcontext() if self._cuda is None else self._cuda.active():
            binding = session.io_binding()
            for name, value in feeds.items():
                if isinstance(value, CudaArray):
                    binding.bind_input(name, *self._bound_device, value.dtype, value.shape, value.pointer)
                else:
                    binding.bind_cpu_input(name, np.ascontiguousarray(value))
            for name in outputs:
                binding.bind_output(name, where, self._bound_device[1] if where != "cpu" else 0)
            session.run_with_iobinding(binding)
            binding.synchronize_outputs()
        return binding

    def close(self) -> None:
        with no_fork():
            self._session = None


def _compatible(want: TensorSpec, have: TensorSpec) -> bool:
    """Whether a graph's tensor has the name, dtype and shape of bundle.json; dynamic dimensions may have other names."""
    return (want.name, want.dtype, len(want.shape)) == (have.name, have.dtype, len(have.shape)) and all(
        not isinstance(theirs, int) if isinstance(ours, str) else ours == theirs
        for ours, theirs in zip(want.shape, have.shape, strict=True)
    )


def _warn_if_cuda_inactive(wanted: list[Provider]) -> None:
    if any(name == CUDA for name, _ in wanted):
        logging.getLogger("tokenflow_sdk").warning(
            "onnxruntime could not start CUDA on the GPU that is here, and runs on the CPU; device='cuda' says why."
        )


def _open_cuda(index: int) -> Cuda | None:
    """Access to the GPU's memory for pages; None without cuda-bindings, where pages are copied to the GPU at every step."""
    try:
        return Cuda(index)
    except MissingPackageError:
        return None
    except BackendError as error:
        logging.getLogger("tokenflow_sdk").warning("Pages cross to the GPU at every step: %s", error)
        return None


def _is_own(error: Exception) -> bool:
    """Whether onnxruntime raised it, and not e.g. a signal handler of the application that ran meanwhile.

    onnxruntime raises classes of its own; its bindings and its Python code also raise the plain built-in classes.
    """
    return type(error) in (RuntimeError, ValueError, TypeError) or type(error).__module__.startswith("onnxruntime")


def _run_error(error: Exception) -> BackendError:
    return BackendError(
        f"onnxruntime failed: {_first_line(error)}",
        "If memory ran out, use smaller batches (batch_limit=1) or fewer graphs at once.",
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__


def open_onnxruntime(path: Path, entry: GraphEntry, options: SessionOptions) -> Session:
    """Load a graph in onnxruntime: the default `OpenSession`. Arguments and errors as for `OnnxRuntimeSession`."""
    return OnnxRuntimeSession(path, entry, options)
