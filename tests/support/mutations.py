"""Damaged and hostile variants of files, from a seed; and what a directory may hold instead of a file."""

from __future__ import annotations

import copy
import json
import os
import random
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ODD: tuple[object, ...] = (
    *(None, True, -1, 0, 3, 1.5, 10**30, 2**31, float("nan"), float("inf"), "", "x", "../x", "/etc/passwd", "a\0b", "\ud800"),
    *([], {}, [[]], [None], ["x", -1], {"a": 1}, "9" * 300, [10**30]),
)
"""Values of JSON that a reader might not expect."""


def mutated_json(data: object, rng: random.Random) -> object:
    """A copy in which a value is replaced by another, or a key is lost, renamed or copied."""
    data = copy.deepcopy(data)
    places: list[tuple[Any, Any]] = []
    unread: list[Any] = [data]
    while unread:
        node = unread.pop()
        keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else []
        places += [(node, key) for key in keys]
        unread += [node[key] for key in keys]
    node, key = rng.choice(places)
    kind = rng.randrange(5)
    if kind == 0:
        del node[key]
    elif kind == 1 and isinstance(node, dict):
        node[str(rng.choice(ODD))] = node.pop(key)
    elif kind == 2:
        other, at = rng.choice(places)
        node[key] = copy.deepcopy(other[at]) if at in other or (isinstance(other, list) and at < len(other)) else None
    else:
        node[key] = rng.choice(ODD)
    return data


def mutated_text(data: object, rng: random.Random) -> bytes:
    """A file of JSON with one or two odd values, or damaged as text."""
    for _ in range(rng.randint(1, 2)):
        data = mutated_json(data, rng) if isinstance(data, (dict, list)) and data else data
    content = json.dumps(data).encode()
    return mutated_bytes(content, rng) if rng.random() < 0.2 else content


def mutated_bytes(content: bytes, rng: random.Random) -> bytes:
    """Bytes of which some are flipped, lost, repeated or foreign."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8))):
        start = rng.randrange(len(data) + 1)
        end = min(len(data), start + rng.choice((1, 1, 4, 64, len(data))))
        kind = rng.randrange(4)
        if kind == 0:
            data[start:end] = rng.randbytes(end - start)
        elif kind == 1:
            del data[start:end]
        elif kind == 2:
            data[start:start] = data[start:end]
        else:
            data[start:end] = rng.choice((b"\xff", b"\0", b"[", b'"', b"9")) * min(end - start, 5000)
    return bytes(data)


def put_pipe(path: Path) -> None:
    os.mkfifo(path)


def put_directory(path: Path) -> None:
    path.mkdir()


def put_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def put_socket(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # the path of a socket has 107 bytes at most
    try:
        with socket.socket(socket.AF_UNIX) as found:
            found.bind(path.name)
    finally:
        os.chdir(here)


def put_link_to_itself(path: Path) -> None:
    path.symlink_to(path.name)


SPECIAL: tuple[Callable[[Path], None], ...] = (put_pipe, put_directory, put_device, put_socket, put_link_to_itself)
"""Put something in the place of a file that is none."""


@contextmanager
def no_hang(seconds: int = 20) -> Iterator[None]:
    """Fail instead of waiting for ever. The exception is none that code would translate."""

    class Hang(BaseException):
        pass

    def stop(number: int, frame: object) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
