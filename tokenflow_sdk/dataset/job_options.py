"""`JobOptions`: what decides about the content of a job's output, beside its inputs and the bundle."""

from __future__ import annotations

from dataclasses import dataclass, replace

from tokenflow_sdk.bundle.bundle import Bundle
from tokenflow_sdk.bundle.model_config import TokenizerConfig
from tokenflow_sdk.dataset.inputs import InputOptions
from tokenflow_sdk.dataset.outputs import Format, Stamp
from tokenflow_sdk.errors import ArgumentError
from tokenflow_sdk.pictures.decode import MAX_PIXELS
from tokenflow_sdk.pictures.preparation import Color, Preparation, Preprocess

__all__ = ["EXTRAS", "JobOptions"]

EXTRAS = ("features", "semantic")
"""What may be stored beside codes."""


@dataclass(frozen=True)
class JobOptions:
    """Options of a job's output.

    Args:
        format: of the output files.
        also: of `EXTRAS`, what is stored beside the codes.
        scales: how many scales of each picture are kept; None: all.
        shard_size, image_column, key_column: see `InputOptions`.
        preprocess, color, fast, max_pixels: see `Tokenizer.encode`.

    Raises:
        ArgumentError: an option that cannot work.
    """

    format: Format = "parquet"
    also: tuple[str, ...] = ()
    scales: int | None = None
    shard_size: int = 10_000
    image_column: str = "image"
    key_column: str | None = None
    preprocess: Preprocess | None = None
    color: Color = "srgb"
    fast: bool = False
    max_pixels: int = MAX_PIXELS

    def __post_init__(self) -> None:
        if unknown := [name for name in self.also if name not in EXTRAS]:
            raise ArgumentError(f"--also {unknown[0]} is nothing that is stored.", f"Choose of: {', '.join(EXTRAS)}.")
        object.__setattr__(self, "also", tuple(name for name in EXTRAS if name in self.also))
        if self.max_pixels < 1:
            raise ArgumentError(f"--max-pixels {self.max_pixels} accepts no picture.", "Give at least 1.")
        _ = self.reading  # checks its own

    @property
    def reading(self) -> InputOptions:
        """How inputs are read."""
        return InputOptions(self.shard_size, self.image_column, self.key_column)

    def complete(self, config: TokenizerConfig) -> JobOptions:
        """These options with what a tokenizer decides where they leave it open.

        Raises:
            ArgumentError: it has no such number of scales.
        """
        most = len(config.patch_nums)
        if self.scales is not None and not 1 <= self.scales <= most:
            raise ArgumentError(f"--scales {self.scales} is no number of scales of {config.variant}.", f"Give 1 to {most}.")
        return replace(self, scales=self.scales or most, preprocess=self.preprocess or config.preprocess)

    def stamp(self, bundle: Bundle[TokenizerConfig]) -> Stamp:
        """What all files of a job with these options say of their codes."""
        c, own = bundle.config, self.complete(bundle.config)
        assert own.scales is not None and own.preprocess is not None
        shapes = {"features": (c.grid**2, c.code_dim), "semantic": (c.grid**2, c.semantic_width)}
        return Stamp(
            bundle_sha256=bundle.sha256,
            variant=c.variant,
            codebook_id=c.codebook_sha256[:16],
            codebook_size=c.codebook_size,
            patch_nums=c.patch_nums,
            scales=own.scales,
            preparation=Preparation(own.preprocess, own.color, own.fast),
            shapes={name: shapes[name] for name in own.also},
        )
