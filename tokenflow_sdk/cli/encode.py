"""`tokenflow encode`: images to .tfc files of codes."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from tokenflow_sdk.cli.files import image_files, output_paths, process_files
from tokenflow_sdk.cli.opening import open_tokenizer
from tokenflow_sdk.errors import TokenFlowError

__all__ = ["encode"]


def encode(arguments: argparse.Namespace) -> int:
    """Encode image files in batches; write a .tfc file for each and print its size."""
    images = image_files(arguments.images)
    outputs = dict(zip(images, output_paths(images, arguments.output, ".tfc"), strict=True))
    with open_tokenizer(arguments, "encode") as tokenizer:

        def encode_batch(paths: Sequence[Path]) -> Iterator[str | TokenFlowError]:
            arrays = {}
            for path in paths:
                try:
                    arrays[path] = tokenizer.preprocess(
                        path, preprocess=arguments.preprocess, fast=arguments.fast, max_pixels=arguments.max_pixels
                    )
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

        return process_files(images, encode_batch, "encoding", arguments.batch_limit)
