from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tokenflow_sdk.forking import no_fork

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")

_CHILDREN = """
import gc, os, sys, time, warnings
warnings.simplefilter("ignore")
from tokenflow_sdk import Tokenizer
tokenizer = Tokenizer.from_pretrained(sys.argv[1], threads=2).load("encode", "features")
for what in ("pass", "tokenizer.close()", "del tokenizer; gc.collect()"):
    child = os.fork()
    if child == 0:
        exec(what)
        sys.exit(0)
    for _ in range(600):
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            print(what, os.waitstatus_to_exitcode(status))
            break
        time.sleep(0.02)
    else:
        os.kill(child, 9)
        print(what, "hung")
"""


def test_forked_children_end(mini_bundle: Path) -> None:
    # As users have it: onnxruntime's telemetry is off because the SDK says so.
    environment = {key: value for key, value in os.environ.items() if key != "ORT_DISABLE_TELEMETRY"}
    done = subprocess.run(
        [sys.executable, "-c", _CHILDREN, str(mini_bundle)], capture_output=True, text=True, timeout=120, env=environment
    )
    assert done.stdout.splitlines() == ["pass 0", "tokenizer.close() 0", "del tokenizer; gc.collect() 0"], done.stderr


def _fork_and_wait() -> None:
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_waits_for_the_blocks_of_other_threads() -> None:
    inside, leave, order = threading.Event(), threading.Event(), []

    def work() -> None:
        with no_fork():
            inside.set()
            leave.wait(30)
            order.append("block")

    def fork() -> None:
        _fork_and_wait()
        order.append("fork")

    worker, forker = threading.Thread(target=work), threading.Thread(target=fork)
    worker.start()
    assert inside.wait(30)
    forker.start()
    time.sleep(0.05)
    assert order == []
    leave.set()
    worker.join(30)
    forker.join(30)
    assert order == ["block", "fork"]


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_thread_may_fork_and_enter_blocks_inside_its_own() -> None:
    ended = threading.Event()

    def work() -> None:
        # As a signal handler does that runs in the middle of a block.
        with no_fork(), no_fork():
            _fork_and_wait()
            with no_fork():
                ended.set()

    threading.Thread(target=work, daemon=True).start()
    assert ended.wait(30)
