"""Gather the training data: pictures, captions' labels, licences, and the held-out split.

    python -m recipes.tiny.gather --out data/tiny

Writes `photos/` (JPEG), `icons.npy` (uint8 [N, 256, 256, 3]), `manifest.jsonl` (a line a picture) and `ATTRIBUTION.md`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from recipes.tiny.icons import SIZE, Icon, icons_in, read_labels
from recipes.tiny.photos import Photo, fingerprint, photos_in
from recipes.tiny.sources import ICON_SOURCES, NAMES, PHOTO_SOURCES, FetchError, Source, fetch

__all__ = ["held_out", "main", "without_near_duplicates"]

HELD_OUT_PHOTOS, HELD_OUT_ICONS = 0.15, 0.04
_NEAR = 6
"""Fingerprints that differ in at most this many of 64 bits are of one picture."""

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
    table = Table("source", "licence", "train", "held out")
    counts = Counter((entry["source"], entry["licence"], entry["split"]) for entry in entries)
    for source, licence in sorted({key[:2] for key in counts}):
        table.add_row(source, licence, str(counts[source, licence, "train"]), str(counts[source, licence, "heldout"]))
    Console().print(table)
    return 0


def gather(out: Path, cache: Path, console: Console) -> list[Entry]:
    """Fetch, filter, split and write everything."""
    (out / "photos").mkdir(parents=True, exist_ok=True)
    cache.mkdir(parents=True, exist_ok=True)
    entries: list[Entry] = []
    with Progress(console=console) as progress:
        for source in progress.track(PHOTO_SOURCES, description="photos"):
            entries += _write_photos(source, fetch(source, cache), out)
        entries = without_near_duplicates(entries)
        labels = read_labels(fetch(NAMES, cache))
        arrays: list[np.ndarray[Any, np.dtype[np.uint8]]] = []
        for source in progress.track(ICON_SOURCES, description="icons"):
            for icon, entry in _icons(source, fetch(source, cache), labels):
                entries.append(entry | {"row": len(arrays)})
                arrays.append(np.asarray(icon.image))
    np.save(out / "icons.npy", np.stack(arrays))
    (out / "manifest.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
    (out / "ATTRIBUTION.md").write_text(attribution(entries), encoding="utf-8")
    return entries


def held_out(identity: str, share: float) -> bool:
    """Whether a picture is kept for evaluation: a hash of what it is, so the split never changes."""
    return int.from_bytes(hashlib.sha256(identity.encode()).digest()[:8], "big") < share * 2**64


def _write_photos(source: Source, directory: Path, out: Path) -> Iterator[Entry]:
    for photo in photos_in(source, directory):
        name = f"{source.name}-{Path(photo.path).stem}".replace("/", "-").replace("@", "") + ".jpg"
        photo.image.save(out / "photos" / name, quality=95)
        yield _photo_entry(source, photo) | {"file": f"photos/{name}", "fingerprint": fingerprint(photo.image)}


def _photo_entry(source: Source, photo: Photo) -> Entry:
    split = "heldout" if held_out(f"{source.name}|{photo.path}", HELD_OUT_PHOTOS) else "train"
    return {
        "kind": "photo",
        "split": split,
        "label": None,
        "style": None,
        "source": source.title,
        "path_in_source": photo.path,
        "licence": photo.licence,
        "author": photo.author,
    }


def _icons(source: Source, directory: Path, labels: dict[str, str]) -> Iterator[tuple[Icon, Entry]]:
    for icon in icons_in(source, directory, labels):
        assert icon.image.size == (SIZE, SIZE)
        identity = f"{icon.label or icon.path}|{source.style}"
        yield (
            icon,
            {
                "kind": "icon",
                "split": "heldout" if held_out(identity, HELD_OUT_ICONS) else "train",
                "label": icon.label,
                "style": source.style,
                "source": source.title,
                "path_in_source": icon.path,
                "licence": source.licence,
                "author": source.author,
            },
        )


def without_near_duplicates(entries: list[Entry]) -> list[Entry]:
    """The first of each group of photographs that look the same."""
    kept: list[Entry] = []
    for entry in entries:
        if all((entry["fingerprint"] ^ other["fingerprint"]).bit_count() > _NEAR for other in kept):
            kept.append(entry)
    return kept


def attribution(entries: list[Entry]) -> str:
    """Whom to thank: a line a source, and a line a photograph."""
    lines = ["# Sources of the training data", ""]
    counts = Counter((entry["source"], entry["licence"], entry["author"]) for entry in entries if entry["kind"] == "icon")
    lines += [f"- {source}: {count} drawings, {licence}, {author}" for (source, licence, author), count in counts.items()]
    for entry in entries:
        if entry["kind"] == "photo":
            lines.append(f"- {entry['source']}, `{entry['path_in_source']}`: {entry['licence']}, {entry['author']}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
