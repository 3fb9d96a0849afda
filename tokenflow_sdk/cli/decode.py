"""`tokenflow decode`: .tfc files of codes to image files."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

from tokenflow_sdk.cli.console import stderr, stdout
from tokenflow_sdk.cli.files import (
    STDIO,
    check_outputs,
    image_format,
    input_bytes,
    output_paths,
    process_files,
    save_image,
)
from tokenflow_sdk.cli.opening import open_tokenizer
from tokenflow_sdk.errors import CodesReadError, TokenFlowError
from tokenflow_sdk.pictures.codes import Codes
from tokenflow_sdk.pictures.tfc import MAX_BYTES

__all__ = ["decode"]


def decode(arguments: argparse.Namespace) -> int:
    """Decode .tfc files, all scales or the coarsest ones only; write an image file for each."""
    outputs = dict(zip(arguments.files, output_paths(arguments.files, arguments.output, ".png"), strict=True))
    for output in outputs.values():
        image_format(output)
    check_outputs(outputs, outputs.values(), codes=False, force=arguments.force)
    with open_tokenizer(arguments, "decode") as tokenizer:

        def decode_each(paths: Sequence[Path]) -> Iterator[str | TokenFlowError]:
            for path in paths:
                try:
                    codes = Codes.from_bytes(input_bytes(CodesReadError, MAX_BYTES + 1)) if path == STDIO else Codes.load(path)
                    if arguments.scales is not None:
                        codes = codes.truncate(arguments.scales)
                    save_image(tokenizer.decode(codes), outputs[path])
                    yield f"{path} -> {outputs[path]}  {codes.n_scales} of {len(codes.patch_nums)} scales"
                except TokenFlowError as error:
                    yield error

        lines = stderr if STDIO in outputs.values() else stdout
        return process_files(arguments.files, decode_each, "decoding", lines=lines)
