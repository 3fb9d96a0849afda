"""Runs the app in uvicorn."""

from __future__ import annotations

import asyncio
import logging
import socket
import sys
import warnings
from contextlib import suppress

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from tokenflow_sdk.errors import ArgumentError, ColorProfileWarning
from tokenflow_sdk.server.app import create_app
from tokenflow_sdk.server.settings import LOOPBACK, Settings

__all__ = ["listen", "serve", "server_config"]

_LOG = logging.getLogger("tokenflow_sdk.server")


def serve(settings: Settings) -> None:
    """Serve until SIGTERM or Ctrl-C; then finish what was accepted, and return.

    Raises:
        TokenFlowError: the port is taken, or a bundle, the key file or a setting cannot be used.
    """
    failures: list[BaseException] = []

    def failed(error: BaseException) -> None:
        failures.append(error)
        server.should_exit = True

    app = create_app(settings, failed)
    listener = listen(settings.host, settings.port)
    _access_log()
    # It warns of each damaged form, whose sender is told already.
    logging.getLogger("python_multipart").setLevel(logging.ERROR)
    # Of a sender's picture; each has a text of its own, which Python would keep for ever.
    warnings.simplefilter("ignore", ColorProfileWarning)
    if settings.host not in LOOPBACK and settings.api_key_file is None:
        _LOG.warning("everybody who reaches %s may use this server; --api-key-file asks for keys", settings.host)
    server = uvicorn.Server(server_config(app, settings))
    host, port = listener.getsockname()[:2]
    _LOG.info("listening at http://%s:%d", f"[{host}]" if ":" in host else host, port)
    # uvicorn raises the signal that ended it again afterwards, and this was the orderly end.
    with listener, suppress(KeyboardInterrupt):
        server.run(sockets=[listener])
    if failures:
        raise failures[0]


def server_config(app: ASGIApp, settings: Settings) -> uvicorn.Config:
    """How uvicorn runs the app: with limits on what clients can hold, in bytes, connections and seconds."""
    return uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=max(1, round(settings.drain)),
        timeout_keep_alive=max(1, round(settings.body_timeout)),
        http=_Connection,  # httptools, which uvicorn takes where it is installed, has no limit for the head of a request
        ws="none",  # there is nothing to upgrade to, and an upgraded connection would have no limits
        h11_max_incomplete_event_size=64 * 1024,
        limit_concurrency=8 * settings.max_queue,
    )


class _Connection(H11Protocol):
    """A connection that is cut when its client lets it wait for `timeout_keep_alive` seconds: for the head of a request, the
    first or the next, or for reading what was written. uvicorn alone waits for ever for what a byte has begun.
    """

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        # Whatever the kernel does not take at once is unread, and counts: also after the last write, and while closing.
        transport.set_write_buffer_limits(high=0)
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop()

    def _watch(self) -> None:
        """Let the deadline run, from now unless it does, while the client is waited for and not the app."""
        if self.cycle is not None and not self.cycle.response_complete and not self.flow.write_paused:
            self._stop()
        elif self._deadline is None:
            self._deadline = self.loop.call_later(self.timeout_keep_alive, self.transport.abort)

    def _stop(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens at a host's port; 0: at any that is free.

    Raises:
        ArgumentError: the port is taken, or the host is none of this machine.
    """
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        plain = socket.create_server((str(address[0]), port), family=family, backlog=2048)
        # asyncio sends small packets at once (TCP_NODELAY) only on sockets that say that they are TCP's; others wait 40 ms.
        listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP, fileno=plain.detach())
    except OSError as error:
        raise ArgumentError(
            f"Nothing can listen at {host}:{port}: {(error.strerror or str(error)).lower()}.", "Give another --host or --port."
        ) from error
    listener.setblocking(False)
    return listener


def _access_log() -> None:
    """Write the access log to stderr as it is: a line of JSON a request."""
    logger = logging.getLogger("tokenflow_sdk.server.access")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.handlers = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False
