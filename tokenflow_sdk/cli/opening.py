"""What the commands share: opening the bundle they were told to use, and working through files."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tokenflow_sdk.bundle.bundle import TINY
from tokenflow_sdk.engines.options import RuntimeOptions
from tokenflow_sdk.errors import ArgumentError, OutputError, TokenFlowError
from tokenflow_sdk.generation.generator import Generator
from tokenflow_sdk.tokenizer import Tokenizer
from tokenflow_sdk.understanding.understander import Understander

__all__ = [
    "bundle_name",
    "each_file",
    "open_generator",
    "open_tokenizer",
    "open_understander",
    "output_paths",
    "runtime_options",
    "stderr",
    "stdout",
]

# Piped output has no width: wide enough that tables do not wrap.
stdout = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
stderr = Console(stderr=True, highlight=False)


def bundle_name(arguments: argparse.Namespace) -> str:
    """The bundle given by position or by --bundle; `tiny` where none is.

    Raises:
        ArgumentError: two were given.
    """
    return _given(arguments) or TINY


def _given(arguments: argparse.Namespace) -> str | None:
    """The bundle given by position or by --bundle.

    Raises:
        ArgumentError: two were given.
    """
    given = [name for name in (getattr(arguments, "target", None), arguments.bundle) if name]
    if len(given) > 1:
        raise ArgumentError("Two bundles were given.", "Name one.")
    return str(given[0]) if given else None


def runtime_options(arguments: argparse.Namespace) -> RuntimeOptions:
    """What the options of the group "engine" ask for."""
    return RuntimeOptions(
        device=arguments.device, threads=arguments.threads, backend=arguments.backend, build_config=arguments.config
    )


def open_tokenizer(arguments: argparse.Namespace, *graphs: str) -> Tokenizer:
    """The tokenizer that the command line asks for, with `graphs` loaded (none: on first use)."""
    with stderr.status(f"opening {bundle_name(arguments)}"):
        tokenizer = Tokenizer.open(bundle_name(arguments), runtime_options(arguments), arguments.batch_limit)
        return tokenizer.load(*graphs) if graphs else tokenizer


def open_generator(arguments: argparse.Namespace) -> Generator:
    """The generator that the command line asks for."""
    with stderr.status(f"opening {bundle_name(arguments)}"):
        return Generator.open(bundle_name(arguments), runtime_options(arguments), arguments.tokenizer)


def open_understander(arguments: argparse.Namespace) -> Understander:
    """The understander that the command line asks for.

    Raises:
        ArgumentError: no bundle was named, or two were; none comes with the SDK.
    """
    name = _given(arguments)
    if name is None:
        raise ArgumentError(
            "No model that answers questions comes with the SDK, and --bundle names none.",
            "Export one with `tokenflow export understanding --checkpoint DIR --tokenizer bundles/siglip_384 "
            "--out bundles/chat` and give --bundle bundles/chat.",
        )
    with stderr.status(f"opening {name}"):
        return Understander.open(name, runtime_options(arguments), arguments.tokenizer)


def output_paths(inputs: Sequence[Path], output: Path | None, suffix: str) -> list[Path]:
    """Where the result of each input goes: `output` itself for one input and a file name, else files in that directory.

    Raises:
        ArgumentError: several results would have one name, or several inputs are to go into one file.
        OutputError: the directory cannot be made.
    """
    if output is not None and output.suffix and not output.is_dir():
        if len(inputs) > 1:
            raise ArgumentError(f"{len(inputs)} results cannot go into the one file {output}.", "Give -o a directory.")
        return [output]
    directory = output or Path()
    paths = [directory / f"{path.stem}{suffix}" for path in inputs]
    for i, path in enumerate(paths):
        if path in paths[:i]:
            raise ArgumentError(
                f"{inputs[paths.index(path)]} and {inputs[i]} would both be written to {path}.",
                "Encode them into two directories.",
            )
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{directory} cannot be made: {error.strerror}.", "Choose another -o.") from error
    return paths


def each_file(
    inputs: Sequence[Path], work: Callable[[Sequence[Path]], Iterable[str | TokenFlowError]], verb: str, at_once: int = 1
) -> int:
    """Hand the inputs to `work`, `at_once` at a time, with a progress bar; go on after a user's mistake.

    Args:
        inputs: files to work on.
        work: gives, for each of some files, the line to print about it, or the error it ran into.
        verb: what the bar says is being done.
        at_once: files in one call of `work`.

    Returns:
        The exit status: 0, or 1 when some of several failed.

    Raises:
        TokenFlowError: the only input failed.
    """
    failed = 0
    columns = (TextColumn(verb), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal) as progress:
        task = progress.add_task(verb, total=len(inputs))
        for start in range(0, len(inputs), at_once):
            for outcome in work(inputs[start : start + at_once]):
                progress.advance(task)
                if isinstance(outcome, str):
                    stdout.print(outcome, markup=False, soft_wrap=True)
                elif len(inputs) == 1:
                    raise outcome
                else:
                    failed += 1
                    stderr.print(f"error: {outcome}", style="red", markup=False, soft_wrap=True)
    if failed:
        stderr.print(f"{failed} of {len(inputs)} failed", style="red")
    return 1 if failed else 0
