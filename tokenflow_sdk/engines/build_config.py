"""What to build for a device: precision, shapes and memory, from a build config (TOML) and from arguments."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

from tokenflow_sdk.errors import ArgumentError, MissingPackageError
from tokenflow_sdk.files import packaged_data
from tokenflow_sdk.passes.quantize import EightBit

__all__ = ["ONNXRUNTIME", "BuildConfig", "Precision", "build_config_names"]

Precision = Literal["fp32", "fp16", "bf16"]
ONNXRUNTIME = "onnxruntime"
"""The backend of build configs for CPUs."""


@dataclass(frozen=True)
class BuildConfig:
    """How engines are built.

    Args:
        backend: `tensorrt` or `tensorrt-rtx`; `onnxruntime` for a CPU, where nothing is built.
        targets: GPU architectures (sm89) to build for; empty: the GPU that is there.
        precision: of convolutions and products; see `tokenflow_sdk.passes.half_precision` for what stays in float32.
        decoder: 8 bits for a tokenizer's decoder, `int8` or `fp8`; needs what `tokenflow export calibrate` measures. None: as
            `precision` says.
        batch: least (1), usual and most pictures in a call, or answers that an understander gives at once.
        pages: of a language model's key/value pool; 0 holds eight pictures, or eight questions about pictures.
        workspace_gb: scratch memory an engine may use; 0: no limit.

    Raises:
        ArgumentError: a value that cannot work.
    """

    backend: str = "tensorrt-rtx"
    targets: tuple[str, ...] = ()
    precision: Precision = "fp16"
    decoder: EightBit | None = None
    batch: tuple[int, int, int] = (1, 1, 8)
    pages: int = 0
    workspace_gb: float = 0

    def __post_init__(self) -> None:
        if self.backend == ONNXRUNTIME and (self.precision, self.decoder, self.targets) != ("fp32", None, ()):
            raise ArgumentError(
                "onnxruntime runs a bundle's graphs as they are, without a precision, 8 bits or targets of its own.",
                "Leave them out, or choose --backend tensorrt or tensorrt-rtx; an export's --weights int8 is for CPUs.",
            )
        if self.precision not in get_args(Precision):
            raise ArgumentError(
                f"There is no precision {self.precision!r}.", f"Choose one of: {', '.join(get_args(Precision))}."
            )
        if self.decoder is not None and self.decoder not in get_args(EightBit):
            raise ArgumentError(
                f"There is no decoder in {self.decoder!r}.", f"Choose one of: {', '.join(get_args(EightBit))}; or leave it out."
            )
        ascending = (
            len(self.batch) == 3 and all(type(size) is int for size in self.batch) and list(self.batch) == sorted(self.batch)
        )
        if not ascending or self.batch[0] != 1:
            raise ArgumentError(
                f"batch={self.batch!r} is not the least, usual and most pictures in a call, from one on: what is left over of "
                "many pictures, and the comparison before first use, go alone.",
                "Write it as --batch 1,8,32.",
            )
        if self.pages < 0 or self.workspace_gb < 0:
            raise ArgumentError(f"pages={self.pages}, workspace_gb={self.workspace_gb} cannot be negative.", "Give 0 or more.")

    @classmethod
    def from_file(cls, name: str) -> BuildConfig:
        """Read a build config by its name (`build_config_names`) or path.

        Raises:
            ArgumentError: there is none, or it says something unknown.
        """
        path = next((path for path in (Path(name), packaged_data("engines/configs") / f"{name}.toml") if path.is_file()), None)
        if path is None:
            raise ArgumentError(
                f"There is no build config {name!r}.", f"Give a path, or one of: {', '.join(build_config_names())}."
            )
        values = _read_toml(path)
        unknown = sorted(set(values) - {field.name for field in fields(cls)} - {"about"})
        if unknown:
            raise ArgumentError(f"{path} says {unknown[0]!r}, which is no setting of a build config.", "Remove it.")
        values.pop("about", None)
        settings: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
        try:
            return cls(**settings)
        except TypeError as error:
            raise ArgumentError(
                f"{path} has a value of the wrong kind: {error}.", "Compare it with the build configs beside it."
            ) from error

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> BuildConfig | None:
        """What `to_json` gave, or None where it was given by another version and cannot be read."""
        values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in data.items()}
        try:
            return cls(**values)
        except (TypeError, ArgumentError):
            return None

    def to_json(self) -> dict[str, Any]:
        """Everything but the targets: an engine is for one, and its key says which."""
        values = asdict(replace(self, targets=()))
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}

    def supports(self, batch: int, pages: int | None) -> bool:
        """Whether its engines take so many pictures in a call, and have so many pages (None: any)."""
        return batch <= self.batch[2] and pages in (None, self.pages)

    def command(self, bundle: Path) -> str:
        """What builds a bundle's engines by this build config."""
        words = [f"tokenflow build {bundle} --backend {self.backend}"]
        if self.precision != BuildConfig.precision:
            words.append(f"--precision {self.precision}")
        if self.decoder is not None:
            words.append(f"--decoder {self.decoder}")
        if self.batch != BuildConfig.batch:
            words.append(f"--batch {','.join(map(str, self.batch))}")
        if self.pages:
            words.append(f"--pages {self.pages}")
        if self.workspace_gb:
            words.append(f"--workspace-gb {self.workspace_gb:g}")
        return " ".join(words)

    def with_overrides(self, **values: Any) -> BuildConfig:
        """This build_config with what is not None in `values`."""
        return replace(self, **{key: value for key, value in values.items() if value is not None})


def build_config_names() -> list[str]:
    """Build configs that come with the SDK."""
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
        data: Mapping[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArgumentError(
            f"{path} cannot be read as TOML: {error}.", "Compare it with the build configs beside it."
        ) from error
    return dict(data)
