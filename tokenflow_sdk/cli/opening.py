"""Opens the bundle that a command's arguments name, with the runtime options that they give."""

from __future__ import annotations

import argparse
from pathlib import Path

from tokenflow_sdk.bundle.bundle import TINY, bundles_in
from tokenflow_sdk.bundle.hub import HubOptions
from tokenflow_sdk.cli.console import stderr
from tokenflow_sdk.engines.options import RuntimeOptions
from tokenflow_sdk.errors import ArgumentError
from tokenflow_sdk.files import packaged_data
from tokenflow_sdk.generation.generator import Generator
from tokenflow_sdk.tokenizer import Tokenizer
from tokenflow_sdk.understanding.understander import Understander

__all__ = [
    "bundle_name",
    "bundle_paths",
    "for_language_models",
    "named_bundle",
    "open_generator",
    "open_tokenizer",
    "open_understander",
    "runtime_options",
    "shown_path",
]


def bundle_name(arguments: argparse.Namespace) -> str:
    """The bundle named by the positional argument or by --bundle; `tiny` if none is named.

    Raises:
        ArgumentError: two bundles are named.
    """
    name = named_bundle(arguments)
    return TINY if name is None else name


def bundle_paths(arguments: argparse.Namespace) -> list[Path]:
    """Directories of all bundles under the name in the arguments, at the revision in them.

    Raises:
        ArgumentError: two bundles are named; or several are found, and --sha256 is that of one.
    """
    paths = bundles_in(bundle_name(arguments), HubOptions(arguments.revision))
    if arguments.sha256 is not None and len(paths) > 1:
        raise ArgumentError(
            f"--sha256 is that of one bundle, and {bundle_name(arguments)} has several.",
            f"Name one of: {', '.join(map(str, paths))}.",
        )
    return paths


def named_bundle(arguments: argparse.Namespace) -> str | None:
    """As `bundle_name`, but None if no bundle is named."""
    named = [name for name in (getattr(arguments, "target", None), arguments.bundle) if name is not None]
    if len(named) > 1:
        raise ArgumentError("Two bundles were given.", "Name one.")
    return named[0] if named else None


def shown_path(path: Path) -> str:
    """How a bundle's directory is shown: those that come with the SDK by name, others by their path."""
    return f"{TINY} ({path.name})" if path.parent == packaged_data(f"models/{TINY}") else str(path)


def runtime_options(arguments: argparse.Namespace) -> RuntimeOptions:
    """The runtime options given by the argument group "engine"."""
    return RuntimeOptions(
        device=arguments.device, threads=arguments.threads, backend=arguments.backend, build_config=arguments.config
    )


def for_language_models(arguments: argparse.Namespace) -> argparse.Namespace:
    """The arguments with which language models run beside a tokenizer (`RuntimeOptions.for_language_models`)."""
    options = runtime_options(arguments).for_language_models()
    own = {"device": options.device, "backend": options.backend, "config": options.build_config}
    return argparse.Namespace(**{**vars(arguments), **own})


def open_tokenizer(arguments: argparse.Namespace, *graphs: str) -> Tokenizer:
    """Open the tokenizer that the arguments name, and load `graphs` now; other graphs are loaded when first used."""
    with stderr.step(f"opening {bundle_name(arguments)}", brief=True):
        tokenizer = Tokenizer.open(
            bundle_name(arguments),
            runtime_options(arguments),
            arguments.batch_limit,
            hub=HubOptions(arguments.revision),
            sha256=arguments.sha256,
        )
        return tokenizer.load(*graphs) if graphs else tokenizer


def open_generator(arguments: argparse.Namespace) -> Generator:
    """Open the generator that the arguments name."""
    with stderr.step(f"opening {bundle_name(arguments)}", brief=True):
        return Generator.open(
            bundle_name(arguments),
            runtime_options(arguments),
            arguments.tokenizer,
            arguments.pages,
            hub=HubOptions(arguments.revision),
            sha256=arguments.sha256,
        )


def open_understander(arguments: argparse.Namespace) -> Understander:
    """Open the understander that the arguments name."""
    with stderr.step(f"opening {bundle_name(arguments)}", brief=True):
        return Understander.open(
            bundle_name(arguments),
            runtime_options(arguments),
            arguments.tokenizer,
            arguments.pages,
            hub=HubOptions(arguments.revision),
            sha256=arguments.sha256,
        )
