"""Reasons for not answering a request: HTTP status, message, code and field, in OpenAI's form."""

from __future__ import annotations

from collections.abc import Mapping

from lorakit.durable import JsonObject
from lorakit.errors import (
    BusyError,
    ConfigError,
    DataError,
    LorakitError,
    NonFiniteError,
    NotYetSupported,
    UnknownModelError,
)

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}

_BUSY: Mapping[str | None, tuple[int, str, Mapping[str, str]]] = {
    "full": (429, "queue_full", {"Retry-After": "1"}),
    "draining": (503, "draining", {"Retry-After": "5"}),
    "timeout": (504, "timeout", {}),
}
"""`BusyError.what` -> status, code and headers."""

_FIELDS = {"max_new_tokens": "max_tokens", "prompts": "prompt", "chat": "messages", "json_schema": "response_format"}
"""Field of an error of lorakit -> field of a request, if they differ."""


class HttpFault(Exception):
    """A request is not answered.

    Attributes:
        status: The HTTP status.
        message: What is wrong, and what to do.
        code: Short name of the fault.
        param: The field of the request that is wrong.
        headers: Further headers of the reply.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.headers = status, message, code, param, headers or {}

    @property
    def document(self) -> JsonObject:
        """The body of the reply."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def fault_of(error: Exception) -> HttpFault:
    """Return the fault for an exception; the message of an unexpected one is left out, since it may have a prompt."""
    if isinstance(error, HttpFault):
        return error
    if isinstance(error, BusyError):
        status, code, headers = _BUSY.get(error.what, _BUSY["draining"])
        return HttpFault(status, error.message, code, headers=headers)
    if isinstance(error, UnknownModelError):
        return HttpFault(404, error.message, "model_not_found", "model")
    if isinstance(error, ConfigError | DataError | NotYetSupported):
        return HttpFault(400, str(error), "invalid_value", _FIELDS.get(error.field or "", error.field))
    if isinstance(error, NonFiniteError):
        return HttpFault(500, str(error), "non_finite")
    if isinstance(error, LorakitError):
        return HttpFault(500, str(error), error.code)
    return HttpFault(500, "The server has an internal error; its log has the details.", "internal_error")
