"""Decides which pictures may be used: public domain, CC0, CC-BY, BSD, MIT, Apache, and nothing that is unclear."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import PurePosixPath

__all__ = ["Licence", "is_permissive", "licence_of", "read_dep5", "spdx"]

_SPDX = {
    "public-domain": "LicenseRef-public-domain",
    "public domain": "LicenseRef-public-domain",
    "cc0": "CC0-1.0",
    "cc0-1.0": "CC0-1.0",
    "pddl-1.0": "PDDL-1.0",
    "bsd-2-clause": "BSD-2-Clause",
    "bsd-3-clause": "BSD-3-Clause",
    "mit": "MIT",
    "expat": "MIT",
    "apache-2.0": "Apache-2.0",
    "isc": "ISC",
}


@dataclass(frozen=True)
class Licence:
    """One entry of a Debian copyright file: the files it covers, the licence's short name, the authors."""

    globs: tuple[str, ...]
    name: str
    author: str

    def covers(self, name: str) -> bool:
        """Whether the entry is about a file, given its name without suffix."""
        return any(glob != "*" and fnmatchcase(name, PurePosixPath(glob).with_suffix("").as_posix()) for glob in self.globs)


def spdx(name: str) -> str | None:
    """The SPDX name of a permissive licence, `CC0 and cc-by-3.0` -> `CC0-1.0 AND CC-BY-3.0`; None for any other licence."""
    parts = []
    for part in re.split(r"\s+and\s+", name.strip(), flags=re.IGNORECASE):
        known = part.upper() if re.fullmatch(r"cc-by-\d\.\d", part, re.IGNORECASE) else _SPDX.get(part.lower())
        if known is None:
            return None
        parts.append(known)
    return " AND ".join(parts)


def is_permissive(name: str) -> bool:
    """Whether a licence asks for no more than to name the author."""
    return spdx(name) is not None


def licence_of(path: str, entries: Sequence[Licence]) -> Licence | None:
    """Find the licence of a file: the last of `entries` that covers it, if that is clearly permissive.

    It is unclear if a later entry than the first permissive one is not permissive, because wildcards can cover more than was
    meant: `desert1*` should not override `*-harro*` for `desert10-harro`. Suffixes are not compared, because packages convert
    pictures, and an entry for `*` is the licence of the program.
    """
    name = PurePosixPath(path).with_suffix("").as_posix()
    found = [entry for entry in entries if entry.covers(name)]
    while found and not is_permissive(found[0].name):
        found.pop(0)
    return found[-1] if found and all(is_permissive(entry.name) for entry in found) else None


def read_dep5(text: str) -> Iterator[Licence]:
    """Yield the entries of a machine-readable Debian copyright file, in order; a later one overrides an earlier one."""
    for block in re.split(r"\n[ \t]*\n", text):
        fields: dict[str, list[str]] = {}
        for line in block.splitlines():
            start = re.match(r"([A-Za-z-]+):\s*(.*)", line)
            if start:
                fields[start[1].lower()] = lines = [start[2]]
            elif fields:
                lines.append(line.strip())
        if "files" in fields:
            author = " ".join(fields.get("copyright", [])).strip()
            yield Licence(tuple(" ".join(fields["files"]).split()), fields.get("license", [""])[0].strip(), author)
