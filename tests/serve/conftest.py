"""A real server in this process: uvicorn in a thread, the engine in another one, a small model, two adapters."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")

from lorakit import open_session
from lorakit.serve.app import Access
from lorakit.serve.server import Address, Server
from lorakit.serve.service import Limits, Service
from lorakit.serve.sources import Sources


@dataclass
class Running:
    """A server that runs, and a client of it."""

    service: Service
    server: Server
    client: httpx.Client
    folders: dict[str, Path]

    @property
    def url(self) -> str:
        return str(self.client.base_url).rstrip("/")

    def id(self, name: str) -> str:
        return self.service.find(name).id


@contextlib.contextmanager
def serving(service: Service, access: Access | None = None, address: Address | None = None) -> Iterator[Server]:
    address = address or Address(port=0)
    server = Server(service, access or Access(), address, address.bind())
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started and thread.is_alive():
        thread.join(0.01)
    yield server
    server.should_exit = True
    thread.join(60)
    assert not thread.is_alive()


@contextlib.contextmanager
def serving_process(model: Path, *adapters: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Yield a process of `lorakit serve` that is ready, and its URL; it is killed if it has not ended."""
    command = [sys.executable, "-m", "lorakit", "serve", "--model", str(model), *map(str, adapters), "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, encoding="utf-8") as process:
        assert process.stderr is not None
        try:
            ready = json.loads(next(line for line in process.stderr if line.startswith("{")))
            assert ready["event"] == "ready"
            threading.Thread(target=deque, args=(process.stderr, 0), daemon=True).start()  # a full pipe would block it
            yield process, ready["url"].removesuffix("/v1")
        finally:
            process.kill()


Start = Callable[..., Running]


@pytest.fixture
def start(tiny_model_directory: Path, save_adapter: Callable[..., Path], tmp_path: Path) -> Iterator[Start]:
    """Start a server with the adapters `one` and `two`."""
    folders = {name: save_adapter(f"adapters/{name}", seed) for seed, name in enumerate(["one", "two"], start=1)}
    with contextlib.ExitStack() as stack:

        def make(
            access: Access | None = None, address: Address | None = None, name: str = "tiny", **limits: Any
        ) -> Running:
            session = stack.enter_context(open_session(str(tiny_model_directory)))
            sources = Sources([tmp_path / "adapters"])
            service = Service(session, sources, name, Limits(**{"rows": 4, "poll_seconds": 0.02, **limits}))
            service.start()
            stack.callback(service.close)
            server = stack.enter_context(serving(service, access, address))
            client = stack.enter_context(
                httpx.Client(base_url=f"http://127.0.0.1:{server.port}", timeout=60, trust_env=False)
            )
            return Running(service, server, client, folders)

        yield make


@pytest.fixture
def running(start: Start) -> Running:
    """A server without API keys."""
    return start()


@pytest.fixture
def client(running: Running) -> Iterator[Any]:
    """OpenAI's client of this server."""
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as client:
        yield client
