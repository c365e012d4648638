"""The routes: models, completions, chats, health, metrics, and loading and unloading adapters."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from lorakit.durable import JsonObject
from lorakit.errors import BusyError, LorakitError, UnknownModelError
from lorakit.serve.choices import Piece
from lorakit.serve.faults import HttpFault, fault_of
from lorakit.serve.generation import Deadline, Generation
from lorakit.serve.jobs import Job, Jobs
from lorakit.serve.keys import ANYONE, Key, find_key
from lorakit.serve.page import page_routes
from lorakit.serve.requests import AdapterRequest, ChatRequest, CompletionRequest, GenerationRequest, parse
from lorakit.serve.served import Served
from lorakit.serve.service import Service, unknown_model
from lorakit.serve.traces import Metrics, Trace, log_error

MOST_BODY_BYTES = 4 << 20

TIMEOUT_HEADER = "X-Request-Timeout"
"""Header with the longest time for a reply in seconds; it can only shorten `--request-timeout`."""

Given = TypeVar("Given", bound=GenerationRequest)
MakeJob = Callable[[Served, Given, str], Job]


@dataclass(frozen=True)
class Access:
    """Who may use the server, and how long a reply may take.

    Attributes:
        keys: The API keys; without any, everyone who can reach the server may do everything.
        timeout: Longest time for a reply in seconds.
    """

    keys: Sequence[Key] = ()
    timeout: float = 600.0

    def caller(self, request: Request, *, is_admin: bool = False) -> Key:
        """Return the key of a request.

        Raises:
            HttpFault: There is none, or an admin's is needed.
        """
        scheme, _, text = request.headers.get("authorization", "").partition(" ")
        found = find_key(self.keys, text.strip()) if scheme.lower() == "bearer" else None
        key = found if self.keys else ANYONE
        if key is None:
            headers = {"WWW-Authenticate": "Bearer"}
            raise HttpFault(401, "The API key is missing or wrong.", "invalid_api_key", headers=headers)
        request.state.trace.key = key.name
        if is_admin and not key.admin:
            raise HttpFault(403, "Only an admin's API key can do this.", "not_admin")
        return key

    def deadline(self, request: Request) -> Deadline:
        """Return when a request ends.

        Raises:
            HttpFault: The header is not a positive number.
        """
        given = request.headers.get(TIMEOUT_HEADER)
        try:
            seconds = self.timeout if given is None else float(given)
        except ValueError:
            seconds = 0.0
        if not seconds > 0:
            raise HttpFault(400, f"{TIMEOUT_HEADER} must be a positive number of seconds.", "invalid_value")
        return Deadline(min(seconds, self.timeout))


class EventStream(StreamingResponse):
    """A reply in parts, whose rows end when it ends, also if it never begins."""

    def __init__(self, parts: AsyncIterator[bytes], end: Callable[[], None]) -> None:
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(parts, media_type="text/event-stream", headers=headers)
        self._end = end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the parts."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._end()


class Routes:
    """The functions behind the paths."""

    def __init__(self, service: Service, access: Access, metrics: Metrics) -> None:
        self._service, self._access, self._metrics, self._jobs = service, access, metrics, Jobs(service)

    async def models(self, request: Request) -> Response:
        """List the models that the caller can use."""
        key = self._access.caller(request)
        found = [self._described(one) for one in self._service.models() if key.allows(one)]
        facts = {
            "rows_are_independent": self._service.rows_are_independent,
            "system_fingerprint": self._service.fingerprint,
            "faults": {name: error.message for name, error in self._service.faults.items()} if key.admin else {},
        }
        return JSONResponse({"object": "list", "data": found, "lorakit": facts})

    async def model(self, request: Request, model: str) -> Response:
        """Describe a model."""
        return JSONResponse(self._described(self._find(self._access.caller(request), model)))

    def _described(self, served: Served) -> JsonObject:
        facts = {name: served.facts[name] for name in ("r", "base_name", "training") if name in served.facts}
        return {
            "id": served.id,
            "object": "model",
            "created": served.created,
            "owned_by": "lorakit",
            "root": served.name,
            "parent": None if served.adapter is None else self._service.base_name,
            "max_model_len": self._service.context,
            "lorakit": {"has_chat_template": served.has_chat_template, **facts},
        }

    def _find(self, key: Key, model: str) -> Served:
        """Return a model that the caller can use; others do not exist for it."""
        found = self._service.find(model)
        if not key.allows(found):
            raise unknown_model(model)
        return found

    async def completions(self, request: Request) -> Response:
        """Continue texts."""
        return await self._generate(request, CompletionRequest, self._jobs.completion)

    async def chat(self, request: Request) -> Response:
        """Answer a conversation."""
        return await self._generate(request, ChatRequest, self._jobs.chat)

    async def _generate(self, request: Request, kind: type[Given], make: MakeJob[Given]) -> Response:
        key, deadline = self._access.caller(request), self._access.deadline(request)
        given = parse(kind, await body_of(request))
        trace: Trace = request.state.trace
        trace.stream = given.stream
        self._check_accepting()
        job, generation = await self._begin(key, given, make, deadline, trace)

        def end() -> None:
            generation.cancel()
            trace.completion_tokens = sum(choice.made for choice in job.choices)

        if given.stream:
            return EventStream(_events(job, generation, trace), end)
        try:
            return await _unless_disconnected(request, _whole(job, generation, trace))
        finally:
            end()

    async def _begin(
        self, key: Key, given: Given, make: MakeJob[Given], deadline: Deadline, trace: Trace
    ) -> tuple[Job, Generation]:
        """Submit a request; again if the name has a new version that replaced the one before it meanwhile."""
        while True:
            served = self._find(key, given.model)
            trace.model, trace.name = served.id, served.name
            job = await deadline.wait(asyncio.to_thread(make, served, given, key.name))
            trace.prompt_tokens = job.usage.prompt
            generation = Generation(self._service, job, deadline)
            try:
                await generation.start()
            except BaseException as error:
                generation.cancel()
                if not isinstance(error, UnknownModelError) or self._find(key, given.model) is served:
                    raise
            else:
                return job, generation

    def _check_accepting(self) -> None:
        if not self._service.is_ready:
            raise BusyError("The server is ending or not ready, and accepts no requests.", what="draining")

    async def load(self, request: Request) -> Response:
        """Serve an adapter of the registries, by its name."""
        return await self._change(request, self._service.load)

    async def unload(self, request: Request) -> Response:
        """Stop to serve an adapter."""
        return await self._change(request, self._service.unload)

    async def _change(self, request: Request, change: Callable[[str], Any]) -> Response:
        self._access.caller(request, is_admin=True)
        name = parse(AdapterRequest, await body_of(request)).lora_name
        self._check_accepting()
        served = await self._access.deadline(request).wait(asyncio.to_thread(change, name))
        return JSONResponse({"lora_name": name, "id": getattr(served, "id", None)})

    async def health(self) -> Response:
        """Say that the process runs."""
        is_alive = not self._service.ended.is_set()
        return JSONResponse({"status": "ok" if is_alive else "ended"}, 200 if is_alive else 503)

    async def ready(self) -> Response:
        """Say whether requests are accepted."""
        is_ready = self._service.is_ready
        return JSONResponse({"status": "ready" if is_ready else "not ready"}, 200 if is_ready else 503)

    async def metrics(self, request: Request) -> Response:
        """Return the metrics in Prometheus' format."""
        self._access.caller(request, is_admin=True)
        return Response(self._metrics.text(), media_type="text/plain; version=0.0.4")


