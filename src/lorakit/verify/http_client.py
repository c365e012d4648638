"""A client for JSON over HTTP with limits: time per answer, size of an answer, no redirects.

It knows nothing of models; every failure is a `ModelError` that names the URL.
"""

from __future__ import annotations

import ipaddress
import json
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from http.client import HTTPException
from typing import Any, NoReturn
from urllib.parse import urlsplit

from lorakit.durable import JsonObject
from lorakit.errors import ModelError, UsageError, describe, printable

MOST_BYTES = 64 << 20
"""Maximum size of an answer."""

MOST_SHOWN = 300
"""Characters of a server's message that are shown."""

_ABSENT = (404, 405, 501)
"""HTTP statuses of a path that a server does not have."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Treats a redirect as an error, since the key would be sent to another server."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        """Return no request."""


class JsonClient:
    """Sends JSON to one server.

    Args:
        url: Beginning of every path, such as "http://localhost:8000".
        key: API key, sent as a bearer token.
        timeout: Longest time for an answer in seconds.

    Raises:
        UsageError: The URL is not one of HTTP, or no header can carry the key.
    """

    def __init__(self, url: str, key: str | None = None, timeout: float = 60.0) -> None:
        host = host_of(url)
        if key is not None and not (key.isascii() and key.isprintable()):
            text = "the API key has a line end or another character that is not printable ASCII; set it without."
            raise UsageError(text, field="api_key_env")
        self.url = url.rstrip("/").removesuffix("/v1")
        self._key, self._timeout = key, timeout
        direct = [urllib.request.ProxyHandler({})] if _is_local(host) else []
        self._opener = urllib.request.build_opener(_NoRedirect, *direct)

    def get(self, path: str, *, is_optional: bool = False) -> JsonObject:
        """Return the answer to GET; an empty one if the server does not have an optional path.

        Raises:
            ModelError: The server cannot be reached, is too slow, or answers with an error or something else than JSON.
        """
        return self._ask(path, None, is_optional)

    def post(self, path: str, body: Mapping[str, Any], *, is_optional: bool = False) -> JsonObject:
        """Return the answer to POST; see `get`.

        Raises:
            ModelError: See `get`.
        """
        return self._ask(path, json.dumps(body).encode(), is_optional)

    def fail(self, problem: str, cause: BaseException | None = None, what: str | None = None) -> NoReturn:
        """Raise a ModelError about this server, and what it lacks, if that has a name."""
        raise ModelError(f"{self.url}: {problem}", what=what, where=self.url, field="against") from cause

    def _ask(self, path: str, body: bytes | None, is_optional: bool) -> JsonObject:
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self._key}"} if self._key else {})
        asked = urllib.request.Request(self.url + path, body, headers)
        end = time.monotonic() + self._timeout
        try:
            with self._opener.open(asked, timeout=self._timeout) as answer:
                content = _read(answer, end)
            found = json.loads(content)
        except urllib.error.HTTPError as error:
            with error:
                if is_optional and error.code in _ABSENT:
                    return {}
                said = _said(error)
            self.fail(f"{path} answered with HTTP {error.code}: {said}", error)
        except TimeoutError as error:
            self.fail(f"{path} did not answer within {self._timeout:g} s; pass a longer --timeout.", error)
        except urllib.error.URLError as error:
            if isinstance(error.reason, TimeoutError):
                self.fail(f"{path} did not answer within {self._timeout:g} s; pass a longer --timeout.", error)
            self.fail(f"cannot be reached ({describe(error)}); check that the server runs.", error)
        except (OSError, HTTPException, ValueError, RecursionError) as error:
            self.fail(f"{path} did not answer with JSON ({describe(error)}).", error)
        if not isinstance(found, dict):
            return {"data": found}
        return found


def host_of(url: str) -> str:
    """Return the host of a server's URL.

    Raises:
        UsageError: The URL is not one of HTTP, or has more than a host, a port and a path; it may contain a password.
    """
    try:
        parts = urlsplit(url)
        is_plain = not (parts.query or parts.fragment or parts.username) and url.isprintable() and " " not in url
        is_plain = is_plain and parts.port != 0 and parts.scheme in ("http", "https")
        host = parts.hostname if is_plain else None
    except ValueError:  # a port above 65535, or brackets without an address
        host = None
    if not host:
        text = "--against has a URL that is not http://HOST:PORT or https://HOST:PORT; a key belongs to --api-key-env."
        raise UsageError(text, field="against")
    return host


def _said(error: urllib.error.HTTPError) -> str:
    """Return the beginning of an error's message; "" if the server does not send it."""
    try:
        return printable(error.read1(MOST_SHOWN).decode("utf-8", "replace"), one_line=True)
    except (OSError, HTTPException):
        return "no message"


def _read(answer: Any, end: float) -> bytes:
    """Read an answer until the given time; each part of a slow one may take less than the socket's timeout."""
    parts, size = [], 0
    while part := answer.read1(1 << 16):
        parts.append(part)
        size += len(part)
        if size > MOST_BYTES:
            raise ValueError(f"more than {MOST_BYTES >> 20} MiB")
        if time.monotonic() > end:
            raise TimeoutError
    return b"".join(parts)


def _is_local(host: str) -> bool:
    """Return whether a host is this machine, for which no proxy is asked."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
