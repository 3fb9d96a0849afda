"""Which pictures may be used: public domain, CC0, CC-BY, BSD, MIT, Apache. Anything else, and anything unclear, is left out."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch

__all__ = ["Licence", "is_permissive", "read_dep5"]

_PERMISSIVE = re.compile(r"public-domain|CC0(-1\.0)?|CC-BY-\d\.\d|BSD-[23]-Clause|MIT|Expat|Apache-2\.0|ISC", re.IGNORECASE)


@dataclass(frozen=True)
class Licence:
    """One entry of a Debian copyright file: the files it covers, the licence's short name, the authors."""

    globs: tuple[str, ...]
    name: str
    author: str

    def covers(self, path: str) -> bool:
        return any(fnmatch(path, glob) for glob in self.globs)


def is_permissive(name: str) -> bool:
    """Whether a licence asks for no more than naming the author."""
    return _PERMISSIVE.fullmatch(name) is not None


def read_dep5(text: str) -> Iterator[Licence]:
    """Entries of a machine-readable Debian copyright file, in order; a later one overrides an earlier one."""
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
