"""`tokenflow ask`: answers a question about images or their codes."""

from __future__ import annotations

import argparse

from tokenflow_sdk.cli.console import stdout
from tokenflow_sdk.cli.opening import open_understander
from tokenflow_sdk.errors import ImageReadError
from tokenflow_sdk.files import file_status
from tokenflow_sdk.model.sampling import random_seed
from tokenflow_sdk.pictures.codes import Codes
from tokenflow_sdk.understanding.params import AnswerParams

__all__ = ["ask"]


def ask(arguments: argparse.Namespace) -> int:
    """Answer the question, and print the answer while it is generated."""
    params = AnswerParams(
        max_tokens=arguments.max_tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        top_k=arguments.top_k,
        repetition_penalty=arguments.repetition_penalty,
        seed=random_seed() if arguments.seed is None else arguments.seed,
    )
    # Before the model is opened, which may take a minute.
    for path in arguments.images:
        if file_status(path) is None:
            raise ImageReadError(f"There is no image at {path}.", "Check the path, and put the question in quotes.")
    with open_understander(arguments) as understander:
        preprocess = arguments.preprocess or understander.config.preprocess
        images = [
            Codes.load(path)
            if path.suffix == ".tfc"
            else understander.tokenizer.preprocess(
                path,
                preprocess=preprocess,
                color=arguments.color,
                fast=arguments.fast,
                max_pixels=arguments.max_pixels,
            )
            for path in arguments.images
        ]
        for piece in understander.stream(images, arguments.question, preprocess=preprocess, params=params):
            stdout.write(piece)
        stdout.write("\n")
    return 0
