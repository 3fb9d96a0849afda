"""Measures `tokenflow serve` on this machine's loopback against calling the SDK, and against plain services.

One photo is encoded. The sides take turns in every round, and medians over the rounds are compared: the SDK's own best with
`encode_iter`; the server; a service that answers one request at a time (`http.server` and one `Tokenizer`); and the least that
FastAPI does, a function that encodes in a thread and answers with the codes, without limits, keys or metrics. Each service
is asked by one client, in turns with a call of the SDK here, and what it takes longer is its overhead; by 32 clients at once,
in turns with `encode_iter`; and by requests that come at random (Poisson) at 70 % of what it answered then. All clients are
threads of this process, with `http.client`: they take the same cores, and that one takes least. Ray Serve is a side if a Python
with `ray[serve]` is named.

    python benchmarks/server.py --ray .venv/bin/python
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import repeat
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import urlsplit

import httpx
import uvicorn
from fastapi import FastAPI, Request, Response

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.common import machine
from tokenflow_sdk import Tokenizer
from tokenflow_sdk.backends.cores import available_cores
from tokenflow_sdk.server.run import listen

PHOTO = ROOT / "examples" / "chelsea.jpg"
CLIENTS = 32
TURNS = 3
"""In which many clients and `encode_iter` alternate: a machine may be a tenth slower a minute later."""
JPEG = {"Content-Type": "image/jpeg"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", default="tiny")
    parser.add_argument("--requests", type=int, default=160, help="in each measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "server_cpu")
    parser.add_argument("--ray", metavar="PYTHON", help="one that has ray[serve], to measure Ray Serve as well")
    parser.add_argument("--run", choices=("plain", "least"), help="run that service instead")
    arguments = parser.parse_args()
    if arguments.run:
        {"plain": plain, "least": least}[arguments.run](arguments.bundle)
        return
    serve = [sys.executable, "-m", "tokenflow_sdk", "serve", "--port", "0", "--no-access-log", "--max-queue", "256"]
    bundle = ["--tokenizer", arguments.bundle, "--generator", "none"]
    own = [sys.executable, __file__, "--bundle", arguments.bundle, "--run"]
    services: dict[str, Callable[[], AbstractContextManager[tuple[str, float]]]] = {
        "tokenflow serve": lambda: service([*serve, *bundle], "/v1/images/tokens"),
        "one at a time": lambda: service([*own, "plain"], "/"),
        "FastAPI's least": lambda: service([*own, "least"], "/"),
    }
    if arguments.ray:
        services["Ray Serve"] = lambda: ray_serve(arguments.ray, arguments.bundle)
    rounds, starts = [], []
    with Tokenizer.from_pretrained(arguments.bundle).load("encode") as tokenizer:
        for _ in range(arguments.rounds):
            found = {"sdk": sdk(tokenizer, arguments.requests)}
            for side, begin in services.items():
                # Each runs alone: an idle Ray takes some of the cores too.
                with begin() as (url, seconds):
                    found[side] = measure(url, arguments.requests, tokenizer)
                starts += [seconds] if side == "tokenflow serve" else []
            rounds.append(found)
    sides = {side: {key: median(each[side][key] for each in rounds) for key in rounds[0][side]} for side in rounds[0]}
    report = {
        "bundle": arguments.bundle,
        "requests": arguments.requests,
        "rounds": arguments.rounds,
        "start_seconds": median(starts),
    }
    report |= machine() | {"cores": available_cores(), "sides": sides}
    arguments.out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    text = page(report)
    arguments.out.with_suffix(".md").write_text(text)
    print(text)


def measure(url: str, requests: int, tokenizer: Tokenizer) -> dict[str, float]:
    """Latency of one client and how much more it is than the SDK's, throughput of many, and latencies at 70 % of that."""
    data, place, own = PHOTO.read_bytes(), urlsplit(url), threading.local()

    def ask() -> float:
        """One request, on the connection of this thread."""
        began = time.perf_counter()
        if not hasattr(own, "connection"):
            own.connection = HTTPConnection(place.netloc, timeout=120)
        own.connection.request("POST", place.path or "/", data, JPEG)
        answer = own.connection.getresponse()
        answer.read()
        if answer.status != 200:
            raise SystemExit(f"{url} answered {answer.status}")
        return time.perf_counter() - began

    ask()
    one = [(ask(), timed(lambda: tokenizer.encode(data))) for _ in range(requests)]
    overhead = median(asked - called for asked, called in one)
    rates, shares = [], []
    with ThreadPoolExecutor(CLIENTS) as pool:
        list(pool.map(lambda _: ask(), range(CLIENTS)))
        for _ in range(TURNS):
            own_rate = requests / timed(lambda: list(tokenizer.encode_iter(repeat(data, requests))))
            rates.append(requests / timed(lambda: list(pool.map(lambda _: ask(), range(requests)))))
            shares.append(rates[-1] / own_rate)
    loaded = sorted(at_rate(ask, 0.7 * median(rates), requests * 2))
    found = {
        "ms": 1000 * median(asked for asked, _ in one),
        "over": 1000 * overhead,
        "rate": median(rates),
        "share": median(shares),
    }
    return found | {"p50": 1000 * share(loaded, 0.5), "p99": 1000 * share(loaded, 0.99)}


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


