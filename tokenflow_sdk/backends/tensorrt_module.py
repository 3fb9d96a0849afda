"""Import the Python module of TensorRT or TensorRT-RTX, create its objects, and collect its log messages."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, Literal

from tokenflow_sdk.errors import ArgumentError, BackendError, MissingPackageError

__all__ = ["FLAVOURS", "Flavour", "LogMessages", "create_or_raise", "import_tensorrt", "require_installed", "tensorrt_logger"]

Flavour = Literal["tensorrt", "tensorrt-rtx"]
FLAVOURS: dict[str, str] = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
"""Name of the Python module of each flavour."""
_OLDEST = {"tensorrt": (10, 13), "tensorrt-rtx": (1, 5)}


def require_installed(flavour: str) -> None:
    """Check that a flavour is installed, without importing it, which takes a second.

    Raises:
        ArgumentError: no such flavour.
        MissingPackageError: it is not installed.
    """
    if flavour not in FLAVOURS:
        raise ArgumentError(f"There is no backend {flavour!r} to build for.", f"Choose one of: {', '.join(FLAVOURS)}.")
    if FLAVOURS[flavour] not in sys.modules and importlib.util.find_spec(FLAVOURS[flavour]) is None:
        raise MissingPackageError(f"{flavour} is not installed.", f"Run `pip install 'tokenflow-sdk[{flavour}]'`.")


def import_tensorrt(flavour: str) -> ModuleType:
    """Import the Python module of a flavour.

    Args:
        flavour: `tensorrt` or `tensorrt-rtx`.

    Raises:
        ArgumentError: no such flavour.
        MissingPackageError: the package or a library it needs is not installed, or it is too old.
    """
    require_installed(flavour)
    try:
        module = importlib.import_module(FLAVOURS[flavour])
    except (ImportError, OSError) as error:
        raise MissingPackageError(
            f"{flavour} cannot be imported ({error}).", f"Run `pip install --force-reinstall 'tokenflow-sdk[{flavour}]'`."
        ) from error
    oldest = _OLDEST[flavour]
    if tuple(int(part) for part in re.findall(r"\d+", module.__version__)[:2]) < oldest:
        raise MissingPackageError(
            f"{flavour} {module.__version__} is installed, which is older than {'.'.join(map(str, oldest))}.",
            f"Run `pip install --upgrade 'tokenflow-sdk[{flavour}]'`.",
        )
    return module


_BUILD_NOTES = ("Total Activation Memory", "Total Weights Memory", "Layers:")
"""How the messages begin in which TensorRT tells what it has built."""


@dataclass(frozen=True)
class LogMessages:
    """The last 50 errors, warnings and notes on a build, bounded because a long-running service collects them."""

    errors: deque[str] = field(default_factory=lambda: deque(maxlen=50))
    warnings: deque[str] = field(default_factory=lambda: deque(maxlen=50))
    build_notes: deque[str] = field(default_factory=lambda: deque(maxlen=50))


_logs: dict[Any, Any] = {}
_logs_lock = threading.Lock()


def tensorrt_logger(trt: Any) -> Any:
    """The logger to give to a TensorRT module, one for the whole process because TensorRT uses only the first it is given.

    `with logger.collect() as messages:` collects all messages logged meanwhile, of any thread, as `LogMessages`.

    Args:
        trt: the module, from `import_tensorrt`.
    """
    with _logs_lock:
        if trt not in _logs:
            _logs[trt] = _make_log(trt)
        return _logs[trt]


def _make_log(trt: Any) -> Any:
    class Log(trt.ILogger):  # type: ignore[misc]
        """Gives messages to the current collectors instead of printing them."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.collectors: tuple[LogMessages, ...] = ()
            self.lock = threading.Lock()

        @contextmanager
        def collect(self) -> Iterator[LogMessages]:
            messages = LogMessages()
            with self.lock:
                self.collectors += (messages,)
            try:
                yield messages
            finally:
                with self.lock:
                    self.collectors = tuple(other for other in self.collectors if other is not messages)

        def log(self, severity: Any, text: str) -> None:
            for messages in self.collectors:
                if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                    messages.errors.append(text)
                elif severity == trt.ILogger.Severity.WARNING:
                    messages.warnings.append(text)
                elif text.startswith(_BUILD_NOTES):
                    messages.build_notes.append(text)

    return Log()


def create_or_raise(trt: Any, messages: LogMessages, create: Callable[[], Any]) -> Any:
    """Create a builder or a runtime, and raise if TensorRT returns none.

    Args:
        trt: the module, from `import_tensorrt`.
        messages: messages collected meanwhile, which the error quotes.
        create: creates the object.

    Raises:
        BackendError: TensorRT cannot start: the GPU or its driver is missing, or the driver is too old.
    """
    try:
        made = create()
    except (TypeError, RuntimeError) as error:
        # The Python bindings raise these where the library returns a null pointer.
        messages.errors.append(str(error).splitlines()[0])
        made = None
    if made is None:
        raise BackendError(
            f"{trt.__name__} {trt.__version__} does not start here: {'; '.join(messages.errors) or 'it does not say why'}.",
            "Update the NVIDIA driver to one for this TensorRT's CUDA (`nvidia-smi` shows what it supports), or use "
            "backend='onnxruntime'.",
        )
    return made
