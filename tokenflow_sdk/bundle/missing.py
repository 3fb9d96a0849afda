"""What is said where a name leads to no bundle: what is there instead, what was probably meant, and how a bundle is made."""

from __future__ import annotations

import difflib
import itertools
import shlex
from collections.abc import Iterator
from pathlib import Path

from tokenflow_sdk.bundle.schema import MANIFEST
from tokenflow_sdk.errors import BundleNotFoundError
from tokenflow_sdk.files import file_status, is_directory
from tokenflow_sdk.pictures.images import SUFFIXES

__all__ = ["WEIGHT_ENDINGS", "nearest", "not_found"]

WEIGHT_ENDINGS = (".pt", ".pth", ".ckpt", ".bin", ".safetensors")
"""Of files of PyTorch weights."""
_EXPORTS = {
    "tokenizer": "tokenizer --checkpoint FILE",
    "generator": "generator --checkpoint DIR --tokenizer BUNDLE",
    "understander": "understanding --checkpoint DIR --tokenizer BUNDLE",
}
"""What makes a bundle of each kind, after `tokenflow export`."""
_MACHINE = "on a machine with PyTorch (`pip install 'tokenflow-sdk[cpu,export]'`), and give the bundle"
_MOST_NAMES = 1000
"""Of each level of directories that are looked at."""
_SHOWN = 5
"""Most names in a message."""
_ALIKE = 0.7
"""How much a misspelt name must be like the right one, of 1."""

_Sentences = tuple[str, str]


def not_found(path: Path, kind: str | None) -> BundleNotFoundError:
    """The error of a path at which there is no bundle.

    Args:
        path: has no bundle.json in it.
        kind: that was looked for, `tokenizer`, `generator` or `understander`; None: any.
    """
    found = _checkpoint(path, kind) or (_directory(path, kind) if is_directory(path) else _file(path))
    return BundleNotFoundError(*(found or _nothing(path, kind)))


def _nothing(path: Path, kind: str | None) -> _Sentences:
    close = None if file_status(path) is not None else nearest(path)
    which = _EXPORTS[kind or "tokenizer"].partition(" ")[0]
    return (
        f"There is no bundle at {path} (no {MANIFEST} there).",
        (f"Did you mean {close}? Else give" if close else "Give")
        + f" the directory that `tokenflow export {which} --out DIR` wrote, or a hub id like org/name.",
    )


def _export(kind: str) -> str:
    return f"`tokenflow export {_EXPORTS[kind]} --out DIR`"


def _checkpoint(path: Path, kind: str | None) -> _Sentences | None:
    """Of a checkpoint: how it becomes a bundle."""
    name = shlex.quote(str(path))
    if path.suffix in WEIGHT_ENDINGS:
        command = f"`tokenflow export tokenizer --checkpoint {name} --out bundles/{shlex.quote(path.stem)}`"
        if kind in ("generator", "understander"):
            command = f"{_export(kind)}, DIR being the released directory that has all of the model,"
        return f"{path} is a PyTorch checkpoint, not a bundle.", f"Run {command} {_MACHINE}."
    if file_status(path / "config.json") is None:
        return None
    which = "generator" if kind == "generator" else "understanding"
    other = "" if kind in ("generator", "understander") else ", or `generator` for text-to-image,"
    return (
        f"{path} is a PyTorch checkpoint (it has a config.json and no {MANIFEST}), not a bundle.",
        f"Run `tokenflow export {which} --checkpoint {name} --tokenizer BUNDLE --out DIR`{other} {_MACHINE}.",
    )


def _directory(path: Path, kind: str | None) -> _Sentences | None:
    """Of a directory: what it holds instead."""
    kinds = [each for each in _EXPORTS if file_status(path / each / MANIFEST) is not None]
    if kinds and kind is not None and kind not in kinds:
        return (
            f"{path} holds {' and '.join(map(_article, kinds))}, and no {kind}.",
            f"Make one by {_export(kind)} {_MACHINE}.",
        )
    entries = sorted(itertools.islice(_entries(path), _MOST_NAMES))
    bundles = [str(entry) for entry in entries if _is_bundle(entry)]
    if bundles:
        names = ", ".join(bundles[:_SHOWN]) + (", ..." if len(bundles) > _SHOWN else "")
        return f"{path} is no bundle (no {MANIFEST} there), but holds some: {names}.", "Give one of them."
    name, endings = shlex.quote(str(path)), {entry.suffix.lower() for entry in entries}
    if ".tfc" in endings:
        return (
            f"{path} is a directory of files of codes, not a bundle.",
            f"`tokenflow decode {name}` decodes them, `tokenflow info FILE.tfc` describes one.",
        )
    if endings & SUFFIXES:
        return (
            f"{path} is a directory of pictures, not a bundle.",
            f"`tokenflow encode {name}` encodes them, with the tokenizer that --bundle names.",
        )
    return None


def _article(kind: str) -> str:
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"


def _file(path: Path) -> _Sentences | None:
    """Of a file, or of a name that by its ending is meant to be that of one."""
    name, ending = shlex.quote(str(path)), path.suffix.lower()
    if ending == ".tfc":
        what, use = "a file of codes", f"`tokenflow info {name}` describes it, `tokenflow decode {name}` decodes it."
    elif ending in SUFFIXES:
        what, use = "a picture", f"`tokenflow encode {name}` encodes it, with the tokenizer that --bundle names."
    elif file_status(path.parent / MANIFEST) is not None:
        what, use = "a file of a bundle", f"Give its directory, {path.parent}."
    else:
        return None
    if file_status(path) is None:
        return f"There is no file {path}, and no bundle of this name.", "Check the path."
    return f"{path} is {what}, not a bundle.", use


def nearest(path: Path) -> str | None:
    """The bundle that is probably meant by a path at which nothing is: `tiny`, or one whose name is like it.

    Looked at is what lies one or two levels below the last directory of the path that exists.
    """
    base = next((parent for parent in itertools.islice(path.parents, 2) if is_directory(parent)), None)
    if base is None or base == Path(base.anchor or "/"):
        return None
    first = list(itertools.islice(_entries(base), _MOST_NAMES))
    second = itertools.islice(itertools.chain.from_iterable(map(_entries, first)), _MOST_NAMES)
    alone = path.parent == base
    names = {"tiny": "tiny"} if len(path.parts) == 1 else {}
    for entry in (*first, *second):
        if _is_bundle(entry):
            names.setdefault((entry.name if alone else str(entry.relative_to(base))).lower(), str(entry))
    close = difflib.get_close_matches(str(path.relative_to(base)).lower(), names, 1, _ALIKE)
    return names[close[0]] if close else None


def _is_bundle(path: Path) -> bool:
    """Whether a path names a bundle, or bundles of several kinds."""
    return any(file_status(path / place / MANIFEST) is not None for place in ("", *_EXPORTS))


def _entries(directory: Path) -> Iterator[Path]:
    """What a directory holds; nothing if it is none or cannot be read."""
    try:
        yield from directory.iterdir()
    except (OSError, ValueError):
        return
