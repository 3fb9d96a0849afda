"""`tokenflow serve`: runs the server of the extra `serve`. It has a parser of its own, made of the server's settings."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from tokenflow_sdk.cli.exit_status import naming_missing_packages, refuse, run
from tokenflow_sdk.cli.help import Parser, add_verbosity
from tokenflow_sdk.errors import MissingPackageError

__all__ = ["main", "make_parser"]

_EXTRA = ("fastapi", "uvicorn", "pydantic", "pydantic_settings", "prometheus_client", "starlette", "python_multipart", "anyio")
_INSTALL = "pip install 'tokenflow-sdk[cpu,generate,serve]'"
_DESCRIPTION = """\
Serve tokenizing, drawing and answering over HTTP, with a page at / to try them.

  tokenflow serve                      the bundled models at
                                       http://127.0.0.1:8080
  tokenflow serve --tokenizer bundles/clipb_256 --generator bundles/t2i
  tokenflow serve --host 0.0.0.0 --api-key-file keys.txt

Each option is also an environment variable, TOKENFLOW_SERVE_PORT for --port,
and a key of the TOML file that --config names; options go first, then
variables. SIGTERM ends the server when accepted requests are answered.
"""


def main(words: Sequence[str]) -> int:
    """Run the server until a signal ends it. Returns the exit status, as `tokenflow_sdk.cli.main` says."""
    try:
        arguments = make_parser().parse_args(words)
    except MissingPackageError as error:
        return refuse(error)
    return run(lambda: _serve(arguments), arguments.verbosity)


def make_parser() -> argparse.ArgumentParser:
    """Make the parser.

    Raises:
        MissingPackageError: a package of the extra is not installed.
    """
    with naming_missing_packages(_EXTRA, _INSTALL):
        from tokenflow_sdk.server.settings import Settings
    parser = Parser("tokenflow serve", description=_DESCRIPTION)
    parser.add_argument("--config", type=Path, metavar="FILE", help="TOML file of these settings")
    for name, field in Settings.model_fields.items():
        flag, default = f"--{name.replace('_', '-')}", field.get_default()
        said = "" if default is None or default == () else f" (default: {_shown(default)})"
        text = f"{field.description}{said}".replace("%", "%%")
        if isinstance(default, bool):
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=text)
        elif isinstance(default, tuple):
            parser.add_argument(flag, nargs="+", metavar="NAME", help=text)
        else:
            kind = {int: "N", float: "X"}.get(type(default), "N" if "int" in str(field.annotation) else "VALUE")
            parser.add_argument(flag, metavar=kind, help=text)
    add_verbosity(parser)
    return parser


def _serve(arguments: argparse.Namespace) -> int:
    with naming_missing_packages(_EXTRA, _INSTALL):
        from tokenflow_sdk.server.run import serve
        from tokenflow_sdk.server.settings import settings_from
    given = {
        name: value for name, value in vars(arguments).items() if value is not None and name not in ("config", "verbosity")
    }
    serve(settings_from(given, arguments.config))
    return 0


def _shown(default: object) -> str:
    return " ".join(map(str, default)) if isinstance(default, tuple) else str(default)
