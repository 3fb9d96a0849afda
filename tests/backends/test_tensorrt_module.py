from __future__ import annotations

import sys
import threading

import pytest

from tests.support.fake_cuda import FakeCuda
from tests.support.fake_gpu import FakeTensorRT, install
from tokenflow_sdk.backends.tensorrt_module import import_tensorrt, tensorrt_logger
from tokenflow_sdk.errors import ArgumentError, MissingPackageError


def test_flavours_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ArgumentError, match="no backend 'tvm'.*tensorrt, tensorrt-rtx"):
        import_tensorrt("tvm")
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(MissingPackageError, match=r"tensorrt cannot be imported.*tokenflow-sdk\[tensorrt\]"):
        import_tensorrt("tensorrt")


@pytest.mark.parametrize(
    ("version", "enough"), [("10.3.0.26", False), ("10.12.9", False), ("10.13.0.35", True), ("11.4.0", True)]
)
def test_an_old_tensorrt_is_named(monkeypatch: pytest.MonkeyPatch, version: str, enough: bool) -> None:
    trt = install(monkeypatch)[1]
    trt.__version__ = version
    if enough:
        assert import_tensorrt("tensorrt") is trt
    else:
        with pytest.raises(MissingPackageError, match=rf"tensorrt {version} is installed.* older than 10\.13.*--upgrade"):
            import_tensorrt("tensorrt")


def test_a_log_is_one_for_a_module_and_is_heard_by_who_listens() -> None:
    trt = FakeTensorRT(FakeCuda())
    log, severity = tensorrt_logger(trt), trt.Severity
    assert tensorrt_logger(trt) is log
    log.log(severity.ERROR, "nobody listens")
    with log.collect() as outer:
        log.log(severity.WARNING, "careful")
        with log.collect() as inner:
            thread = threading.Thread(target=log.log, args=(severity.INTERNAL_ERROR, "broken"))
            thread.start()
            thread.join()
        log.log(severity.ERROR, "later")
    assert (list(outer.warnings), list(outer.errors)) == (["careful"], ["broken", "later"])
    assert (list(inner.warnings), list(inner.errors)) == ([], ["broken"])
    assert log.collectors == ()


def test_a_log_does_not_grow_for_ever() -> None:
    log = tensorrt_logger(trt := FakeTensorRT(FakeCuda()))
    with log.collect() as messages:
        for number in range(1000):
            log.log(trt.Severity.WARNING, str(number))
    assert len(messages.warnings) == 50
    assert messages.warnings[-1] == "999"
