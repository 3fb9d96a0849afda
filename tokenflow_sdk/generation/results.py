"""`Generation` and `GeneratedScale`: what a generator's requests give, and the PNG files that say how they were drawn."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin

from tokenflow_sdk.arguments import file_path, instance
from tokenflow_sdk.errors import ArgumentError
from tokenflow_sdk.files import write_atomic
from tokenflow_sdk.generation.prompt import Prompt
from tokenflow_sdk.model.sampling import SamplingParams
from tokenflow_sdk.pictures.codes import Codes
from tokenflow_sdk.pictures.contact_sheet import contact_sheet
from tokenflow_sdk.tokenizer import Tokenizer

__all__ = ["METADATA_KEY", "GeneratedScale", "Generation", "png"]

METADATA_KEY = "tokenflow"
"""Key of the PNG text chunk that holds, as JSON, how an image was drawn."""
_COLUMNS = 4


@dataclass(frozen=True)
class GeneratedScale:
    """One scale of a request, as `Generator.stream` yields it: its number from 1, and the codes so far of each image.

    Notebooks show its preview.
    """

    scale: int
    codes: tuple[Codes, ...]
    tokenizer: Tokenizer = field(compare=False)

    def __post_init__(self) -> None:
        instance("tokenizer", self.tokenizer, Tokenizer, "Take results from Generator.stream.")

    def preview(self) -> list[Image.Image]:
        """The images so far, decoded now, one for each of the request's images."""
        return self.tokenizer.decode_batch(self.codes)

    def _repr_png_(self) -> bytes:
        return _sheet(self.preview())


@dataclass(frozen=True)
class Generation:
    """A finished request. Notebooks show its images; it can be pickled, and decodes them again where it arrives.

    Args:
        codes: of each image.
        params: passes, guidance and seed.
        timings: seconds from the request's start to the end of each scale.
        tokenizer: decodes the images.
        prompt: its text, or token ids if those were given.
        negative_prompt: likewise; None: the model's own.
        model: of the generator that drew it, the first 16 hex digits of the SHA-256 of its weights.
        prompt_tokens: tokens of the prompt as the model read it.
    """

    codes: tuple[Codes, ...]
    params: SamplingParams
    timings: tuple[float, ...]
    tokenizer: Tokenizer = field(compare=False)
    prompt: Prompt
    negative_prompt: Prompt | None
    model: str
    prompt_tokens: int = 0

    def __post_init__(self) -> None:
        hint = "Take results from Generator.generate."
        instance("tokenizer", self.tokenizer, Tokenizer, hint)
        instance("params", self.params, SamplingParams, hint)

    @property
    def seed(self) -> int:
        """The seed that was used; the same request with this seed gives the same codes."""
        return self.params.seed

    @property
    def images(self) -> list[Image.Image]:
        """The images, decoded when this is first read; the same objects every time."""
        found: list[Image.Image] | None = vars(self).get("_images")
        if found is None:
            # Of threads that decode at once, the first to end gives the images of all: nothing is decoded under a lock.
            found = vars(self).setdefault("_images", self.tokenizer.decode_batch(self.codes))
        return list(found)

    @property
    def metadata(self) -> dict[str, Any]:
        """How the images were drawn, as `save` and `tokenflow generate` write it, ready for JSON: prompts, settings, model."""
        return {
            "prompt": self.prompt,
            "negative_prompt": self.negative_prompt,
            "n": len(self.codes),
            "seed": self.params.seed,
            "cfg_scale": self.params.cfg_scale,
            "unguided_scales": self.params.unguided_scales,
            "passes": [[step.top_k, step.top_p] for step in self.params.passes],
            "model": self.model,
        }

    def save(self, path: str | os.PathLike[str]) -> list[Path]:
        """Write the images as PNG files that say how they were drawn, in a text chunk `tokenflow`; replace what is there.

        `tokenflow generate --replay FILE` draws them again.

        Args:
            path: ends in `.png`. Of several images each gets its number: `apple-1.png`, `apple-2.png`.

        Returns:
            The files.

        Raises:
            ArgumentError: another ending.
            OutputError: a file cannot be written.
        """
        target = Path(file_path("path", path))
        if target.suffix.lower() != ".png":
            hint = "Give a name that ends in .png, or write other formats by images[0].save, without metadata."
            raise ArgumentError(f"{target} is no PNG file.", hint)
        several = len(self.codes) > 1
        paths = [target.with_stem(f"{target.stem}-{i + 1}") if several else target for i in range(len(self.codes))]
        for i, (file, image) in enumerate(zip(paths, self.images, strict=True)):
            write_atomic(file, png(image, {**self.metadata, "image": i}))
        return paths

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_images"}

    def _repr_png_(self) -> bytes:
        return _sheet(self.images)


def png(image: Image.Image, metadata: Mapping[str, Any] | None = None) -> bytes:
    """An image as a PNG file, with the metadata in a text chunk."""
    chunk, buffer = PngImagePlugin.PngInfo(), io.BytesIO()
    if metadata is not None:
        chunk.add_itxt(METADATA_KEY, json.dumps(metadata))
    image.save(buffer, "PNG", pnginfo=chunk)
    return buffer.getvalue()


def _sheet(images: Sequence[Image.Image]) -> bytes:
    """One image as it is, several on a sheet with their numbers."""
    return png(images[0] if len(images) == 1 else contact_sheet([(im, str(i)) for i, im in enumerate(images, 1)], _COLUMNS))
