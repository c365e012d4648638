"""Run the server: sockets and signals. A signal ends it in order: no new requests, those that run end, then exit."""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from types import FrameType

import uvicorn

from lorakit.errors import UsageError
from lorakit.serve.app import Access, make_app
from lorakit.serve.front import MOST_HEADER_BYTES, Front, LimitedProtocol
from lorakit.serve.service import Service
from lorakit.serve.traces import LogHandler, Metrics, log, log_error, observe

_LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
_LOGGERS = ("uvicorn.error", "asyncio", "lorakit.serve")
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True)
class Address:
    """Where a server listens."""

    host: str = "127.0.0.1"
    port: int = 8000

    @property
    def is_loopback(self) -> bool:
        """Return whether only this machine can reach the address."""
        try:
            return self.host == "localhost" or ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    def check(self, *, has_keys: bool) -> None:
        """Raise UsageError if others can reach the address, and there are no API keys."""
        if not self.is_loopback and not has_keys:
            text = f"--host {self.host} lets others use the server; pass --api-keys, or omit --host."
            raise UsageError(text, what=self.host, field="host")

    def bind(self) -> socket.socket:
        """Return a socket at the address, which does not accept connections yet.

        Raises:
            UsageError: The address is in use or not one of this machine.
        """
        listener = None
        try:
            family, kind, protocol, _, where = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)[0]
            listener = socket.socket(family, kind, protocol)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, os.name == "posix")
            listener.bind(where)
        except OSError as cause:
            if listener is not None:
                listener.close()
            text = f"cannot listen on {self.host}, port {self.port} ({cause.strerror}); pass another --host or --port."
            raise UsageError(text, what=self.port, field="port") from cause
        return listener


class Server(uvicorn.Server):
    """A server that ends with its service, and whose process continues after a signal.

    Args:
        service: The service, which has started.
        access: Who may use the server.
        address: Where it listens.
        listener: The socket at the address, see `Address.bind`.
    """

    def __init__(self, service: Service, access: Access, address: Address, listener: socket.socket) -> None:
        metrics = Metrics(service.counts)
        hosts = {*_LOOPBACK, f"[{address.host}]", address.host} if address.is_loopback else None
        front = Front(make_app(service, access, metrics), hosts, partial(observe, metrics))
        config = uvicorn.Config(
            front,
            address.host,
            address.port,
            http=LimitedProtocol,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            h11_max_incomplete_event_size=MOST_HEADER_BYTES,
            timeout_keep_alive=15,
            timeout_graceful_shutdown=int(access.timeout) + 5,
        )
        super().__init__(config)
        self._service, self._listener = service, listener
        self.port = int(listener.getsockname()[1])  # also if that of the address is 0

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until a signal, or until the service ends."""
        super().run(sockets or [self._listener])

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle signals within a block, in the main thread."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {one: signal.signal(one, self.handle_exit) for one in _SIGNALS}
        try:
            yield
        finally:
            for one, handler in before.items():
                signal.signal(one, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Accept no more requests, and end when those that run have ended; at once after a second SIGINT."""
        self._service.drain()
        super().handle_exit(sig, frame)

    async def on_tick(self, counter: int) -> bool:
        """Return whether the server ends."""
        return await super().on_tick(counter) or self._service.ended.is_set()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and say where."""
        await super().startup(sockets)
        if self.started:
            host = f"[{self.config.host}]" if ":" in self.config.host else self.config.host
            models = [served.id for served in self._service.models()]
            log("ready", url=f"http://{host}:{self.port}/v1", models=models)


def run_server(server: Server, service: Service) -> int:
    """Serve until a signal, or until the service ends; return the exit code."""
    handler = LogHandler(logging.WARNING)
    for name in _LOGGERS:
        logging.getLogger(name).addHandler(handler)
    try:
        server.run()
    finally:
        service.close()
        for name in _LOGGERS:
            logging.getLogger(name).removeHandler(handler)
    if service.error is not None:
        log_error("ended", service.error)
        return 1
    log("ended")
    return 0
