"""The way of every request to the routes: limits of connections, time and headers, checks of Host and Origin, records.

The limits are for clients that send or read too slowly, or too much; they do not concern models.
"""

from __future__ import annotations

import asyncio
import json
import re
import secrets
from collections.abc import Callable, Collection
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from lorakit.serve.faults import HttpFault, fault_of
from lorakit.serve.traces import Trace, log_error

MOST_CONNECTIONS = 1024
MOST_HEADER_BYTES = 32 * 1024
READ_SECONDS = 60.0
"""Time from the beginning of a connection, or the end of a reply, until the next request must be complete."""

WRITE_SECONDS = 30.0
"""Time in which a client must read what fills the buffers of its connection."""

_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^:\[\]]+)(:[0-9]+)?")


def fault_message(fault: HttpFault) -> tuple[list[tuple[bytes, bytes]], bytes]:
    """Return the headers and the body of a reply to a request that is not answered."""
    body = json.dumps(fault.document).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body)), **fault.headers}
    return [(name.lower().encode(), value.encode()) for name, value in headers.items()], body


class LimitedProtocol(H11Protocol):
    """A connection that ends if its client is too slow, or if there are too many."""

    _timer: asyncio.TimerHandle | None = None
    _stalled: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Accept a connection, or reply that there are too many."""
        super().connection_made(transport)
        if len(self.connections) > MOST_CONNECTIONS:
            fault = HttpFault(503, "The server has too many connections.", "too_many_connections")
            self._reply(b"503 Service Unavailable", fault)
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timers."""
        super().connection_lost(exc)
        for timer in (self._timer, self._stalled):
            if timer is not None:
                timer.cancel()

    def on_response_complete(self) -> None:
        """Wait for the next request."""
        super().on_response_complete()
        self._wait()

    def pause_writing(self) -> None:
        """Wait for the client to read."""
        super().pause_writing()
        self._stalled = self.loop.call_later(WRITE_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        """Stop to wait."""
        super().resume_writing()
        if self._stalled is not None:
            self._stalled.cancel()

    def send_400_response(self, msg: str) -> None:
        """Reply to what is not HTTP, or has too many headers."""
        self._reply(b"400 Bad Request", HttpFault(400, msg, "invalid_http"))

    def _reply(self, status: bytes, fault: HttpFault) -> None:
        headers, body = fault_message(fault)
        lines = [b"HTTP/1.1 " + status, *(name + b": " + value for name, value in headers), b"connection: close", b""]
        self.transport.write(b"\r\n".join([*lines, body]))
        self.transport.close()

    def _wait(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.loop.call_later(READ_SECONDS, self._check)

    def _check(self) -> None:
        if self.cycle is None or self.cycle.response_complete or self.cycle.more_body:
            self.transport.abort()


class Front:
    """The application around the routes.

    Args:
        app: The routes.
        hosts: Names of this server that a request may have as its Host; None allows all.
        observe: Gets the record of each request.
    """

    def __init__(self, app: ASGIApp, hosts: Collection[str] | None, observe: Callable[[Trace], None]) -> None:
        self._app, self._hosts, self._observe = app, hosts, observe

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        trace = Trace(secrets.token_hex(8), scope["method"])
        scope.setdefault("state", {})["trace"] = trace
        has_begun = False

        async def sending(message: Message) -> None:
            nonlocal has_begun
            if message["type"] == "http.response.start":
                has_begun, trace.status = True, message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", trace.id.encode())]
            await send(message)

        try:
            self._check(scope)
            await self._app(scope, receive, sending)
        except Exception as error:  # noqa: BLE001 - an error ends this request, not the server
            fault = fault_of(error)
            trace.error = fault.code
            if fault is not error:
                log_error("error", error, id=trace.id)
            if not has_begun:
                headers, body = fault_message(fault)
                await sending({"type": "http.response.start", "status": fault.status, "headers": headers})
                await sending({"type": "http.response.body", "body": body})
        finally:
            route: Any = scope.get("route")
            trace.route = getattr(route, "path", trace.route)
            self._observe(trace)

    def _check(self, scope: Scope) -> None:
        """Check the size of the headers, and that no page of another site, which a browser shows, sends the request."""
        size = sum(len(name) + len(value) for name, value in scope["headers"]) + len(scope["raw_path"])
        if size > MOST_HEADER_BYTES:
            raise HttpFault(431, f"The headers have more than {MOST_HEADER_BYTES >> 10} KiB.", "headers_too_large")
        headers = dict(scope["headers"])
        host = headers.get(b"host", b"").decode("latin-1").lower()
        found = _HOST.fullmatch(host)
        if found is None or (self._hosts is not None and found[1] not in self._hosts):
            text = "The Host header does not name this server; use the address that it was started with."
            raise HttpFault(421, text, "unknown_host")
        origin = headers.get(b"origin", b"").decode("latin-1").lower()
        if origin and origin.partition("://")[2] != host:
            raise HttpFault(403, "Pages of other sites cannot use this server.", "foreign_origin")
