"""lorakit.serve.app with many clients: each reply is that of the version that it names, while versions come and go."""

from __future__ import annotations

import contextlib
import json
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from lorakit import open_session
from lorakit.registry import Registry
from lorakit.serve.jobs import Job, Jobs
from lorakit.serve.service import Limits, Service
from lorakit.serve.sources import Sources

from .conftest import serving

PROMPTS = ["The quick", "def add(a", "Low-rank", "user assistant"]
NEW = 8


def conversation(url: str, seed: int) -> Iterator[tuple[dict[str, Any], tuple[str, str]]]:
    """Yield requests with the model and the text of their replies; some clients leave before the end."""
    pick = random.Random(seed)
    with httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
        for _ in range(25):
            given = {"model": pick.choice("abc"), "prompt": pick.choice(PROMPTS), "temperature": 0, "max_tokens": NEW}
            if pick.random() < 0.2:
                leave(client, {**given, "stream": True, "max_tokens": 90})
            elif pick.random() < 0.5:
                yield given, in_parts(client, {**given, "stream": True})
            else:
                whole = client.post("/v1/completions", json=given).json()
                yield given, (whole["model"], whole["choices"][0]["text"])


def leave(client: httpx.Client, given: dict[str, Any]) -> None:
    with contextlib.suppress(httpx.HTTPError), client.stream("POST", "/v1/completions", json=given) as reply:
        next(reply.iter_lines())


def in_parts(client: httpx.Client, given: dict[str, Any]) -> tuple[str, str]:
    with client.stream("POST", "/v1/completions", json=given) as reply:
        lines = [line.removeprefix("data: ") for line in reply.iter_lines() if line]
    parts = [json.loads(line) for line in lines[:-1]]
    return parts[0]["model"], "".join(part["choices"][0]["text"] for part in parts)


def test_a_version_that_is_replaced_before_its_row_begins(
    tiny_model_directory: Path, save_adapter: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry, make = Registry(tmp_path / "registry"), Jobs.completion
    old, new = save_adapter("old", 1), save_adapter("new", 2)
    before = registry.add("it", old).version.id
    with open_session(str(tiny_model_directory)) as session:
        service = Service(session, Sources([registry.folder]), "tiny", Limits(rows=8, poll_seconds=0.02))

        def replaced(jobs: Jobs, *given: Any) -> Job:
            job = make(jobs, *given)
            registry.add("it", new)
            while any(one.id == before for one in service.models()):
                time.sleep(0.01)
            return job

        monkeypatch.setattr(Jobs, "completion", replaced)
        service.start()
        with serving(service) as server:
            url, given = f"http://127.0.0.1:{server.port}/v1/completions", {"model": "it", "prompt": "a"}
            reply = httpx.post(url, json=given, timeout=60, trust_env=False)
            gone = httpx.post(url, json={**given, "model": before}, timeout=60, trust_env=False)
        service.close()
    assert reply.json()["model"] == registry.resolve("it").id != before
    assert gone.status_code == 404


@pytest.mark.costly(cases=1)
def test_no_reply_is_another_versions(
    tiny_model_directory: Path, save_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    registry, expected = Registry(tmp_path / "registry"), {}
    folders = {(name, n): save_adapter(f"{name}{n}", 7 * at + n) for at, name in enumerate("abc") for n in (0, 1)}
    for (name, _), folder in folders.items():
        id = registry.add(name, folder).version.id
        with open_session(str(tiny_model_directory), {"it": folder}) as session:
            for prompt in PROMPTS:
                expected[id, prompt] = session.generate(prompt, chat=False, max_new_tokens=NEW).text
    assert len(set(expected.values())) > len(expected) // 2
    wrong, right, ended = list[object](), list[str](), threading.Event()

    def ask(url: str, seed: int) -> None:
        for given, found in conversation(url, seed):
            name, prompt = given["model"], given["prompt"]
            is_right = found[0].partition("@")[0] == name and found[1] == expected[found[0], prompt]
            right.append(found[0]) if is_right else wrong.append((given, found))

    def publish() -> None:
        pick = random.Random(0)
        while not ended.wait(0.05):
            registry.add(*pick.choice([(name, folder) for (name, _), folder in folders.items()]))

    with open_session(str(tiny_model_directory)) as session:
        service = Service(session, Sources([registry.folder]), "tiny", Limits(rows=8, poll_seconds=0.05))
        service.start()
        with serving(service) as server:
            url = f"http://127.0.0.1:{server.port}"
            publisher = threading.Thread(target=publish)
            threads = [threading.Thread(target=ask, args=(url, seed)) for seed in range(8)]
            for thread in (publisher, *threads):
                thread.start()
            for thread in threads:
                thread.join(120)
            ended.set()
            publisher.join()
        counts = service.counts()
        service.close()
    assert not wrong and len(right) > 120 and len(set(right)) == 6
    assert (counts["waiting"], counts["reading"], counts["open"]) == (0, 0, 0)
