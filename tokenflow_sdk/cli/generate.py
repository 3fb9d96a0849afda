"""`tokenflow generate`: draws images from text."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from time import perf_counter
from typing import Any

from PIL import Image

from tokenflow_sdk.bundle.bundle import Bundle
from tokenflow_sdk.bundle.model_config import GeneratorConfig
from tokenflow_sdk.cli.console import stdout
from tokenflow_sdk.cli.opening import open_generator
from tokenflow_sdk.cli.outputs import check_outputs, make_directory, output_file, save_image
from tokenflow_sdk.cli.progress import progress_bar
from tokenflow_sdk.errors import ArgumentError, CodebookMismatchError, ImageReadError
from tokenflow_sdk.files import write_atomic
from tokenflow_sdk.generation.generator import Generator, model_id
from tokenflow_sdk.generation.results import METADATA_KEY, GeneratedScale, Generation, png
from tokenflow_sdk.model.sampling import Pass, SamplingParams, random_seed
from tokenflow_sdk.pictures.contact_sheet import contact_sheet

__all__ = ["generate"]


def generate(arguments: argparse.Namespace) -> int:
    """Draw images from a prompt, or again from a PNG's metadata; write them as PNG files."""
    output = Path() if arguments.output is None else arguments.output.path
    if arguments.output is not None and output_file(arguments.output, codes=False) is not None:
        raise ArgumentError(f"Pictures are drawn into a directory, and {output} is not one.", "Give -o a directory: -o drawn.")
    if arguments.replay is not None:
        _refuse_besides_replay(arguments)
        metadata = read_metadata(arguments.replay)
        arguments.prompt, arguments.n = metadata["prompt"], metadata["n"]
        params, negative = _params_of(metadata), metadata["negative_prompt"]
    else:
        metadata, negative = None, arguments.negative_prompt
        arguments.n = 1 if arguments.n is None else arguments.n
        if arguments.prompt is None:
            raise ArgumentError("No prompt was given.", 'Write it in quotes: tokenflow generate "a red apple on a table".')
        # Checks the options before the model is loaded; the model's own defaults are filled in below.
        seed = random_seed() if arguments.seed is None else arguments.seed
        params = SamplingParams.preset(arguments.preset or "paper", arguments.cfg_scale or 0.0, seed)
    names = [f"{i + 1}.png" for i in range(arguments.n)] + ["scales.png"] * arguments.progressive
    inputs = [] if arguments.replay is None else [arguments.replay]
    check_outputs(inputs, (output / name for name in names), codes=False, force=arguments.force)
    make_directory(output)
    with open_generator(arguments) as generator:
        if metadata is None:
            own = generator.config
            guidance = own.cfg_scale if arguments.cfg_scale is None else arguments.cfg_scale
            params = SamplingParams.preset(arguments.preset or own.preset, guidance, params.seed)
        _require_same_model(metadata, generator.bundle)
        began = perf_counter()
        steps, generation = _draw(generator, arguments.prompt, arguments.n, negative, params)
        seconds = perf_counter() - began
        _save(steps, generation, output, arguments.progressive)
    rate = f"{seconds / arguments.n:.2f} s a picture"
    stdout.note(f"{arguments.n} drawn in {seconds:.2f} s ({rate}), seed {params.seed}")
    return 0


def _refuse_besides_replay(arguments: argparse.Namespace) -> None:
    for name in ("prompt", "negative_prompt", "n", "seed", "preset", "cfg_scale"):
        if getattr(arguments, name) is not None:
            shown = {"prompt": "PROMPT", "n": "-n"}.get(name, "--" + name.replace("_", "-"))
            raise ArgumentError(f"--replay draws what its file says, and {shown} was given too.", f"Leave {shown} out.")


def _draw(
    generator: Generator, prompt: str, n: int, negative: str | None, params: SamplingParams
) -> tuple[list[GeneratedScale], Generation]:
    with progress_bar("drawing, scale by scale", len(generator.config.patch_nums), brief=True) as done:
        steps = []
        stream = generator.stream(prompt, n=n, negative_prompt=negative, params=params)
        for step in stream:
            steps.append(step)
            done(step.scale)
    return steps, stream.result()


def _save(steps: list[GeneratedScale], generation: Generation, output: Path, progressive: bool) -> None:
    for i, image in enumerate(generation.images):
        path = output / f"{i + 1}.png"
        write_atomic(path, png(image, {**generation.metadata, "image": i}))
        stdout.note(str(path), soft_wrap=True)
    if progressive:
        sides, previews = steps[-1].codes[0].patch_nums, [step.preview() for step in steps]
        tiles = [
            (images[i], f"up to {side} x {side}")
            for i in range(len(steps[0].codes))
            for side, images in zip(sides, previews, strict=True)
        ]
        save_image(contact_sheet(tiles, len(sides)), output / "scales.png")
        stdout.note(str(output / "scales.png"), soft_wrap=True)


def read_metadata(path: Path) -> dict[str, Any]:
    """Read the metadata that `tokenflow generate` wrote into a PNG.

    Returns:
        prompt, negative_prompt, n, seed, cfg_scale, unguided_scales and passes as given; model: see `model_id`; image: index
        among the n.

    Raises:
        ImageReadError: the file cannot be read, or has no such metadata.
    """
    try:
        with Image.open(path) as image:
            text = getattr(image, "text", {}).get(METADATA_KEY)
        metadata = json.loads(text) if text else None
    except (OSError, ValueError, SyntaxError) as error:
        why = getattr(error, "strerror", None) or error
        raise ImageReadError(f"{path} cannot be read: {why}.", "Give a PNG made by `tokenflow generate`.") from error
    keys = {"prompt", "negative_prompt", "n", "seed", "cfg_scale", "unguided_scales", "passes", "model", "image"}
    if isinstance(metadata, dict):
        metadata.setdefault("unguided_scales", 0)  # which early files do not have
    if not isinstance(metadata, dict) or set(metadata) != keys or type(metadata["n"]) is not int:
        raise ImageReadError(f"{path} does not say how it was made.", "Give a PNG made by `tokenflow generate`.")
    return metadata


def _params_of(metadata: Mapping[str, Any]) -> SamplingParams:
    try:
        passes = tuple(Pass(top_k, top_p) for top_k, top_p in metadata["passes"])
        return SamplingParams(passes, metadata["cfg_scale"], metadata["seed"], metadata["unguided_scales"])
    except (TypeError, ValueError) as error:
        raise ArgumentError(
            f"The metadata in the PNG is damaged: {error}.", "Give a PNG made by `tokenflow generate`."
        ) from error


def _require_same_model(metadata: Mapping[str, Any] | None, bundle: Bundle[GeneratorConfig]) -> None:
    if metadata is not None and metadata["model"] != model_id(bundle):
        raise CodebookMismatchError(
            f"The picture was drawn by another model ({metadata['model']}) than {bundle.path} ({model_id(bundle)}).",
            "Give --bundle the generator that drew it.",
        )
