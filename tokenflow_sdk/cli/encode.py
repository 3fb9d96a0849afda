"""`tokenflow encode`: images to .tfc files of codes."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from tokenflow_sdk.cli.console import stderr, stdout
from tokenflow_sdk.cli.files import STDIO, check_outputs, image_files, input_bytes, output_paths, process_files, write
from tokenflow_sdk.cli.opening import open_tokenizer
from tokenflow_sdk.errors import ImageReadError, TokenFlowError

__all__ = ["encode"]


def encode(arguments: argparse.Namespace) -> int:
    """Encode image files in batches; write a .tfc file for each and print its size."""
    images = image_files(arguments.images)
    outputs = dict(zip(images, output_paths(images, arguments.output, ".tfc"), strict=True))
    check_outputs(images, outputs.values(), codes=True, force=arguments.force)
    with open_tokenizer(arguments, "encode") as tokenizer:

        def encode_batch(paths: Sequence[Path]) -> Iterator[str | TokenFlowError]:
            arrays = {}
            for path in paths:
                try:
                    source = input_bytes(ImageReadError) if path == STDIO else path
                    arrays[path] = tokenizer.preprocess(
                        source, preprocess=arguments.preprocess, fast=arguments.fast, max_pixels=arguments.max_pixels
                    )
                except TokenFlowError as error:
                    yield error
            found = tokenizer.encode_array(np.stack(list(arrays.values()))) if arrays else ()
            for path, row in zip(arrays, found, strict=True):
                codes, output = tokenizer.codes(row), outputs[path]
                try:
                    data = codes.to_bytes()
                    write(data, output)
                    yield f"{path} -> {output}  {len(codes)} codes, {len(data):,} bytes"
                except TokenFlowError as error:
                    yield error

        lines = stderr if STDIO in outputs.values() else stdout
        return process_files(images, encode_batch, "encoding", arguments.batch_limit, lines)
