"""`tokenflow reconstruct`: an image beside its reconstructions from one scale, two scales and so on."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from tokenflow_sdk.cli.console import stderr, stdout
from tokenflow_sdk.cli.opening import open_tokenizer
from tokenflow_sdk.cli.outputs import STDIO, check_outputs, image_format, output_paths, save_image
from tokenflow_sdk.cli.progress import progress_bar
from tokenflow_sdk.pictures.contact_sheet import contact_sheet
from tokenflow_sdk.pictures.images import psnr

__all__ = ["reconstruct"]


def reconstruct(arguments: argparse.Namespace) -> int:
    """Encode an image, decode every prefix of its scales, and write a contact sheet with sizes and PSNR."""
    (output,) = output_paths({Path("side_by_side"): Path()}, arguments.output, codes=False)
    image_format(output)
    check_outputs([arguments.image], [output], codes=False, force=arguments.force)
    with open_tokenizer(arguments) as tokenizer:
        original = tokenizer.preprocess(
            arguments.image,
            preprocess=arguments.preprocess,
            color=arguments.color,
            fast=arguments.fast,
            max_pixels=arguments.max_pixels,
        )
        with progress_bar("reconstructing", 1 + len(tokenizer.config.patch_nums), brief=True) as done:
            codes = tokenizer.codes(tokenizer.encode_array(original[None])[0])
            done(1)
            tiles = [(Image.fromarray(original), f"original, {original.shape[1]} px\n{_file_size(arguments.image)}")]
            for n in range(1, codes.n_scales + 1):
                prefix = codes.truncate(n)
                image = tokenizer.decode(prefix)
                quality = psnr(original, np.asarray(image))
                side = codes.patch_nums[n - 1]
                what = "final" if n == codes.n_scales else f"up to {side} x {side}"
                tiles.append((image, f"{what}, {len(prefix)} codes\n{codes.scale_ends[n - 1]:,} bytes, {quality:.2f} dB"))
                done(1 + n)
    columns = -(-len(tiles) // 2) if len(tiles) > 6 else len(tiles)
    save_image(contact_sheet(tiles, columns), output)
    lines = stderr if output == STDIO else stdout
    lines.note(f"{arguments.image} -> {output}  PSNR {quality:.2f} dB, {len(codes)} codes", soft_wrap=True)
    return 0


def _file_size(path: Path) -> str:
    return f"{path.stat().st_size:,} bytes as {path.suffix.lstrip('.').upper() or 'a file'}"
