"""Runtime options: the keyword arguments that the `from_pretrained` of tokenizers and language models share, in one object."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

from tokenflow_sdk.arguments import flag, instance, integer, shown
from tokenflow_sdk.backends.openvino import OPENVINO
from tokenflow_sdk.backends.session import SessionOptions
from tokenflow_sdk.backends.tensorrt_module import FLAVOURS
from tokenflow_sdk.engines.build_config import ONNXRUNTIME, BuildConfig
from tokenflow_sdk.errors import ArgumentError

__all__ = ["BACKENDS", "RuntimeOptions"]

BACKENDS = ("auto", ONNXRUNTIME, OPENVINO, *FLAVOURS)
_FOR_CPUS = (ONNXRUNTIME, OPENVINO)


@dataclass(frozen=True)
class RuntimeOptions:
    """Which backend runs a bundle, and how.

    Args:
        device: `auto` (CUDA if it works, else the CPU), `cpu`, `cuda` or `cuda:N`; with OpenVINO `auto` (the CPU), `cpu`, or
            Intel's `gpu`, `gpu:N` or `npu`.
        providers: onnxruntime execution providers by name, overriding `device`.
        threads: CPU threads of one call; None: all cores that this process may use.
        backend: `auto`, `onnxruntime`, `openvino` (tokenizers only), `tensorrt` or `tensorrt-rtx`. `auto` never builds engines;
            it takes the first of these that works on this machine: TensorRT with engines in the cache that did not fail
            certification, onnxruntime with CUDA, OpenVINO for the graphs that `tokenflow bench --choose` measured to be faster
            on it here, onnxruntime on the CPU.
        build_config: how engines are built: a `BuildConfig`, the name of one that comes with the SDK, or the path of a TOML
            file. One for OpenVINO (`cpu-bf16`) runs a tokenizer in fewer bits on a CPU. None: use cached TensorRT engines if
            any fit, else build by `BuildConfig()`. Where `auto` finds that none run, a warning says that it is not used.
        build: whether missing TensorRT engines are built, and a tokenizer in fewer bits on OpenVINO is compiled and compared;
            False raises an error instead.
        serve_while_building: run on onnxruntime until the TensorRT engines are built and certified.
        execution_contexts: calls of one graph that may run on a GPU at once.
        cuda_graphs: launch a call as a CUDA graph where its shapes were seen before; saves launch time of short calls.

    Raises:
        ArgumentError: there is no such device or backend, or options contradict each other.
    """

    device: str = "auto"
    providers: Sequence[str] | None = None
    threads: int | None = None
    backend: str = "auto"
    build_config: BuildConfig | str | None = None
    build: bool = True
    serve_while_building: bool = False
    execution_contexts: int = 1
    cuda_graphs: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.providers, str):
            raise ArgumentError(f"providers={self.providers!r} is one name.", f"Give a list: providers=[{self.providers!r}].")
        if self.providers is not None:
            several = "Give a list of names."
            names = instance("providers", self.providers, (list, tuple), several)
            object.__setattr__(self, "providers", tuple(instance("providers", name, str, several) for name in names))
        for name in ("build", "serve_while_building", "cuda_graphs"):
            object.__setattr__(self, name, flag(name, getattr(self, name)))
        given: object = self.build_config
        if isinstance(given, os.PathLike):
            object.__setattr__(self, "build_config", os.fspath(given))
        hint = "Give a BuildConfig, a name or a path."
        instance("build_config", self.build_config, (BuildConfig, str, type(None)), hint)
        # SessionOptions checks device and threads.
        _ = self.session
        if not isinstance(self.backend, str) or self.backend not in BACKENDS:
            raise ArgumentError(f"There is no backend {shown(self.backend)}.", f"Choose one of: {', '.join(BACKENDS)}.")
        self._require_openvino_fits()
        contexts = integer("execution_contexts", self.execution_contexts, 1, None, "runs nothing.", "Give at least 1.")
        object.__setattr__(self, "execution_contexts", contexts)
        if self.serve_while_building and (self.backend not in FLAVOURS or not self.build):
            raise ArgumentError(
                "serve_while_building=True builds TensorRT engines.",
                "Give backend='tensorrt' or 'tensorrt-rtx', and build=True.",
            )

    def _require_openvino_fits(self) -> None:
        """Raise ArgumentError for a device or option that only OpenVINO has, or has not."""
        if self.backend != OPENVINO:
            if self.device.startswith(("gpu", "npu")):
                raise ArgumentError(
                    f"device={self.device!r} is Intel's, on which backend={self.backend!r} does not run.",
                    "Give backend='openvino'; an NVIDIA GPU is device='cuda'.",
                )
            return
        if self.device.startswith("cuda"):
            raise ArgumentError(
                f"device={self.device!r} is an NVIDIA GPU, and OpenVINO runs on the CPU or Intel's GPU or NPU.",
                "Leave backend= or device= out.",
            )
        if self.providers is not None:
            raise ArgumentError("providers= is not for backend='openvino'.", "Leave providers= or backend= out.")

    @property
    def session(self) -> SessionOptions:
        """The options of one session."""
        return SessionOptions(self.device, None if self.providers is None else tuple(self.providers), self.threads)

    @property
    def device_index(self) -> int:
        """CUDA index of the GPU in `device`; 0 if it names none."""
        return int(self.device.partition(":")[2] or 0)

    def loaded_build_config(self) -> BuildConfig | None:
        """The build config, read from its file if it was given by name or path; None if none was given.

        Raises:
            ArgumentError, MissingPackageError: see `BuildConfig.from_file`.
        """
        return BuildConfig.from_file(self.build_config) if isinstance(self.build_config, str) else self.build_config

    def portable(self) -> RuntimeOptions:
        """The options with the build config itself instead of its name or path, for other processes. Raises as above."""
        return replace(self, build_config=self.loaded_build_config())

    def for_language_models(self) -> RuntimeOptions:
        """The options for language models beside a tokenizer with these: onnxruntime on the CPU in OpenVINO's place.

        OpenVINO runs tokenizers only.

        Raises:
            ArgumentError: as `wanted`.
        """
        return replace(self, backend=ONNXRUNTIME, build_config=None, device="cpu") if self.wanted() == OPENVINO else self

    def wanted(self) -> str:
        """The backend that the options ask for: that of the build config where it is for CPUs, else `backend`.

        Raises:
            ArgumentError: the build config is for another backend than the options leave, or cannot be read.
        """
        config = self.loaded_build_config()
        if config is None:
            return self.backend
        if config.backend in _FOR_CPUS:
            if self.backend not in ("auto", config.backend):
                raise ArgumentError(
                    f"The build config is for {config.backend}, not for {self.backend}.", "Leave backend= or build_config= out."
                )
            given = (("providers=", self.providers is not None), ("device=", self.device not in ("auto", "cpu")))
            other = next((option for option, is_given in given if is_given), None)
            if config.backend == OPENVINO and other is not None:
                raise ArgumentError(
                    f"The build config is for OpenVINO on a CPU, and {other} names something else.",
                    f"Leave build_config= or {other} out.",
                )
            return config.backend
        without_engines = (
            (f"backend={self.backend!r}", self.backend in _FOR_CPUS),
            ("providers=", self.backend == "auto" and self.providers is not None),
            ("device='cpu'", self.backend == "auto" and self.device == "cpu"),
        )
        other = next((option for option, is_given in without_engines if is_given), None)
        if other is not None:
            raise ArgumentError(
                f"The build config is for TensorRT engines, and with {other} none run.", f"Leave build_config= or {other} out."
            )
        return self.backend
