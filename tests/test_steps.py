from __future__ import annotations

import logging
import threading
import time

import pytest

from tokenflow_sdk.steps import StepLog


def names() -> set[str]:
    return {thread.name for thread in threading.enumerate()}


def test_a_line_a_step_and_more_while_one_lasts(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "tokenflow_sdk"), StepLog("tokenflow_sdk", every=0.01) as log:
        log.start("reading")
        log.start("tracing")
        log.fraction(0.5)
        deadline = time.monotonic() + 10
        while "tracing: 50% done, 0 s" not in caplog.messages and time.monotonic() < deadline:
            time.sleep(0.005)
    assert caplog.messages[:1] == ["reading"]
    assert "tracing" in caplog.messages
    assert "tracing: 50% done, 0 s" in caplog.messages
    count = len(caplog.messages)
    time.sleep(0.05)
    assert len(caplog.messages) <= count + 1


def test_where_nobody_reads_nothing_runs(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "tokenflow_sdk"), StepLog("tokenflow_sdk") as log:
        before = names()
        log.start("quietly")
        assert names() == before
    assert caplog.messages == []
    with caplog.at_level(logging.INFO, "tokenflow_sdk"), StepLog("tokenflow_sdk") as log:
        log.start("brief", brief=True)
    assert caplog.messages == []