def make_app(service: Service, access: Access, metrics: Metrics) -> FastAPI:
    """Return the application with all routes."""
    app = FastAPI(title="lorakit", docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    routes = Routes(service, access, metrics)
    table: dict[tuple[str, str], Callable[..., Any]] = {
        ("GET", "/v1/models"): routes.models,
        ("GET", "/v1/models/{model:path}"): routes.model,
        ("GET", "/health"): routes.health,
        ("GET", "/ready"): routes.ready,
        ("GET", "/metrics"): routes.metrics,
        ("POST", "/v1/completions"): routes.completions,
        ("POST", "/v1/chat/completions"): routes.chat,
        ("POST", "/v1/load_lora_adapter"): routes.load,
        ("POST", "/v1/unload_lora_adapter"): routes.unload,
        **page_routes(),
    }
    for (method, path), function in table.items():
        app.add_api_route(path, function, methods=[method], response_model=None)
    for kind in (HttpFault, LorakitError, HTTPException):
        app.add_exception_handler(kind, _refuse)
    return app


async def _refuse(request: Request, error: Exception) -> Response:
    """Reply to a request that is not answered."""
    if isinstance(error, HTTPException):
        codes = {404: "unknown_path", 405: "method_not_allowed"}
        text = f"{request.method} is not possible here: {error.detail}."
        fault = HttpFault(error.status_code, text, codes.get(error.status_code), headers=error.headers)
    else:
        fault = fault_of(error)
    request.state.trace.error = fault.code
    return JSONResponse(fault.document, fault.status, dict(fault.headers))


async def body_of(request: Request) -> bytes:
    """Read the body of a request.

    Raises:
        HttpFault: It is not declared as JSON, which pages of other sites cannot do, or is too large.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise HttpFault(415, "Send the header Content-Type: application/json.", "unsupported_media_type")
    body = bytearray()
    try:
        async for part in request.stream():
            body += part
            if len(body) > MOST_BODY_BYTES:
                text = f"The body has more than {MOST_BODY_BYTES >> 20} MiB."
                raise HttpFault(413, text, "body_too_large", headers={"Connection": "close"})
    except ClientDisconnect:
        raise HttpFault(499, "The client disconnected.", "disconnected") from None
    return bytes(body)


async def _whole(job: Job, generation: Generation, trace: Trace) -> Response:
    """Wait for all answers, and return the whole reply."""
    pieces = [Piece() for _ in job.choices]
    async for choice, piece in generation.pieces():
        trace.token()
        pieces[choice.index] += piece
    return JSONResponse(job.reply.whole(zip(job.choices, pieces, strict=True), job.usage))


async def _events(job: Job, generation: Generation, trace: Trace) -> AsyncIterator[bytes]:
    """Yield the parts of a reply as server-sent events; an error after the beginning is the last one."""
    try:
        for part in job.reply.opening(job.choices):
            yield _event(part)
        async for choice, piece in generation.pieces():
            trace.token()
            for part in job.reply.parts(choice, piece):
                yield _event(part)
        if job.reply.has_usage:
            yield _event(job.reply.usage_part(job.usage))
        yield b"data: [DONE]\n\n"
    except Exception as error:  # noqa: BLE001 - the reply has begun, so its status cannot change
        fault = fault_of(error)
        trace.error = fault.code
        if not isinstance(error, LorakitError):
            log_error("error", error, id=trace.id)
        yield _event(fault.document)


def _event(document: JsonObject) -> bytes:
    return f"data: {json.dumps(document, ensure_ascii=False)}\n\n".encode()


async def _unless_disconnected(request: Request, work: Any) -> Response:
    """Return the result of a coroutine, which is cancelled if the client disconnects."""
    tasks = [asyncio.ensure_future(one) for one in (work, _disconnected(request))]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return tasks[0].result() if tasks[0].done() else Response(status_code=499)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
