"""Measures `tokenflow serve` on this machine's loopback against calling the SDK, and against a plain one-at-a-time service.

One photo is encoded. The sides take turns in every round, and medians over the rounds are compared: the SDK in a process of
its own, called by one thread, and its own best with `encode_iter`; the server; and a service that answers one request at a
time (`http.server` and one `Tokenizer`). Each service is asked by one client; by 32 at once; and by requests that come at
random (Poisson) at 70 % of what it answered then. All clients are threads of this process.

    python benchmarks/server.py
"""

from __future__ import annotations

import argparse
import json
import random
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import repeat
from pathlib import Path
from statistics import median
from typing import Any

import httpx

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.common import machine
from tokenflow_sdk import Tokenizer
from tokenflow_sdk.backends.cores import available_cores

PHOTO = ROOT / "examples" / "chelsea.jpg"
CLIENTS = 32
JPEG = {"Content-Type": "image/jpeg"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", default="tiny")
    parser.add_argument("--requests", type=int, default=160, help="in each measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "server_cpu")
    parser.add_argument("--plain", action="store_true", help="run the plain service instead")
    parser.add_argument("--sdk", action="store_true", help="measure the SDK instead, a line for each line on stdin")
    arguments = parser.parse_args()
    if arguments.plain:
        plain(arguments.bundle)
        return
    if arguments.sdk:
        sdk(arguments.bundle, arguments.requests)
        return
    me = [sys.executable, __file__, "--bundle", arguments.bundle, "--requests", str(arguments.requests)]
    serve = [sys.executable, "-m", "tokenflow_sdk", "serve", "--port", "0", "--no-access-log", "--max-queue", "256"]
    bundle = ["--tokenizer", arguments.bundle, "--generator", "none"]
    rounds = []
    with (
        service([*serve, *bundle]) as (url, seconds),
        service([*me, "--plain"]) as (other, _),
        asked([*me, "--sdk"]) as ask_sdk,
    ):
        for _ in range(arguments.rounds):
            found = {"sdk": ask_sdk()}
            found["tokenflow serve"] = measure(url + "/v1/images/tokens", arguments.requests)
            found["one at a time"] = measure(other, arguments.requests)
            rounds.append(found)
    sides = {side: {key: median(each[side][key] for each in rounds) for key in rounds[0][side]} for side in rounds[0]}
    report = {"bundle": arguments.bundle, "requests": arguments.requests, "rounds": arguments.rounds, "start_seconds": seconds}
    report |= machine() | {"cores": available_cores(), "sides": sides}
    arguments.out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    text = page(report)
    arguments.out.with_suffix(".md").write_text(text)
    print(text)


def measure(url: str, requests: int) -> dict[str, float]:
    """Latency of one client, throughput of many, and latencies at 70 % of that."""
    data = PHOTO.read_bytes()
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    with httpx.Client(timeout=120, limits=limits) as client:

        def ask() -> float:
            began = time.perf_counter()
            client.post(url, content=data, headers=JPEG).raise_for_status()
            return time.perf_counter() - began

        ask()
        one = sorted(ask() for _ in range(requests))
        with ThreadPoolExecutor(CLIENTS) as pool:
            list(pool.map(lambda _: ask(), range(CLIENTS)))
            began = time.perf_counter()
            list(pool.map(lambda _: ask(), range(requests * 2)))
            rate = requests * 2 / (time.perf_counter() - began)
        loaded = sorted(at_rate(ask, 0.7 * rate, requests * 2))
    return {"ms": 1000 * median(one), "rate": rate, "p50": 1000 * share(loaded, 0.5), "p99": 1000 * share(loaded, 0.99)}


def at_rate(ask: Callable[[], float], rate: float, requests: int) -> list[float]:
    """Seconds of requests that come at random times, from when each should have begun."""
    chance = random.Random(0)  # noqa: S311
    due, times = 0.0, []
    for _ in range(requests):
        due += chance.expovariate(rate)
        times.append(due)
    began = time.perf_counter()

    def one(due: float) -> float:
        time.sleep(max(0.0, began + due - time.perf_counter()))
        ask()
        return time.perf_counter() - began - due

    with ThreadPoolExecutor(256) as pool:
        return list(pool.map(one, times))


def share(values: list[float], part: float) -> float:
    return values[min(len(values) - 1, int(part * len(values)))]


def sdk(bundle: str, requests: int) -> None:
    """For each line on stdin, measure `encode` in one thread and `encode_iter`, and print them."""
    data = PHOTO.read_bytes()
    with Tokenizer.from_pretrained(bundle) as tokenizer:
        tokenizer.encode(data)
        for _ in sys.stdin:
            times = []
            for _ in range(requests):
                began = time.perf_counter()
                tokenizer.encode(data)
                times.append(time.perf_counter() - began)
            began = time.perf_counter()
            list(tokenizer.encode_iter(repeat(data, requests * 2)))
            rate = requests * 2 / (time.perf_counter() - began)
            print(json.dumps({"ms": 1000 * median(times), "rate": rate}), flush=True)


def plain(bundle: str) -> None:
    """A service as one would write it first."""
    tokenizer = Tokenizer.from_pretrained(bundle).load("encode")

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            data = self.rfile.read(int(self.headers["Content-Length"]))
            body = json.dumps({"indices": tokenizer.encode(data).indices.tolist()}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Connection", "close")  # one at a time: the next client's turn
            self.end_headers()
            self.wfile.write(body)
            self.close_connection = True

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    server.socket.listen(512)
    print(f"listening at http://127.0.0.1:{server.server_port}\nready", file=sys.stderr, flush=True)
    server.serve_forever()


@contextmanager
def service(command: list[str]) -> Iterator[tuple[str, float]]:
    """A service in a process of its own: its address, and the seconds until it was ready."""
    began = time.perf_counter()
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stderr is not None
    url = ""
    try:
        for line in process.stderr:
            found = re.search(r"listening at (\S+)", line)
            url = found[1] if found else url
            if line.startswith("ready"):
                break
        else:
            raise SystemExit(f"{command} ended before it was ready")
        seconds = time.perf_counter() - began
        threading.Thread(target=process.stderr.read, daemon=True).start()
        yield url, seconds
    finally:
        process.terminate()
        process.wait()


@contextmanager
def asked(command: list[str]) -> Iterator[Callable[[], dict[str, float]]]:
    """A process that measures whenever it is asked."""
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdin is not None and process.stdout is not None
    stdin, stdout = process.stdin, process.stdout

    def ask() -> dict[str, float]:
        stdin.write("\n")
        stdin.flush()
        found: dict[str, float] = json.loads(stdout.readline())
        return found

    yield ask
    stdin.close()
    process.wait()


def page(report: dict[str, Any]) -> str:
    sides = report["sides"]
    mine, sdk_side = sides["tokenflow serve"], sides["sdk"]
    lines = [
        "# `tokenflow serve`",
        "",
        f"{report['cpu']}, {report['cores']} cores; Python {report['python']}, onnxruntime {report['onnxruntime']}; "
        f"{report['bundle']}, one photo of 451 x 300 px, {report['requests']} requests a measurement, medians of "
        f"{report['rounds']} rounds; clients on the same machine. `python benchmarks/server.py`.",
        "",
        "| | one client, median | 32 clients | at 70 % of that: p50 | p99 | p99 / p50 |",
        "| --- | --- | --- | --- | --- | --- |",
        f"| the SDK, called | {sdk_side['ms']:.1f} ms | {sdk_side['rate']:.1f}/s (`encode_iter`) | | | |",
    ]
    for side in ("tokenflow serve", "one at a time"):
        found = sides[side]
        cells = [f"{found['ms']:.1f} ms", f"{found['rate']:.1f}/s", f"{found['p50']:.0f} ms", f"{found['p99']:.0f} ms"]
        lines.append(f"| {side} | {' | '.join(cells)} | {found['p99'] / found['p50']:.1f} |")
    lines += [
        "",
        f"The server adds {mine['ms'] - sdk_side['ms']:.1f} ms to a call, and reaches {mine['rate'] / sdk_side['rate']:.0%} of "
        f"the SDK's own best throughput. It was ready {report['start_seconds']:.1f} s after its start.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
