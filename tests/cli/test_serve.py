"""`lorakit serve`: a process that serves, drains on SIGTERM and exits with 0; flags that are rejected."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorakit import cli

httpx = pytest.importorskip("httpx")
for package in ("fastapi", "uvicorn", "prometheus_client"):
    pytest.importorskip(package)

Save = Callable[..., Path]


@pytest.mark.skipif(os.name == "nt", reason="SIGTERM")
@pytest.mark.costly(cases=1)
def test_sigterm_ends_the_server_after_the_running_requests(
    tiny_model_directory: Path, save_adapter: Save, tmp_path: Path
) -> None:
    save_adapter("adapters/one", 1)
    command = [
        sys.executable,
        "-m",
        "lorakit",
        "serve",
        "--model",
        str(tiny_model_directory),
        str(tmp_path / "adapters"),
    ]
    with subprocess.Popen([*command, "--port", "0"], stderr=subprocess.PIPE, text=True, encoding="utf-8") as process:
        assert process.stderr is not None
        lines = (line for line in process.stderr if line.startswith("{"))
        ready = json.loads(next(lines))
        assert ready["event"] == "ready" and len(ready["models"]) == 2
        given = {"model": "one", "prompt": "a secret", "max_tokens": 100, "n": 8, "ignore_eos": True}
        replies: list[Any] = []

        def ask() -> None:
            replies.append(httpx.post(f"{ready['url']}/completions", json=given, timeout=60, trust_env=False))

        thread = threading.Thread(target=ask)
        thread.start()
        url = ready["url"].removesuffix("/v1")
        while 'state="open"} 0' in httpx.get(f"{url}/metrics", trust_env=False).text:
            pass
        process.send_signal(signal.SIGTERM)
        log = [json.loads(line) for line in lines]
        thread.join(60)
        assert process.wait(60) == 0
    assert replies[0].status_code == 200 and replies[0].json()["usage"]["completion_tokens"] == 800
    assert log[-1]["event"] == "ended" and "secret" not in json.dumps(log)


def test_flags_that_are_rejected(
    tiny_model_directory: Path, save_adapter: Save, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_adapter("adapters/one", 1)
    model, adapters = str(tiny_model_directory), str(tmp_path / "adapters")
    cases = {
        "api-keys": ["--host", "0.0.0.0"],
        "port": ["--port", "70000"],
        "request-timeout": ["--request-timeout", "0"],
        "rows": ["--rows", "0"],
        "dtype": ["--dtype", "float8"],
    }
    for word, flags in cases.items():
        assert cli.main(["serve", "--model", model, adapters, *flags]) == 2, word
        assert word in capsys.readouterr().err.replace("_", "-")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert cli.main(["serve", "--model", model, str(empty)]) == 2
    assert "neither a registry nor" in capsys.readouterr().err
    assert cli.main(["serve", "--model", model, adapters, "--api-keys", str(tmp_path / "missing")]) == 1
    with socket.create_server(("127.0.0.1", 0)) as other:
        assert cli.main(["serve", "--model", model, adapters, "--port", str(other.getsockname()[1])]) == 2
    assert "cannot listen on 127.0.0.1" in capsys.readouterr().err
