from __future__ import annotations

import logging
import re
import threading
import time

import pytest

from tests.support.waiting import comes_true
from tokenflow_sdk.steps import StepLog


def names() -> set[str]:
    return {thread.name for thread in threading.enumerate()}


def test_a_line_a_step_and_more_while_one_lasts(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "tokenflow_sdk"), StepLog("tokenflow_sdk", every=0.01) as log:
        log.start("reading")
        log.start("tracing")
        log.fraction(0.5)
        assert comes_true(lambda: any(re.fullmatch(r"tracing: 50% done, \d+ s", line) for line in caplog.messages))
    assert caplog.messages[:1] == ["reading"]
    assert "tracing" in caplog.messages
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
