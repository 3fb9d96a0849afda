"""An edge appliance: pictures that appear in a folder become `.tfc` files, and first a preview of each for a slow line.

    python examples/appliance.py INBOX OUTBOX

OUTBOX/previews gets the first scales of each file, some hundred bytes that decode to a coarse picture; OUTBOX gets all of it.
A service manager runs it; SIGTERM or Ctrl-C ends it after the picture that it works on, and started again it goes on.
"""

import argparse
import signal
import sys
import threading
from pathlib import Path

from tokenflow_sdk import TokenFlowError, Tokenizer, errors
from tokenflow_sdk.files import file_status, write_atomic


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inbox", type=Path)
    parser.add_argument("outbox", type=Path)
    parser.add_argument("--bundle", default="tiny")
    parser.add_argument("--scales", type=int, default=4, help="of a preview")
    parser.add_argument("--interval", type=float, default=1.0, help="seconds between looks; files unchanged by then are whole")
    arguments = parser.parse_args()
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    inbox, outbox, before, bad = arguments.inbox, arguments.outbox, dict[Path, object](), dict[Path, object]()
    with Tokenizer.from_pretrained(arguments.bundle) as tokenizer:
        scales = range(1, len(tokenizer.config.patch_nums) + 1)
        if not inbox.is_dir() or arguments.scales not in scales or not arguments.interval > 0:
            parser.error(f"INBOX must be a folder, --scales 1 to {scales[-1]}, and --interval above 0")
        (outbox / "previews").mkdir(parents=True, exist_ok=True)
        tokenizer.load("encode")
        print(f"watching {inbox}", flush=True)
        while not ended.wait(arguments.interval):
            now = {path: (s.st_size, s.st_mtime_ns) for path in inbox.iterdir() if path.is_file() and (s := file_status(path))}
            for path in sorted(path for path, state in now.items() if before.get(path) == state != bad.get(path)):
                target = outbox / f"{path.name}.tfc"
                try:
                    if not target.exists() and not ended.is_set():
                        data = (codes := tokenizer.encode(path)).to_bytes()
                        write_atomic(outbox / "previews" / target.name, data[: codes.scale_ends[arguments.scales - 1]])
                        write_atomic(target, data)
                        print(f"{path.name}  {len(data):,} bytes", flush=True)
                except TokenFlowError as error:
                    print(error, flush=True)
                    bad[path] = now[path] if isinstance(error, errors.ImageError) else None  # others may pass, as a full disk
            before = now
    print("ended")


if __name__ == "__main__":
    try:
        main()
    except (TokenFlowError, OSError) as error:
        sys.exit(f"error: {error}")
