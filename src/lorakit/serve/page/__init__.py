"""The page at `/`, as files of this directory: no build step, and no request to another server."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from importlib import resources

from fastapi import Response

FILES = {
    "/": ("index.html", "text/html"),
    "/page.js": ("page.js", "text/javascript"),
    "/page.css": ("page.css", "text/css"),
}
"""Path -> file and media type."""

HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
"""Answers of models are untrusted: even if they became HTML, the browser would run and load nothing of it."""


def page_routes() -> dict[tuple[str, str], Callable[[], Awaitable[Response]]]:
    """Return (method, path) -> function for each file; they need no API key and have no facts of models."""
    return {("GET", path): _route(name, kind) for path, (name, kind) in FILES.items()}


def _route(name: str, kind: str) -> Callable[[], Awaitable[Response]]:
    body = resources.files(__name__).joinpath(name).read_bytes()

    async def send() -> Response:
        return Response(body, media_type=kind, headers=HEADERS)

    return send
