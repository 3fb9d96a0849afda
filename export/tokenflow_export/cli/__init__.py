"""`tokenflow export`: from released checkpoints to bundles."""

from __future__ import annotations

from collections.abc import Sequence

from tokenflow_export.cli.parser import make_parser
from tokenflow_sdk.cli.exit_status import naming_missing_packages, run

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
_INSTALL = "pip install 'tokenflow-sdk[cpu,export]'"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the exporter's command line.

    Returns:
        0 when all went well, 2 for a mistake the user can mend, 130 when interrupted (129 by SIGHUP, 143 by SIGTERM).
    """
    arguments = make_parser().parse_args(argv)

    def command() -> int:
        with naming_missing_packages(_EXTRA, _INSTALL):
            arguments.run(arguments)
        return 0

    return run(command, arguments.verbosity, interrupted="interrupted; nothing was written")
