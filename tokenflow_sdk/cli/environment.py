"""What `tokenflow info` says without a bundle: what is installed, and which backends work here."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from typing import Any

from tokenflow_sdk import __version__
from tokenflow_sdk.backends.cores import available_cores, instruction_sets, processor
from tokenflow_sdk.backends.cuda import driver_problem
from tokenflow_sdk.bundle.bundle import TINY, find_bundle, open_bundle
from tokenflow_sdk.cli.console import make_table, stdout
from tokenflow_sdk.engines.choice import survey
from tokenflow_sdk.engines.options import RuntimeOptions

__all__ = ["environment", "print_environment"]

_PACKAGES = {
    "tensorrt": "tokenflow-sdk[tensorrt]",
    "tensorrt-rtx": "tokenflow-sdk[tensorrt-rtx]",
    "onnxruntime, CUDA": "tokenflow-sdk[gpu]",
    "openvino": "tokenflow-sdk[openvino]",
}
"""What to install for a backend, by the backend's title."""
_FOR_DEVELOPERS = ("dev", "docs", "inspect", "train")
_REQUIREMENT = re.compile(r"""([A-Za-z0-9._-]+)[^;]*(?:;.*\bextra == ["']([\w-]+)["'].*)?""")
_VARIABLES = re.compile("TOKENFLOW_.*|CUDA_VISIBLE_DEVICES|OMP_NUM_THREADS|HF_HUB_OFFLINE|NVIDIA_TF32_OVERRIDE")


def environment() -> dict[str, Any]:
    """Versions, installed packages by extra, variables that the SDK reads, and the backends, which are tried on `tiny`."""
    tiny = open_bundle(find_bundle(TINY, "tokenizer"))
    backends = [
        {
            "backend": way.title,
            "works": way.usable,
            "why": way.reason,
            "install": _PACKAGES.get(way.title, "tokenflow-sdk[cpu]"),
        }
        for way in survey(tiny, RuntimeOptions())
    ]
    return {
        "sdk": __version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "machine": platform.machine(),
        "processor": processor(),
        "instruction_sets": instruction_sets(),
        "cores": available_cores(),
        "gpu": driver_problem() or "the NVIDIA driver finds one",
        "variables": {name: value for name, value in sorted(os.environ.items()) if _VARIABLES.fullmatch(name)},
        "packages": _packages(),
        "backends": backends,
    }


def _packages() -> dict[str, dict[str, str | None]]:
    """Version of each package that an extra asks for, None if it is missing, by extra; those of no extra under `always`."""
    try:
        requirements = importlib.metadata.requires("tokenflow-sdk") or []
    except importlib.metadata.PackageNotFoundError:  # run from a directory of its source
        return {}
    found: dict[str, dict[str, str | None]] = {}
    for requirement in requirements:
        parsed = _REQUIREMENT.match(requirement)
        if parsed is None or parsed[1] == "tokenflow-sdk" or parsed[2] in _FOR_DEVELOPERS:
            continue
        try:
            version = importlib.metadata.version(parsed[1])
        except importlib.metadata.PackageNotFoundError:
            version = None
            if "python_version" in requirement or "sys_platform" in requirement:  # perhaps not asked for here
                continue
        found.setdefault(parsed[2] or "always", {})[parsed[1]] = version
    return found


def print_environment(found: dict[str, Any]) -> None:
    """Print what `environment` gave, in one screen."""
    stdout.print(f"tokenflow-sdk {found['sdk']}, Python {found['python']}, {found['system']}, {found['cores']} cores")
    stdout.print(f"processor: {', '.join([found['processor'], *found['instruction_sets']])}", soft_wrap=True)
    stdout.print(f"GPU: {found['gpu']}", soft_wrap=True)
    for name, value in found["variables"].items():
        stdout.print(f"{name}={value}", soft_wrap=True)
    table = make_table("extra", "packages")
    for extra, packages in found["packages"].items():
        table.add_row(extra, ", ".join(f"{name} {version or '(missing)'}" for name, version in packages.items()))
    stdout.print(table)
    table = make_table("backend", "here", "why", "comes with")
    table.columns[-1].no_wrap = True
    for way in found["backends"]:
        table.add_row(way["backend"], "yes" if way["works"] else "no", way["why"], way["install"])
    stdout.print(table)
    stdout.print("`tokenflow info BUNDLE` describes a bundle, `tokenflow info tiny` the one that comes with the SDK.")
