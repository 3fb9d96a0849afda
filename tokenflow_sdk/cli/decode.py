"""`tokenflow decode`: .tfc files of codes to image files. PNGs that are there already are not made again."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image

from tokenflow_sdk.cli.console import stderr, stdout
from tokenflow_sdk.cli.files import check_match, code_files, input_bytes, process_files
from tokenflow_sdk.cli.opening import open_tokenizer
from tokenflow_sdk.cli.outputs import STDIO, check_outputs, image_format, output_paths, save_image
from tokenflow_sdk.errors import CodesReadError, TokenFlowError
from tokenflow_sdk.files import is_regular
from tokenflow_sdk.pictures.codes import Codes
from tokenflow_sdk.pictures.tfc import MAX_BYTES
from tokenflow_sdk.tokenizer import Tokenizer

__all__ = ["decode"]


MADE_FROM = "tokenflow_decoded"
"""Key of the PNG text chunk that says from what an image was decoded: see `_made_from`."""


def decode(arguments: argparse.Namespace) -> int:
    """Decode .tfc files, all scales or the coarsest ones only; write an image file for each. Skip PNGs that are there."""
    found = code_files(arguments.files)
    outputs = dict(zip(found, output_paths(found, arguments.output, codes=False), strict=True))
    for output in outputs.values():
        image_format(output)
    check_outputs(outputs, outputs.values(), codes=False, force=arguments.force)
    skipped = 0
    with open_tokenizer(arguments) as tokenizer:

        def decode_each(paths: Sequence[Path]) -> Iterator[str | TokenFlowError | None]:
            nonlocal skipped
            for path in paths:
                try:
                    check_match(path, CodesReadError)
                    codes = Codes.from_bytes(input_bytes(CodesReadError, MAX_BYTES + 1)) if path == STDIO else Codes.load(path)
                    if arguments.scales is not None:
                        codes = codes.truncate(arguments.scales)
                    made_from = _made_from(codes, tokenizer)
                    if not arguments.force and _is_done(outputs[path], made_from):
                        skipped += 1
                        yield None
                        continue
                except TokenFlowError as error:
                    yield error
                    continue
                # What fails here fails for all.
                tokenizer.load("decode")
                try:
                    save_image(tokenizer.decode(codes), outputs[path], {MADE_FROM: made_from})
                    yield f"{path} -> {outputs[path]}  {codes.n_scales} of {len(codes.patch_nums)} scales"
                except TokenFlowError as error:
                    yield error

        lines = stderr if STDIO in outputs.values() else stdout
        status = process_files(list(found), decode_each, "decoding", lines=lines)
    if skipped:
        stderr.note(
            f"{skipped} of {len(outputs)} skipped: their images are there, decoded from the same codes by this tokenizer; "
            "--force decodes them again",
            soft_wrap=True,
        )
    return status


def _made_from(codes: Codes, tokenizer: Tokenizer) -> str:
    """The start of the SHA-256 of the codes and of the decoder: the same decode to the same picture."""
    graph = tokenizer.bundle.graph("decode")
    return hashlib.sha256(codes.to_bytes() + "".join(file.sha256 for file in graph.files).encode()).hexdigest()[:32]


def _is_done(output: Path, made_from: str) -> bool:
    """Whether the output is a PNG that says it was made from this. Files are written whole, so its pixels are there too."""
    if output == STDIO or not is_regular(output):
        return False
    try:
        with Image.open(output) as image:
            return bool(getattr(image, "text", {}).get(MADE_FROM) == made_from)
    except Exception:  # of Pillow, for whatever is no image
        return False
