"""Build configs: precision, batch sizes and memory of a bundle's engines, given in Python, by TOML file or by name."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

from tokenflow_sdk.arguments import file_path, instance, integer, real, shown
from tokenflow_sdk.backends.openvino import OPENVINO
from tokenflow_sdk.backends.tensorrt_module import FLAVOURS
from tokenflow_sdk.errors import ArgumentError, MissingPackageError
from tokenflow_sdk.files import is_regular, packaged_data, read_regular
from tokenflow_sdk.passes.quantize import DecoderType

__all__ = ["ONNXRUNTIME", "BuildConfig", "Precision", "build_config_names"]

Precision = Literal["fp32", "fp16", "bf16"]
ONNXRUNTIME = "onnxruntime"
"""The `backend` of build configs with which nothing is built."""
_MOST_BYTES = 2**20


@dataclass(frozen=True)
class BuildConfig:
    """How a bundle's engines are built, for TensorRT or, of a tokenizer, for OpenVINO on a CPU.

    Args:
        backend: `tensorrt` or `tensorrt-rtx`; `openvino` for a CPU in fewer bits; `onnxruntime` for a CPU, for which no engines
            are built.
        targets: GPU architectures that each engine is for, e.g. `("sm86", "sm89")`; empty: the GPU in this machine.
        precision: of convolutions and matrix products; see `tokenflow_sdk.passes.half_precision` for what stays in float32.
            OpenVINO has `fp32` and `bf16`.
        decoder: type of the convolutions of a tokenizer's decoder: `int8` or `fp8`, for a bundle that was calibrated
            (`tokenflow export calibrate`); or `bf16`, for OpenVINO beside `fp32`: codes stay exact. What OpenVINO
            does not compute in `int8` of a decoder is in bfloat16 where the processor has it. None: `precision` holds for
            the decoder too.
        batch: least (always 1), usual and largest number of images in a call, or of questions an understander answers at once.
        pages: size of a language model's key/value pool; 0: room for eight images, or for eight questions about images.
        workspace_gb: scratch memory an engine may use, in GiB; 0: no limit.
        memory_gb: memory of the GPU in GB (10**9 bytes), which the engines must fit; 0: that of the GPU in this machine, or not
            checked if `targets` are named. It has no part in what is built.

    Raises:
        ArgumentError: a value is invalid.
    """

    backend: str = "tensorrt-rtx"
    targets: tuple[str, ...] = ()
    precision: Precision = "fp16"
    decoder: DecoderType | None = None
    batch: tuple[int, int, int] = (1, 1, 8)
    pages: int = 0
    workspace_gb: float = 0
    memory_gb: float = 0

    def __post_init__(self) -> None:
        self._take_types()
        if self.backend not in (ONNXRUNTIME, OPENVINO, *FLAVOURS):
            names = ", ".join((ONNXRUNTIME, OPENVINO, *FLAVOURS))
            raise ArgumentError(f"There is no backend {self.backend!r}.", f"Choose one of: {names}.")
        for target in self.targets:
            if not target.isalnum():
                raise ArgumentError(f"There is no GPU architecture {shown(target)}.", "Give names such as sm86 and sm89.")
        if self.backend == ONNXRUNTIME and (self.precision, self.decoder, self.targets) != ("fp32", None, ()):
            raise ArgumentError(
                "onnxruntime runs a bundle's graphs as they are, without a precision, a decoder or targets of its own.",
                "Leave them out, or choose another --backend; for a language model on a CPU, export with --weights int8.",
            )
        if self.precision not in get_args(Precision):
            raise ArgumentError(
                f"There is no precision {self.precision!r}.", f"Choose one of: {', '.join(get_args(Precision))}."
            )
        if self.decoder is not None and self.decoder not in get_args(DecoderType):
            raise ArgumentError(
                f"There is no decoder in {self.decoder!r}.",
                f"Choose one of: {', '.join(get_args(DecoderType))}; or leave it out.",
            )
        if self.backend == OPENVINO:
            self._require_for_cpus()
        elif self.decoder == "bf16":
            raise ArgumentError(
                f"Engines of {self.backend} have one precision beside 8 bits, and a decoder in bf16 is for OpenVINO.",
                "Give --config cpu-bf16-decoder; for TensorRT give --precision bf16, and leave --decoder out.",
            )
        if len(self.batch) != 3 or not 1 == self.batch[0] <= self.batch[1] <= self.batch[2] < 2**31:
            raise ArgumentError(
                f"batch={shown(self.batch)} is not the least, usual and most images in a call, from one on: the last call of "
                "several, and the comparison with the reference, may have one image only.",
                "Write it as batch=(1, 8, 32).",
            )

    def _require_for_cpus(self) -> None:
        """Raise ArgumentError for what a CPU has not."""
        if self.precision == "fp16":
            raise ArgumentError("OpenVINO computes in fp32 or bf16 on a CPU, not in fp16.", "Give --precision fp32 or bf16.")
        if self.decoder == self.precision:
            raise ArgumentError(
                f"The decoder is in {self.precision} as all else is.", "Leave --decoder out, or give --precision fp32."
            )
        if self.decoder == "fp8":
            raise ArgumentError("No CPU computes convolutions in fp8.", "Give --decoder int8, or leave it out.")
        if self.targets:
            raise ArgumentError("OpenVINO compiles for the processor of this machine.", "Leave out targets or --target.")

    def _take_types(self) -> None:
        """Make each value one of its type, or say that it is none."""
        several = "Give a list."
        batch = instance("batch", self.batch, (list, tuple), "Give three integers: the least, usual and most images in a call.")
        hint = "Give 0 or more."
        values = {
            "backend": instance("backend", self.backend, str, "Give a name."),
            "targets": tuple(
                _architecture(instance("targets", each, str, several))
                for each in instance("targets", self.targets, (list, tuple), several)
            ),
            "precision": instance("precision", self.precision, str, "Give a name."),
            "decoder": instance("decoder", self.decoder, (str, type(None)), "Give a name, or None."),
            "batch": tuple(integer("batch", size, 0, None, "is no number of images.", "Give 1 or more.") for size in batch),
            "pages": integer("pages", self.pages, 0, 2**31 - 1, "is no number of pages.", hint),
        }
        # Left as it is, because engines' keys hold it as it is written.
        real("workspace_gb", self.workspace_gb, 0, 2**20, "is no number of GiB.", hint)
        real("memory_gb", self.memory_gb, 0, 2**20, "is no number of GB.", hint)
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @classmethod
    def from_file(cls, name: str | os.PathLike[str]) -> BuildConfig:
        """Read a build config from a TOML file.

        Args:
            name: the file's path, or the name of a build config that comes with the SDK (see `build_config_names`).

        Raises:
            ArgumentError: there is no such build config, or it has an unknown setting or an invalid value.
            MissingPackageError: Python is older than 3.11 and tomli is not installed.
        """
        places = (Path(file_path("name", name)), packaged_data("engines/configs") / f"{name}.toml")
        path = next((path for path in places if is_regular(path)), None)
        if path is None:
            raise ArgumentError(
                f"There is no build config {os.fspath(name)!r}.", f"Give a path, or one of: {', '.join(build_config_names())}."
            )
        values = _read_toml(path)
        unknown = sorted(set(values) - {field.name for field in fields(cls)} - {"about"})
        if unknown:
            raise ArgumentError(f"{path} says {unknown[0]!r}, which is no setting of a build config.", "Remove it.")
        values.pop("about", None)
        settings: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
        return cls(**settings)

    @classmethod
    def from_json(cls, data: object) -> BuildConfig | None:
        """The inverse of `to_json`; None if another version of the SDK wrote `data` and this one cannot read it."""
        if not isinstance(data, Mapping):
            return None
        values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in data.items()}
        try:
            return cls(**values)
        except (TypeError, ArgumentError):
            return None

    def to_json(self) -> dict[str, Any]:
        """The settings that engines depend on, for storage beside one; an engine's key names its targets."""
        values = asdict(replace(self, targets=(), memory_gb=0))
        del values["memory_gb"]
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}

    def supports(self, batch: int, pages: int | None) -> bool:
        """Whether engines built by this config take `batch` images in a call and have a pool of `pages` pages (None: any)."""
        least = "Give 1 or more."
        fits = integer("batch", batch, 0, None, "is no number of images.", least) <= self.batch[2]
        return fits and (pages is None or integer("pages", pages, 0, None, "is no size of a pool.", least) == self.pages)

    def command(self, bundle: Path) -> str:
        """The `tokenflow build` command that builds the engines of the bundle at this path by this build config."""
        words = [f"tokenflow build {bundle} --backend {self.backend}"]
        if self.precision != BuildConfig.precision:
            words.append(f"--precision {self.precision}")
        if self.decoder is not None:
            words.append(f"--decoder {self.decoder}")
        if self.backend == OPENVINO:  # the others are for GPUs
            return " ".join(words)
        if self.batch[2] != BuildConfig.batch[2]:
            words.append(f"--batch-limit {self.batch[2]}")
        if self.batch[1] != BuildConfig.batch[1]:
            words.append(f"--batch-usual {self.batch[1]}")
        if self.pages:
            words.append(f"--pages {self.pages}")
        if self.workspace_gb:
            words.append(f"--workspace-gb {self.workspace_gb:g}")
        return " ".join(words)

    def with_overrides(self, **values: Any) -> BuildConfig:
        """A copy with the settings in `values` replaced, except those that are None."""
        return replace(self, **{key: value for key, value in values.items() if value is not None})


def _architecture(target: str) -> str:
    """The usual name of a GPU architecture, `sm89`, of which `sm_89`, `SM89` and `8.9` are other ways to write it."""
    found = re.fullmatch(r"(?:sm_?)?(\d+)\.?(\d)", target.strip().lower())
    return f"sm{found[1]}{found[2]}" if found is not None else target


def build_config_names() -> list[str]:
    """Names of the build configs that come with the SDK, sorted."""
    return sorted(path.stem for path in packaged_data("engines/configs").glob("*.toml"))


def _read_toml(path: Path) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        try:
            import tomli as tomllib
        except ImportError as error:
            raise MissingPackageError(
                "Build configs need tomli on Python 3.10.", "Run `pip install 'tokenflow-sdk[build]'`."
            ) from error
    try:
        data: Mapping[str, Any] = tomllib.loads(read_regular(path, _MOST_BYTES).decode())
    except (OSError, ValueError, RecursionError) as error:
        raise ArgumentError(
            f"{path} cannot be read as TOML: {error}.", "Compare it with the build configs beside it."
        ) from error
    return dict(data)
