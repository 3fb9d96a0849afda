import io
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest

from recipes.tiny.gather import held_out, split_photos, without_near_duplicates
from recipes.tiny.licences import Licence, is_permissive, licence_of, read_dep5, spdx
from recipes.tiny.rcc import read_rcc
from recipes.tiny.sources import FetchError, unpack


def rcc(compressed: bool) -> bytes:
    """An archive of version 1 with one file, `a/b.txt`, that holds `hello`."""
    content = b"hello"
    stored = struct.pack(">I", len(content)) + zlib.compress(content) if compressed else content
    data = struct.pack(">I", len(stored)) + stored
    names = b"".join(struct.pack(">HI", len(name), 0) + name.encode("utf-16-be") for name in ("a", "b.txt"))
    directories = struct.pack(">IHII", 0, 2, 1, 1) + struct.pack(">IHII", 0, 2, 1, 2)
    tree = directories + struct.pack(">IHHHI", 8, int(compressed), 0, 0, 0)
    start = 20
    return b"qres" + struct.pack(">4I", 1, start, start + len(tree), start + len(tree) + len(data)) + tree + data + names


@pytest.mark.parametrize("compressed", [False, True])
def test_qt_resources_are_read(compressed: bool) -> None:
    assert list(read_rcc(rcc(compressed))) == [("a/b.txt", b"hello")]


def test_other_files_and_damaged_archives_are_refused() -> None:
    with pytest.raises(ValueError, match="no Qt resource archive"):
        list(read_rcc(b"PK\3\4" + bytes(20)))
    with pytest.raises(ValueError, match="damaged"):
        list(read_rcc(rcc(True)[:30]))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Expat", "MIT"),
        ("public-domain", "LicenseRef-public-domain"),
        ("CC-BY-2.0", "CC-BY-2.0"),
        ("CC0-1.0 and CC-BY-3.0", "CC0-1.0 AND CC-BY-3.0"),
        ("CC-BY-SA-4.0", None),
        ("CC-BY-NC-2.0", None),
        ("CC0-1.0 and GPL-3", None),
        ("GPL-3+", None),
        ("GNU-FDL", None),
        ("", None),
    ],
)
def test_licences_that_ask_for_more_than_a_name_are_left_out(name: str, expected: str | None) -> None:
    assert spdx(name) == expected
    assert is_permissive(name) == (expected is not None)


def test_a_debian_copyright_file_names_the_licence_of_each_picture() -> None:
    entries = list(
        read_dep5(
            "Format: x\n\nFiles: *\nCopyright: A\nLicense: GPL-3+\n\n"
            "Files: images/*\nCopyright: B\nLicense: CC-BY-SA-4.0\n\n"
            "Files: images/land/*\nCopyright: C\nLicense: public-domain\n text\n\n"
            "Files: images/land/*-harro*\nCopyright: D\nLicense: CC-BY-SA-4.0\n\n"
            "Files: images/land/desert1*\n images/land/sea.png\nCopyright: E\nLicense: CC0-1.0\n"
        )
    )
    assert licence_of("images/land/fog.jpg", entries) == Licence(("images/land/*",), "public-domain", "C")
    assert licence_of("images/land/sea.webp", entries) == entries[-1]
    assert licence_of("images/land/desert10-harro.jpg", entries) is None, "two entries disagree"
    assert licence_of("images/ship.png", entries) is None
    assert licence_of("other.png", entries) is None


def test_an_archive_cannot_write_outside_its_folder(tmp_path: Path) -> None:
    path = tmp_path / "bad.tgz"
    with tarfile.open(path, "w:gz") as archive:
        member = tarfile.TarInfo("../escaped.txt")
        member.size = 2
        archive.addfile(member, io.BytesIO(b"no"))
    with pytest.raises(FetchError, match=r"bad\.tgz cannot be unpacked"):
        unpack(path, tmp_path / "in" / "side")
    assert not list(tmp_path.rglob("escaped.txt"))
    with zipfile.ZipFile(tmp_path / "bad.whl", "w") as wheel:
        wheel.writestr("../../escaped.txt", "no")
    unpack(tmp_path / "bad.whl", tmp_path / "in" / "wheel")
    assert list(tmp_path.rglob("escaped.txt")) == [tmp_path / "in" / "wheel" / "escaped.txt"]
    (tmp_path / "cut.whl").write_bytes(b"PK\3\4")
    with pytest.raises(FetchError, match=r"cut\.whl cannot be unpacked"):
        unpack(tmp_path / "cut.whl", tmp_path / "in" / "cut")


def photo(name: str, fingerprint: int) -> dict[str, object]:
    return {"source": "package 1", "path_in_source": name, "fingerprint": fingerprint, "author": "Various", "others": False}


def test_the_split_depends_on_nothing_but_the_picture() -> None:
    names = [f"picture {number}" for number in range(4000)]
    first = [held_out(name, 0.15) for name in names]
    assert first == [held_out(name, 0.15) for name in names]
    assert np.mean(first) == pytest.approx(0.15, abs=0.02)


def test_photographs_alike_stay_together_and_copies_are_dropped() -> None:
    far = 0xFFFF_FFFF_0000_0000
    entries = [photo(f"{number}a", far ^ (number * 0x0123_4567_89AB_CDEF) % 2**64) for number in range(40)]
    alike = [photo(f"{number}b", entry["fingerprint"] ^ 0xFF) for number, entry in enumerate(entries)]  # type: ignore[operator]
    split = [entry["split"] for entry in split_photos([*entries, *alike])]
    assert split[:40] == split[40:]
    assert without_near_duplicates([photo("a", 0), photo("copy", 3), photo("b", 2**40 - 1)]) == [
        photo("a", 0),
        photo("b", 2**40 - 1),
    ]


def test_photographs_of_some_authors_are_kept_for_evaluation_with_their_scenes() -> None:
    """An author's photographs are all of one kind; a scene is never both trained on and held out."""
    far = [(number * 0x9E37_79B9_7F4A_7C15) % 2**64 for number in range(120)]
    entries = [photo(str(number), value) | {"author": f"author {number % 30}"} for number, value in enumerate(far)]
    entries += [photo("same scene", far[0] ^ 0xFF) | {"author": "author 1"}]
    entries += [photo("kept", 0x0F0F_0F0F_0F0F_0F0F) | {"others": True, "author": "Various"}]
    split = [(entry["author"], entry["split"]) for entry in split_photos(entries)]
    trained, others = ({author for author, name in split if name == wanted} for wanted in ("train", "others"))
    assert trained & others <= {"author 0", "author 1"} and len(others) < len(trained)
    assert split[0][1] == split[-2][1]
    assert split[-1] == ("Various", "others")
