"""The example for Ray Serve, in a Ray of its own on this machine."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import psutil
import pytest
import yaml

from tests.conftest import ROOT

EXAMPLE = ROOT / "examples" / "ray_serve"
PHOTO = (ROOT / "examples" / "chelsea.jpg").read_bytes()


def wait_for(condition: Callable[[], bool], what: str, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.2)


def answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz").status_code == 200
    except httpx.TransportError:
        return False


@pytest.fixture(scope="module")
def ray_serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[psutil.Process, str]]:
    """`serve run` with two replicas of one core each, and its address."""
    pytest.importorskip("ray.serve", reason="`pip install 'ray[serve]'` runs this")
    tmp_path = tmp_path_factory.mktemp("ray")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    config = yaml.safe_load((EXAMPLE / "cpu.yaml").read_text())
    config["http_options"]["port"] = port
    (deployment,) = config["applications"][0]["deployments"]
    deployment["ray_actor_options"] = {"num_cpus": 1}
    deployment["autoscaling_config"] |= {"min_replicas": 2, "max_replicas": 2}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    # Ray's sockets are below it, and the name of a socket must be short.
    directory = tempfile.mkdtemp(prefix="ray")
    path = os.pathsep.join([str(EXAMPLE), *filter(None, sys.path)])
    own = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_TMPDIR": directory, "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    environment = os.environ | own | {"PYTHONPATH": path}
    command = [sys.executable, "-m", "ray.serve.scripts", "run", str(tmp_path / "config.yaml")]
    with (tmp_path / "log").open("w") as log:
        process = psutil.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        url = f"http://127.0.0.1:{port}"
        wait_for(lambda: answers(url), "no replica got ready")
        yield process, url
    finally:
        started = process.children(recursive=True)
        process.send_signal(signal.SIGTERM)
        psutil.wait_procs([process], timeout=30)
        for left in psutil.wait_procs(started, timeout=10)[1]:
            left.kill()
        shutil.rmtree(directory, ignore_errors=True)


def replicas(ray: psutil.Process) -> set[int]:
    """Processes of replicas, which Ray names after what they run."""
    found = set()
    for child in ray.children(recursive=True):
        try:
            name = " ".join(child.cmdline())
        except psutil.Error:
            continue
        if name.startswith("ray::ServeReplica:tokenflow"):
            found.add(child.pid)
    return found


@pytest.mark.slow
def test_a_replica_that_dies_under_load_costs_clients_a_retry(ray_serve: tuple[psutil.Process, str]) -> None:
    ray, url = ray_serve
    wait_for(lambda: len(replicas(ray)) == 2, "there are no two replicas")
    before, done, found, failed = replicas(ray), threading.Semaphore(0), set(), []

    def ask(_: int) -> None:
        """As clients do: again after a moment if the connection breaks or the server says that the fault is its own."""
        for _ in range(100):
            try:
                answer = httpx.post(
                    f"{url}/v1/images/tokens", content=PHOTO, headers={"Content-Type": "image/jpeg"}, timeout=60
                )
            except httpx.TransportError as error:
                failed.append(repr(error))
            else:
                if answer.status_code == 200:
                    found.add(tuple(answer.json()["data"][0]["indices"]))
                    done.release()
                    return
                assert answer.status_code >= 500 or answer.status_code == 429, answer.text
                failed.append(answer.text)
            time.sleep(0.1)
        raise AssertionError(f"no retry succeeded: {failed[-3:]}")

    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(ask, number) for number in range(120)]
        for _ in range(20):
            assert done.acquire(timeout=60)
        os.kill(min(before), signal.SIGKILL)
        for each in asked:
            each.result()
    assert len(found) == 1
    # Eight clients at once: some of them had asked the replica that died.
    assert failed
    wait_for(lambda: len(replicas(ray)) == 2 and min(before) not in replicas(ray), "no other replica took its place")


@pytest.mark.slow
def test_the_limits_of_the_app_hold_behind_rays_proxy(ray_serve: tuple[psutil.Process, str]) -> None:
    _, url = ray_serve

    def code(answer: httpx.Response) -> tuple[int, str]:
        return answer.status_code, answer.json()["error"]["code"]

    def parts() -> Iterator[bytes]:
        yield from [b"x" * 1_000_000] * 33

    assert code(httpx.post(f"{url}/v1/images/tokens", content=parts(), timeout=60)) == (413, "body_too_large")
    assert code(httpx.get(f"{url}/v1/models", headers={"Host": "other.example"})) == (403, "forbidden")
    body = {"prompt": "a red apple", "stream": True, "partial_scales": [1]}
    with httpx.stream("POST", f"{url}/v1/images/generations", json=body, timeout=60) as answer:
        names = re.findall(r"^event: (.*)$", answer.read().decode(), re.MULTILINE)
    assert names == ["image_generation.partial_image", "image_generation.completed"]


def test_the_example_is_short_and_its_configs_name_what_it_has() -> None:
    code = (EXAMPLE / "tokenflow_on_ray.py").read_text()
    assert len(code.splitlines()) < 60
    assert "\nclass TokenFlow:" in code and "\napp = " in code
    for name in ("cpu", "gpu"):
        config = yaml.safe_load((EXAMPLE / f"{name}.yaml").read_text())
        (application,) = config["applications"]
        (deployment,) = application["deployments"]
        assert (application["import_path"], deployment["name"]) == ("tokenflow_on_ray:app", "TokenFlow")
        assert deployment["ray_actor_options"].get("num_gpus", 0) == (0.5 if name == "gpu" else 0)
