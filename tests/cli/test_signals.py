from __future__ import annotations

import signal
import threading
from collections.abc import Iterator

import pytest

from tokenflow_sdk.cli.exit_status import run

STOPPING = [number for name in ("SIGTERM", "SIGHUP") if (number := getattr(signal, name, None)) is not None]


@pytest.fixture(autouse=True)
def as_in_a_shell() -> Iterator[None]:
    before = {number: signal.signal(number, signal.SIG_DFL) for number in STOPPING}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", STOPPING)
def test_a_signal_ends_a_command_as_ctrl_c_does(number: signal.Signals, capsys: pytest.CaptureFixture[str]) -> None:
    cleaned = []

    def command() -> int:
        try:
            signal.raise_signal(number)
            return 0
        finally:
            signal.raise_signal(number)  # a second one, while the first is handled
            cleaned.append(True)

    assert run(command, interrupted="interrupted; nothing was written") == 128 + number
    assert cleaned == [True]
    assert capsys.readouterr().err == "interrupted; nothing was written\n"
    assert signal.getsignal(number) is signal.SIG_DFL


def test_a_terminal_that_is_gone_changes_no_status(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*_: object, **__: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("tokenflow_sdk.cli.exit_status.stderr.print", gone)
    assert run(lambda: signal.raise_signal(signal.SIGTERM) or 0) == 128 + signal.SIGTERM


@pytest.mark.parametrize("number", STOPPING)
def test_what_is_ignored_stays_ignored(number: signal.Signals) -> None:
    signal.signal(number, signal.SIG_IGN)
    assert run(lambda: signal.raise_signal(number) or 7) == 7
    assert signal.getsignal(number) is signal.SIG_IGN


def test_another_thread_may_run_a_command() -> None:
    found = []
    thread = threading.Thread(target=lambda: found.append(run(lambda: 7)))
    thread.start()
    thread.join()
    assert found == [7]
