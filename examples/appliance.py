"""An edge appliance: pictures that appear in a folder become `.tfc` files, and first a preview of each for a slow line.

    python examples/appliance.py INBOX OUTBOX

OUTBOX/previews gets the first scales of each file, some hundred bytes that decode to a coarse picture; OUTBOX gets all of it.
A service manager runs it; SIGTERM or Ctrl-C ends it after the picture that it works on, and started again it goes on.
"""

from __future__ import annotations

import argparse
import signal
import threading
from pathlib import Path

from tokenflow_sdk import TokenFlowError, Tokenizer
from tokenflow_sdk.errors import ImageError
from tokenflow_sdk.files import file_status, write_atomic


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inbox", type=Path)
    parser.add_argument("outbox", type=Path)
    parser.add_argument("--bundle", default="tiny")
    parser.add_argument("--scales", type=int, default=4, help="of a preview")
    parser.add_argument("--interval", type=float, default=1.0, help="seconds between two looks into the inbox")
    arguments = parser.parse_args()
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    (arguments.outbox / "previews").mkdir(parents=True, exist_ok=True)
    before: dict[Path, tuple[int, int]] = {}
    bad: dict[Path, tuple[int, int]] = {}
    with Tokenizer.from_pretrained(arguments.bundle) as tokenizer:
        tokenizer.load("encode")
        while not ended.wait(arguments.interval):
            found = ((path, file_status(path)) for path in sorted(arguments.inbox.iterdir()))
            now = {path: (status.st_size, status.st_mtime_ns) for path, status in found if status is not None}
            # A file is whole once it does not change between two looks.
            for path in (path for path, state in now.items() if before.get(path) == state != bad.get(path)):
                target = arguments.outbox / f"{path.name}.tfc"
                try:
                    if not target.exists() and not ended.is_set():
                        data = (codes := tokenizer.encode(path)).to_bytes()
                        write_atomic(target.parent / "previews" / target.name, data[: codes.scale_ends[arguments.scales - 1]])
                        write_atomic(target, data)
                        print(f"{path.name}  {len(data):,} bytes", flush=True)
                except TokenFlowError as error:
                    print(error, flush=True)
                    if isinstance(error, ImageError):  # others, as a full disk, are tried again
                        bad[path] = now[path]
            before = now


if __name__ == "__main__":
    main()