def sdk(tokenizer: Tokenizer, requests: int) -> dict[str, float]:
    """Latency of `encode` in one thread, and throughput of `encode_iter`."""
    data = PHOTO.read_bytes()
    one = median(timed(lambda: tokenizer.encode(data)) for _ in range(requests))
    seconds = timed(lambda: list(tokenizer.encode_iter(repeat(data, requests * 2))))
    return {"ms": 1000 * one, "rate": requests * 2 / seconds}


def timed(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


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


def least(bundle: str) -> None:
    """As `plain`, in the framework of `tokenflow serve`."""
    tokenizer = Tokenizer.from_pretrained(bundle).load("encode")
    pool, app, listener = ThreadPoolExecutor(tokenizer.lanes()), FastAPI(), listen("127.0.0.1", 0)

    @app.post("/")
    async def tokens(request: Request) -> Response:
        data = await request.body()
        codes = await asyncio.get_running_loop().run_in_executor(pool, tokenizer.encode, data)
        return Response(json.dumps({"indices": codes.indices.tolist()}), media_type="application/json")

    print(f"listening at http://127.0.0.1:{listener.getsockname()[1]}\nready", file=sys.stderr, flush=True)
    uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, http="h11", timeout_keep_alive=60)).run(
        sockets=[listener]
    )


@contextmanager
def service(command: list[str], path: str) -> Iterator[tuple[str, float]]:
    """A service in a process of its own: the address of a path, and the seconds until it was ready."""
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
        yield url + path, seconds
    finally:
        process.terminate()
        process.wait()


@contextmanager
def ray_serve(python: str, bundle: str) -> Iterator[tuple[str, float]]:
    """As `service`, of the example on a Ray of its own: one replica, which has all cores, as the other services have."""
    with socket.create_server(("127.0.0.1", 0)) as free, tempfile.TemporaryDirectory(prefix="ray") as directory:
        port, cores = free.getsockname()[1], available_cores()
        free.close()
        named = {"TOKENIZER": bundle, "GENERATOR": "none", "MAX_QUEUE": "256", "ACCESS_LOG": "0"}
        variables = {f"TOKENFLOW_SERVE_{name}": value for name, value in named.items()}
        replica = {"num_replicas": 1, "ray_actor_options": {"num_cpus": cores}, "max_ongoing_requests": 256}
        app: dict[str, Any] = {"name": "tokenflow", "route_prefix": "/", "import_path": "tokenflow_on_ray:app"}
        app |= {"runtime_env": {"env_vars": variables}, "deployments": [{"name": "TokenFlow", **replica}]}
        config = Path(directory) / "config.json"  # JSON is YAML
        config.write_text(json.dumps({"http_options": {"host": "127.0.0.1", "port": port}, "applications": [app]}))
        path = os.pathsep.join([str(ROOT / "examples" / "ray_serve"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        own = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_TMPDIR": directory, "PYTHONPATH": path}
        process = subprocess.Popen(
            [python, "-m", "ray.serve.scripts", "run", str(config)],
            env=os.environ | own, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        url, began = f"http://127.0.0.1:{port}", time.perf_counter()
        try:
            while not _answers(url):
                if process.poll() is not None:
                    raise SystemExit(f"Ray Serve ended with {process.returncode} before it was ready")
                time.sleep(0.5)
            yield url + "/v1/images/tokens", time.perf_counter() - began
        finally:
            process.terminate()
            process.wait()


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz").status_code == 200
    except httpx.TransportError:
        return False


def page(report: dict[str, Any]) -> str:
    sides = report["sides"]
    mine, sdk_side = sides["tokenflow serve"], sides["sdk"]
    lines = [
        "# `tokenflow serve`",
        "",
        f"{report['cpu']}, {report['cores']} cores; Python {report['python']}, onnxruntime {report['onnxruntime']}; "
        f"{report['bundle']}, one photo of 451 x 300 px, {report['requests']} requests a measurement, medians of "
        f"{report['rounds']} rounds; clients on the same machine. "
        f"`python benchmarks/server.py --requests {report['requests']} --rounds {report['rounds']}`.",
        "",
        "| | one client, median | more than the SDK | 32 clients | of `encode_iter` | at 70 %: p50 | p99 | p99 / p50 |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        f"| the SDK, called | {sdk_side['ms']:.1f} ms | | {sdk_side['rate']:.1f}/s (`encode_iter`) | | | | |",
    ]
    for side, found in sides.items():
        if side == "sdk":
            continue
        cells = [f"{found['ms']:.1f} ms", f"{found['over']:+.1f} ms"]
        cells += [f"{found['rate']:.1f}/s", f"{found['share']:.0%}", f"{found['p50']:.0f} ms", f"{found['p99']:.0f} ms"]
        lines.append(f"| {side} | {' | '.join(cells)} | {found['p99'] / found['p50']:.1f} |")
    lines += [
        "",
        f"The server adds {mine['over']:.1f} ms to a call, and reaches {mine['share']:.0%} of "
        f"the SDK's own best throughput. It was ready {report['start_seconds']:.1f} s after its start.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
