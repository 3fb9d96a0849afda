"""encode, decode, reconstruct."""

from __future__ import annotations

import argparse
import io
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from rich.progress import Progress

from tokenflow_sdk.cli.opening import each_file, open_tokenizer, output_paths, stderr, stdout
from tokenflow_sdk.errors import ArgumentError, TokenFlowError
from tokenflow_sdk.files import write_atomic
from tokenflow_sdk.pictures.codes import Codes
from tokenflow_sdk.pictures.contact_sheet import contact_sheet
from tokenflow_sdk.pictures.images import pictures_in, psnr

__all__ = ["decode", "encode", "reconstruct"]


def encode(arguments: argparse.Namespace) -> int:
    """Pictures to .tfc files."""
    images = _pictures(arguments.images)
    outputs = dict(zip(images, output_paths(images, arguments.output, ".tfc"), strict=True))
    with open_tokenizer(arguments, "encode") as tokenizer:

        def work(paths: Sequence[Path]) -> Iterator[str | TokenFlowError]:
            arrays = {}
            for path in paths:
                try:
                    arrays[path] = tokenizer.preprocess(path, preprocess=arguments.preprocess, fast=arguments.fast)
                except TokenFlowError as error:
                    yield error
            found = tokenizer.encode_array(np.stack(list(arrays.values()))) if arrays else ()
            for path, row in zip(arrays, found, strict=True):
                codes, output = tokenizer.codes(row), outputs[path]
                try:
                    codes.save(output)
                    yield f"{path} -> {output}  {len(codes)} codes, {output.stat().st_size:,} bytes"
                except TokenFlowError as error:
                    yield error

        return each_file(images, work, "encoding", arguments.batch_limit)


def decode(arguments: argparse.Namespace) -> int:
    """`.tfc` files to PNG pictures."""
    outputs = dict(zip(arguments.files, output_paths(arguments.files, arguments.output, ".png"), strict=True))
    with open_tokenizer(arguments, "decode") as tokenizer:

        def work(paths: Sequence[Path]) -> Iterator[str | TokenFlowError]:
            for path in paths:
                try:
                    codes = Codes.load(path)
                    if arguments.scales is not None:
                        codes = codes.truncate(arguments.scales)
                    _save_picture(tokenizer.decode(codes), outputs[path])
                    yield f"{path} -> {outputs[path]}  {codes.n_scales} of {len(codes.patch_nums)} scales"
                except TokenFlowError as error:
                    yield error

        return each_file(arguments.files, work, "decoding")


def reconstruct(arguments: argparse.Namespace) -> int:
    """One picture through the codes and back, with what each scale adds."""
    output = arguments.output or Path("side_by_side.png")
    with open_tokenizer(arguments) as tokenizer:
        original = tokenizer.preprocess(arguments.image, preprocess=arguments.preprocess, fast=arguments.fast)
        with Progress(console=stderr, transient=True, disable=not stderr.is_terminal) as progress:
            task = progress.add_task("encoding", total=1 + len(tokenizer.config.patch_nums))
            codes = tokenizer.codes(tokenizer.encode_array(original[None])[0])
            progress.update(task, advance=1, description="decoding")
            tiles = [(Image.fromarray(original), f"original, {original.shape[1]} px\n{_file_size(arguments.image)}")]
            for n in range(1, codes.n_scales + 1):
                prefix = codes.truncate(n)
                picture = tokenizer.decode(prefix)
                quality = psnr(original, np.asarray(picture))
                side = codes.patch_nums[n - 1]
                what = "final" if n == codes.n_scales else f"up to {side} x {side}"
                tiles.append((picture, f"{what}, {len(prefix)} codes\n{codes.scale_ends[n - 1]:,} bytes, {quality:.2f} dB"))
                progress.advance(task)
    columns = -(-len(tiles) // 2) if len(tiles) > 6 else len(tiles)
    _save_picture(contact_sheet(tiles, columns), output)
    stdout.print(f"{arguments.image} -> {output}  PSNR {quality:.2f} dB, {len(codes)} codes", markup=False, soft_wrap=True)
    return 0


def _pictures(paths: Sequence[Path]) -> list[Path]:
    """The paths, with directories replaced by the pictures in them."""
    found: list[Path] = []
    for path in paths:
        found += pictures_in(path) if path.is_dir() else [path]
    repeated = next((path for i, path in enumerate(found) if path in found[:i]), None)
    if repeated is not None:
        raise ArgumentError(f"{repeated} was given twice.", "Give each picture once.")
    return found


def _save_picture(picture: Image.Image, output: Path) -> None:
    Image.init()
    picture_format = Image.EXTENSION.get(output.suffix.lower())
    if picture_format not in Image.SAVE:
        raise ArgumentError(f"{output} has no ending of a picture format.", "Use .png, .jpg or .webp.")
    buffer = io.BytesIO()
    picture.save(buffer, picture_format)
    write_atomic(output, buffer.getvalue())


def _file_size(path: Path) -> str:
    return f"{path.stat().st_size:,} bytes as {path.suffix.lstrip('.').upper() or 'a file'}"
