"""lorakit.serve.front: clients that are slow, that send no HTTP, or that are too many; raw sockets."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Iterator

import pytest

from lorakit.serve import front

from .conftest import Running


@contextlib.contextmanager
def connected(running: Running) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", running.server.port), timeout=20) as one:
        yield one


def reply_to(running: Running, data: bytes) -> tuple[int, bytes]:
    with connected(running) as one:
        one.sendall(data)
        got = b""
        while part := one.recv(65536):
            got += part
    return int(got.split()[1]), got.partition(b"\r\n\r\n")[2]


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET /health HTTP/1.1\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: other\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
    ],
)
def test_what_is_not_http_gets_an_error_in_the_same_form(running: Running, data: bytes) -> None:
    status, body = reply_to(running, data)
    assert status == 400 and json.loads(body)["error"]["code"] == "invalid_http"
    assert running.client.get("/health").status_code == 200


def test_headers_have_a_limit(running: Running) -> None:
    long = b"a" * front.MOST_HEADER_BYTES
    for head in (
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + long,
        b"GET /" + long + b" HTTP/1.1\r\nHost: localhost",
    ):
        status, body = reply_to(running, head + b"\r\nConnection: close\r\n\r\n")
        assert status == 431 and json.loads(body)["error"]["code"] == "headers_too_large"


def ended(one: socket.socket, seconds: float) -> bool:
    one.settimeout(seconds)
    try:
        return one.recv(1) == b""
    except ConnectionError:
        return True
    except TimeoutError:
        return False


def test_a_connection_without_a_whole_request_ends(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front, "READ_SECONDS", 0.5)
    head = (
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 50\r\n"
    )
    for data in (b"", b"GET /hea", head, head + b"\r\n{"):
        with connected(running) as one:
            one.sendall(data)
            assert ended(one, 5)
    with connected(running) as one:  # one byte at a time does not help
        end = time.monotonic() + 10
        with contextlib.suppress(ConnectionError):
            while time.monotonic() < end:
                one.sendall(b"G")
                time.sleep(0.05)
        assert time.monotonic() < end


def test_a_client_that_does_not_read_ends_its_rows(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front, "WRITE_SECONDS", 0.3)
    given = {
        "model": "one",
        "prompt": "a",
        "max_tokens": 120,
        "n": 16,
        "stream": True,
        "logprobs": 20,
        "ignore_eos": True,
    }
    body = json.dumps(given).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    with connected(running) as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        one.sendall(head.encode() + body)
        end = time.monotonic() + 30
        while not running.service.counts()["open"]:
            assert time.monotonic() < end
        while any(running.service.counts()[state] for state in ("waiting", "reading", "open")):
            assert time.monotonic() < end
            time.sleep(0.05)
        while running.server.server_state.tasks:
            assert time.monotonic() < end
            time.sleep(0.05)


def test_connections_beyond_the_limit_get_an_error(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    running.client.get("/health")
    monkeypatch.setattr(front, "MOST_CONNECTIONS", 1)
    status, body = reply_to(running, b"")
    assert status == 503 and json.loads(body)["error"]["code"] == "too_many_connections"
    assert running.client.get("/health").status_code == 200
