"""`python -m tests.support.hanging_storage FUNCTION:PART WORDS`: runs `tokenflow WORDS` where a bucket no longer answers.

The bucket is fsspec's file system in memory, with pictures in `memory://in` and `memory://tars`, and what a job made of them in
`memory://made`. FUNCTION of it never returns for paths that hold PART; when it is called, `hangs` is printed.
"""

from __future__ import annotations

import io
import sys
import tarfile
import threading
from typing import Any

from fsspec.implementations.memory import MemoryFileSystem

from tests.support.dataset_jobs import fake_tokenizer, picture
from tokenflow_sdk.cli import main
from tokenflow_sdk.cli import tokenize as command


def _fill(bucket: MemoryFileSystem) -> None:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for i in range(40):
            bucket.pipe_file(f"/in/{i:03d}.png", picture(i))
            member = tarfile.TarInfo(f"{i:03d}.png")
            member.size = len(picture(i))
            archive.addfile(member, io.BytesIO(picture(i)))
    bucket.pipe_file("/tars/a.tar", packed.getvalue())


def _hang(function: str, part: str) -> None:
    plain = getattr(MemoryFileSystem, function)

    def call(bucket: MemoryFileSystem, *arguments: Any, **options: Any) -> Any:
        if any(isinstance(each, str) and part in each for each in arguments):
            sys.stdout.write("hangs\n")
            sys.stdout.flush()
            threading.Event().wait()
        return plain(bucket, *arguments, **options)

    setattr(MemoryFileSystem, function, call)


if __name__ == "__main__":
    command._open = lambda arguments: [fake_tokenizer()]  # type: ignore[assignment]
    _fill(MemoryFileSystem())
    main(["tokenize", "memory://in", "-o", "memory://made", "--shard-size", "8", "-q", "--format", "webdataset"])
    _hang(*sys.argv[1].split(":"))
    sys.exit(main(sys.argv[2:]))
