"""`tokenflow export`: from released checkpoints to bundles."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from tokenflow_export.cli.parser import make_parser
from tokenflow_sdk.cli.exit_status import run
from tokenflow_sdk.errors import MissingPackageError

__all__ = ["main"]

_EXTRA = (
    "torch",
    "onnx",
    "onnx_ir",
    "onnxscript",
    "onnxruntime",
    "safetensors",
    "tokenizers",
    "huggingface_hub",
    "jinja2",
    "psutil",
    "filelock",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the exporter's command line.

    Returns:
        0 when all went well, 2 for a mistake the user can mend, 130 when interrupted (129 by SIGHUP, 143 by SIGTERM).
    """
    arguments = make_parser().parse_args(argv)

    def command() -> int:
        with _naming_missing_packages():
            arguments.run(arguments)
        return 0

    return run(command, arguments.verbosity, interrupted="interrupted; nothing was written")


@contextmanager
def _naming_missing_packages() -> Iterator[None]:
    """Raises:
    MissingPackageError: a package of the extra `export` is not installed.
    """
    try:
        yield
    except ImportError as error:
        package = (error.name or "").split(".")[0]
        if package not in _EXTRA:
            raise
        raise MissingPackageError(f"{package} is not installed.", "Run `pip install 'tokenflow-sdk[cpu,export]'`.") from error
