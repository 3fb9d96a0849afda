"""`tokenflow encode`: images to .tfc files of codes. Those that are there already are not made again."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from tokenflow_sdk.cli.console import stderr, stdout
from tokenflow_sdk.cli.files import check_match, image_files, input_bytes, process_files
from tokenflow_sdk.cli.opening import open_tokenizer
from tokenflow_sdk.cli.outputs import STDIO, check_outputs, output_paths, write
from tokenflow_sdk.errors import CodesError, ImageReadError, TokenFlowError
from tokenflow_sdk.files import is_regular
from tokenflow_sdk.pictures.codes import Codes
from tokenflow_sdk.pictures.preparation import Preparation
from tokenflow_sdk.tokenizer import Tokenizer

__all__ = ["encode"]

_LARGE = 10_000
"""Most pictures that are encoded without a word about the command for data sets."""


def encode(arguments: argparse.Namespace) -> int:
    """Encode image files; write a .tfc file for each and print its size. Skip those whose codes are there."""
    found = image_files(arguments.images)
    images = list(found)
    if len(images) > _LARGE:
        several = "`tokenflow tokenize` writes the codes of so many to few files, and goes on where it was ended"
        stderr.note(f"{len(images):,} pictures: {several}", soft_wrap=True)
    outputs = dict(zip(images, output_paths(found, arguments.output, codes=True), strict=True))
    check_outputs(images, outputs.values(), codes=True, force=arguments.force)
    with open_tokenizer(arguments) as tokenizer:
        preparation = tokenizer.preparation(arguments.preprocess, arguments.color, arguments.fast)
        if not arguments.force:
            images = _to_do(outputs, tokenizer, preparation)
        digests: dict[Path, str | None] = {}
        unread: dict[Path, TokenFlowError] = {}

        def sources(paths: Sequence[Path]) -> Iterator[Path | bytes]:
            for path in paths:
                # Before the image is read: a file that changes meanwhile is then encoded again.
                digests[path] = _digest(path)
                try:
                    check_match(path, ImageReadError)
                    yield input_bytes(ImageReadError) if path == STDIO else path
                except TokenFlowError as error:
                    unread[path] = error
                    yield b""

        def encode_each(paths: Sequence[Path]) -> Iterator[str | TokenFlowError]:
            options = {name: getattr(arguments, name) for name in ("preprocess", "color", "fast", "max_pixels")}
            with closing(tokenizer.encode_iter(sources(paths), errors="yield", **options)) as results:
                for path, found in zip(paths, results, strict=True):
                    source, result = digests.pop(path), unread.get(path, found)
                    if isinstance(result, TokenFlowError):
                        yield result
                        continue
                    try:
                        data = replace(result, preparation=replace(preparation, source=source)).to_bytes()
                        write(data, outputs[path])
                        yield f"{path} -> {outputs[path]}  {len(result)} codes, {len(data):,} bytes"
                    except TokenFlowError as error:
                        yield error

        lines = stderr if STDIO in outputs.values() else stdout
        return process_files(images, encode_each, "encoding", lines, several=len(outputs) > 1) if images else 0


def _to_do(outputs: Mapping[Path, Path], tokenizer: Tokenizer, preparation: Preparation) -> list[Path]:
    """The images, keys of `outputs`, that must be encoded. Prints how many others there are, and why they are skipped."""
    images = [path for path, output in outputs.items() if not _is_done(path, output, tokenizer, preparation)]
    if skipped := len(outputs) - len(images):
        stderr.note(
            f"{skipped} of {len(outputs)} skipped: their codes are there, made from the same files by this tokenizer "
            "with these options; --force encodes them again",
            soft_wrap=True,
        )
    return images


def _is_done(path: Path, output: Path, tokenizer: Tokenizer, preparation: Preparation) -> bool:
    """Whether the output holds all codes of this tokenizer, made from a file with the same content and options.

    Times say too little: a file moved here is old, and two directories may have files of the same name.
    """
    if not _is_file(output):
        return False
    try:
        codes = Codes.load(output)
        tokenizer.require(codes)
    except CodesError:
        return False
    if not codes.complete or codes.variant != tokenizer.config.variant or codes.preparation is None:
        return False
    source = codes.preparation.source
    return source is not None and codes.preparation == replace(preparation, source=source) and source == _digest(path)


def _digest(path: Path) -> str | None:
    """The start of the SHA-256 of a file; None for what is no file or cannot be read, which reading the image reports."""
    if not _is_file(path):
        return None
    found = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while part := file.read(2**20):
                found.update(part)
    except OSError:
        return None
    return found.hexdigest()[:16]


def _is_file(path: Path) -> bool:
    return path != STDIO and is_regular(path)
