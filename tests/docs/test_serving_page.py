"""docs/serving.md: its Python code runs against a real server, and its tables have all fields, paths and statuses."""

from __future__ import annotations

import re
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")

from lorakit import open_session
from lorakit.serve import app, front
from lorakit.serve.keys import find_key, read_keys
from lorakit.serve.requests import ChatRequest, CompletionRequest
from lorakit.serve.service import Service
from lorakit.serve.sources import Sources

from ..serve.conftest import serving

PAGE = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")


def test_the_code_runs(tiny_model_directory: Path, save_adapter: Callable[..., Path], tmp_path: Path) -> None:
    pytest.importorskip("openai")
    save_adapter("runs/notes", 1)
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    with open_session(str(tiny_model_directory)) as session:
        service = Service(session, Sources([tmp_path / "runs"]), "tiny")
        service.start()
        with serving(service) as server:
            names: dict[str, object] = {}
            exec(code.replace(":8000", f":{server.port}"), names)
            exec("client.close()", names)
        service.close()


def test_all_fields_are_listed() -> None:
    rows = dict(re.findall(r"^\| (both|completions|chats|without effect) \| (.+) \|$", PAGE, re.MULTILINE))
    listed = {name: set(re.findall(r"`(\w+)`", re.sub(r"\(.*?\)", "", row))) for name, row in rows.items()}
    for kind, own in ((CompletionRequest, "completions"), (ChatRequest, "chats")):
        assert listed["both"] | listed[own] | listed["without effect"] == set(kind.model_fields)


def test_all_paths_are_listed() -> None:
    from lorakit.serve.app import Access, make_app

    routes = {(method, route.path) for route in make_app(None, Access(), None).routes for method in route.methods}  # type: ignore[arg-type, attr-defined]
    listed = set(re.findall(r"`(GET|POST) (/[\w/.]*)`", PAGE))
    assert {(method, path.replace("MODEL", "{model:path}")) for method, path in listed} == routes


def test_limits_are_those_of_the_code() -> None:
    assert f"body over {app.MOST_BODY_BYTES >> 20} MiB" in PAGE
    assert f"headers over {front.MOST_HEADER_BYTES >> 10} KiB" in PAGE
    assert f"does not read for {front.WRITE_SECONDS:g} s" in PAGE


def test_the_file_of_keys_is_valid(tmp_path: Path) -> None:
    (text,) = re.findall(r"```json\n(.*?)```", PAGE, flags=re.DOTALL)
    for key in ("one", "two"):
        text = text.replace("HEX", sha256(key.encode()).hexdigest(), 1)
    (tmp_path / "keys").write_text(text, encoding="utf-8")
    keys = read_keys(tmp_path / "keys")
    assert find_key(keys, "one").admin and find_key(keys, "two").models == ["notes"]  # type: ignore[union-attr]
