"""Clients ask a server everything at once, go away, send garbage; it is killed and started again. Nothing may be lost of it.

make soak-server SECONDS=60
"""

from __future__ import annotations

import argparse
import base64
import random
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable

import httpx
import openai
import psutil

from tests.server.test_malformed import PHOTO, bomb, request
from tests.soak.soak import WARM_UP
from tests.support.served import Served, running
from tokenflow_sdk import Codes

GROWTH = 1.05
"""Times the memory after the warm-up that the server may have at the end."""
JPEG = {"Content-Type": "image/jpeg"}


class Clients:
    """Threads that ask a server for anything.

    Args:
        served: what they ask.
        seed: of what each thread asks.
    """

    def __init__(self, served: Served, seed: int) -> None:
        self.served, self.seed = served, seed
        self.done: Counter[str] = Counter()
        self.problems: list[str] = []
        self._stop = threading.Event()
        # As the client of OpenAI tries again what failed on its way.
        self.openai = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=30, timeout=60)
        with httpx.Client(base_url=served.url, timeout=60) as client:
            self.codes = client.post("/v1/images/tokens", content=PHOTO, headers=JPEG).json()["data"][0]
            self.tfc = base64.b64decode(self.codes["tfc"])
            self.picture = client.post("/v1/images/decode", json={"tfc": self.codes["tfc"]}).content
        self.drawn = self.draw()
        self.files = [PHOTO, self.tfc, bomb(), b"", b"TFC"]
        assert Codes.from_bytes(self.tfc).complete

    def draw(self) -> str | None:
        found = self.openai.images.generate(model="gpt-image-1", prompt="a red apple", extra_body={"seed": 1, "preset": "fast"})
        return found.data[0].b64_json if found.data else None

    def actions(self, chance: random.Random, client: httpx.Client) -> list[Callable[[], None]]:
        codes = {"type": "image_codes", "image_codes": {"tfc": self.codes["tfc"]}}
        question = [{"role": "user", "content": [codes, {"type": "text", "text": "what?" * chance.randrange(1, 4)}]}]

        def encode() -> None:
            answer = client.post("/v1/images/tokens", content=PHOTO, headers=JPEG)
            assert answer.json()["data"][0] == self.codes, answer.text[:200]

        def decode() -> None:
            assert client.post("/v1/images/decode", json={"tfc": self.codes["tfc"]}).content == self.picture

        def generate() -> None:
            assert self.draw() == self.drawn

        def go_away() -> None:
            """Leave a stream after a few lines."""
            path, body = "/v1/images/generations", {"prompt": "a cup", "n": 2, "stream": True, "partial_scales": [1, 2]}
            if chance.random() < 0.5:
                path, body = "/v1/chat/completions", {"messages": question, "stream": True, "max_tokens": 20}
            with client.stream("POST", path, json=body) as answer:
                assert answer.status_code == 200, answer.read()
                lines = answer.iter_lines()
                for _ in range(chance.randrange(3)):
                    next(lines, None)

        def ask() -> None:
            answer = client.post("/v1/chat/completions", json={"messages": question, "max_tokens": 5})
            assert answer.status_code == 200, answer.text[:200]

        def garbage() -> None:
            path, body, headers = request(chance, self.files)
            answer = client.post(path, content=body, headers=headers)
            assert answer.status_code < 500, (path, answer.status_code, answer.text[:200])

        def watch() -> None:
            assert client.get("/readyz").status_code == client.get("/metrics").status_code == 200

        return [encode, decode, generate, go_away, garbage, watch, ask]

    def work(self, number: int) -> None:
        chance = random.Random(f"{self.seed} {number}")
        with httpx.Client(base_url=self.served.url, timeout=60) as client:
            actions = self.actions(chance, client)
            while not self._stop.is_set():
                action = chance.choice(actions)
                try:
                    action()
                except Exception as error:
                    self.problems.append(f"{action.__name__}: {type(error).__name__}: {error}")
                    self._stop.set()
                self.done[action.__name__] += 1

    def metric(self, name: str) -> float:
        """The sum of a metric over its labels."""
        lines = httpx.get(f"{self.served.url}/metrics").text.splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if re.split("[ {]", line)[0] == name)

    def run(self, seconds: float, workers: int) -> float:
        """Work for so long. Returns the server's memory afterwards, at rest, in bytes."""
        self._stop.clear()
        threads = [threading.Thread(target=self.work, args=(number,)) for number in range(workers)]
        for thread in threads:
            thread.start()
        self._stop.wait(seconds)
        self._stop.set()
        for thread in threads:
            thread.join()
        deadline = time.monotonic() + 30
        while self.metric("tokenflow_requests_under_way") and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(1)
        free, total = self.metric("tokenflow_pages_free"), self.metric("tokenflow_pages")
        if free < total:
            self.problems.append(f"{total - free:.0f} of {total:.0f} pages are lost")
        return float(psutil.Process(self.served.process.pid).memory_info().rss)

    def survive(self, kills: int) -> None:
        """Draw all the while that the server is killed and started again: all that is asked for must come in the end."""
        ended, failures = threading.Event(), []

        def ask() -> None:
            while not ended.is_set():
                try:
                    assert self.draw() == self.drawn
                except Exception as error:
                    failures.append(f"after a kill: {type(error).__name__}: {error}")
                self.done["generate, killed"] += 1

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        for _ in range(kills):
            time.sleep(random.Random(self.seed).uniform(0.5, 2))
            self.served.kill()
            self.served.start()
        time.sleep(1)
        ended.set()
        for thread in threads:
            thread.join()
        self.problems += failures


def soak(options: list[str], seconds: float, seed: int, kills: int, workers: int = 8) -> tuple[Clients, tuple[float, float]]:
    """Run a soak of a server with these options. What was not as it must be is in the clients' `problems`."""
    with running("--no-access-log", *options) as served:
        clients = Clients(served, seed)
        warm = clients.run(seconds * WARM_UP, workers)
        end = clients.run(seconds * (1 - WARM_UP), workers) if not clients.problems else warm
        if end > GROWTH * warm:
            clients.problems.append(f"memory grew from {warm / 2**20:.0f} to {end / 2**20:.0f} MiB")
        clients.survive(kills)
        if status := served.stop():
            clients.problems.append(f"it ended with {status}")
        clients.problems += [line for line in served.lines if "Traceback" in line or "rror" in line]
        return clients, (warm / 2**20, end / 2**20)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--kills", type=int, default=5)
    arguments = parser.parse_args()
    clients, memory = soak([], arguments.seconds, arguments.seed, arguments.kills)
    print(f"seed {arguments.seed}:", ", ".join(f"{count} {name}" for name, count in sorted(clients.done.items())))
    print("memory after warm-up and at the end:", " and ".join(f"{size:.0f} MiB" for size in memory))
    for problem in clients.problems:
        print(f"error: {problem}")
    return 1 if clients.problems else 0


if __name__ == "__main__":
    sys.exit(main())
