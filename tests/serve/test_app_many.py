"""lorakit.serve.app with many clients: each reply is that of the version that it names, while versions come and go."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import signal
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import httpx
import pytest

from lorakit import hub, open_session
from lorakit.registry import Registry
from lorakit.serve.jobs import Job, Jobs
from lorakit.serve.service import Limits, Service
from lorakit.serve.sources import Sources

from .conftest import serving, serving_process

PROMPTS = ["def add(a", "Low-rank"]
NAMES = [f"canary{number}" for number in range(32)]
BASE, NEW = "tiny-llama", 8
Answer = tuple[str, str]
"""The model that a reply names, and its text."""


def conversation(
    url: str, seed: int, count: int, ids: dict[str, list[str]]
) -> Iterator[tuple[str, str, Answer | None]]:
    """Yield the model and the prompt of requests with the answer, None if the model is not served at the moment.

    Some clients leave before the end.
    """
    pick = random.Random(seed)
    with httpx.Client(base_url=url, timeout=120, trust_env=False) as client:
        for _ in range(count):
            name, prompt = pick.choice(NAMES), pick.choice(PROMPTS)
            # the base is asked as often as each name: they take turns, so that more requests would wait for each other
            model = pick.choices([name, pick.choice(ids[name]), BASE], [32, 8, 1])[0]
            given = {"model": model, "prompt": prompt, "temperature": 0, "max_tokens": NEW}
            if pick.random() < 0.1:
                leave(client, {**given, "stream": True, "max_tokens": 90})
            found = (in_parts if pick.random() < 0.5 else whole)(client, given)
            yield model, prompt, found


def whole(client: httpx.Client, given: dict[str, Any]) -> Answer | None:
    reply = client.post("/v1/completions", json=given)
    found = reply.json()
    if reply.status_code == 404 and found["error"]["code"] == "model_not_found":
        return None
    return found["model"], found["choices"][0]["text"]


def leave(client: httpx.Client, given: dict[str, Any]) -> None:
    with contextlib.suppress(httpx.HTTPError), client.stream("POST", "/v1/completions", json=given) as reply:
        next(reply.iter_lines())


def in_parts(client: httpx.Client, given: dict[str, Any]) -> Answer | None:
    with client.stream("POST", "/v1/completions", json={**given, "stream": True}) as reply:
        lines = [line.removeprefix("data: ") for line in reply.iter_lines() if line]
    if reply.status_code == 404 and json.loads(lines[0])["error"]["code"] == "model_not_found":
        return None
    parts = [json.loads(line) for line in lines[:-1]]
    return parts[0]["model"], "".join(part["choices"][0]["text"] for part in parts)


class Changes:
    """Changes of what a server serves, one after another: publications, some of them killed, rollbacks, unloads."""

    def __init__(self, url: str, registry: Registry, folders: dict[str, list[Path]]) -> None:
        self._url, self._registry, self._folders = url, registry, folders
        self._pick = random.Random(0)
        self._processes = multiprocessing.get_context("forkserver")
        self._seconds = 0.0
        self.done: Counter[str] = Counter()
        self.memory: list[float] = []
        """Resident bytes of the server after each change."""

    def make(self, ended: threading.Event) -> None:
        """Change names until the event is set, and serve all of them at the end."""
        self._processes.set_forkserver_preload(["lorakit.core"])
        self._publish(None)
        kinds = (self._publish, self._kill, self._roll_back, self._unload)
        while not ended.wait(0.01) or len(+self.done) < len(kinds):
            change, name = self._pick.choice(kinds), self._pick.choice(NAMES)
            change(name)
            self._post("load", name)
            self.memory.append(metric(self._url, "process_resident_memory_bytes"))

    def _post(self, kind: str, name: str) -> None:
        given = {"lora_name": name}
        httpx.post(f"{self._url}/v1/{kind}_lora_adapter", json=given, timeout=120, trust_env=False).raise_for_status()

    def _begin(self, name: str) -> Any:
        process = self._processes.Process(
            target=self._registry.add, args=(name, self._pick.choice(self._folders[name]))
        )
        process.start()
        return process

    def _publish(self, name: str | None) -> None:
        if name is None:  # the first process starts those from which the others are forked
            self._begin(NAMES[0]).join()
        began = time.monotonic()
        process = self._begin(name or NAMES[0])
        process.join()
        assert process.exitcode == 0
        self._seconds = time.monotonic() - began
        self.done["publish"] += 1

    def _kill(self, name: str) -> None:
        process = self._begin(name)
        time.sleep(self._pick.uniform(0, self._seconds))
        process.kill()
        process.join()
        self.done["kill"] += process.exitcode == -signal.SIGKILL

    def _roll_back(self, name: str) -> None:
        self._registry.rollback(f"{name}@{self._pick.choice(self._registry.entry(name).history).hash}")
        self.done["rollback"] += 1

    def _unload(self, name: str) -> None:
        self._post("unload", name)
        self.done["unload"] += 1


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


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL")
@pytest.mark.costly(cases=0)
@pytest.mark.parametrize(("clients", "requests"), [(8, 320), pytest.param(64, 20_000, marks=pytest.mark.slow)])
def test_no_reply_is_another_versions(
    clients: int, requests: int, tiny_model_directory: Path, save_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    registry, model = Registry(tmp_path / "registry"), hub.load_model(tiny_model_directory)
    folders = {
        name: [save_adapter(f"{name}-{n}", 2 * at + n + 1, spread=1.0, model=model) for n in (0, 1)]
        for at, name in enumerate(NAMES)
    }
    ids = {name: [registry.add(name, folder).version.id for folder in folders[name]] for name in NAMES}
    expected = answers(tiny_model_directory, {id: folders[name][n] for name in NAMES for n, id in enumerate(ids[name])})
    for prompt in PROMPTS:
        assert len({expected[id, prompt] for id, of in expected if of == prompt}) == 2 * len(NAMES) + 1
    ended = threading.Event()
    with serving_process(tiny_model_directory, registry.folder) as (process, url):
        changes, each = Changes(url, registry, folders), -(-requests // clients)
        with ThreadPoolExecutor(clients + 1) as pool:
            changing = pool.submit(changes.make, ended)
            asking = [pool.submit(lambda seed: [*conversation(url, seed, each, ids)], seed) for seed in range(clients)]
            wait(asking)  # each request ends, or fails after its timeout
            ended.set()
        changing.result()
        found = [reply for one in asking for reply in one.result()]
        with httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
            wait_until_idle(client)
            served = [one["id"] for one in client.get("/v1/models").json()["data"]]
            assert set(served) == {BASE, *(registry.resolve(name).id for name in NAMES)} and len(served) == 33
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    wrong = [one for one in found if not is_right(*one, expected)]
    right = [model for _, _, answer in found if answer is not None for model in answer[:1]]
    assert not wrong and len(found) >= requests and len(right) > requests // 2
    assert len(set(right)) > len(NAMES) and BASE in right
    assert set(changes.done) == {"publish", "kill", "rollback", "unload"} and changes.done["kill"]
    assert not registry.verify() and not registry.gc().in_use
    if requests > 10_000:  # what is kept has its full size by then
        size = len(changes.memory) // 4
        quarters = [statistics.median(changes.memory[at * size : (at + 1) * size]) for at in range(4)]
        print("MB in each quarter of the run:", [round(one / 1e6) for one in quarters])
        assert quarters[3] < 1.02 * quarters[1]
    print(f"{len(found)} replies, {len(right)} with an answer, {len(set(right))} models; {dict(changes.done)}")


def answers(model: Path, folders: dict[str, Path]) -> dict[tuple[str, str], str]:
    """Return the answer of the base and of each version to each prompt, made alone."""
    with open_session(str(model), {id.replace("@", "-"): folder for id, folder in folders.items()}) as session:
        names = {BASE: None, **{id: id.replace("@", "-") for id in folders}}
        return {
            (id, prompt): session.generate(prompt, adapter=name, chat=False, max_new_tokens=NEW).text
            for id, name in names.items()
            for prompt in PROMPTS
        }


def is_right(model: str, prompt: str, found: Answer | None, expected: dict[tuple[str, str], str]) -> bool:
    """Return whether a reply names the model that was asked for, and has its answer."""
    if found is None:
        return model != BASE
    return model in (found[0], found[0].partition("@")[0]) and found[1] == expected[found[0], prompt]


def metric(url: str, name: str) -> float:
    """Return the value of a metric without labels."""
    lines = httpx.get(f"{url}/metrics", timeout=120, trust_env=False).text.splitlines()
    return next(float(line.split()[-1]) for line in lines if line.split()[0] == name)


def wait_until_idle(client: httpx.Client) -> None:
    """Wait until no row is waiting, being read or open."""
    until = time.monotonic() + 60
    while True:
        lines = client.get("/metrics").text.splitlines()
        rows = [float(line.split()[-1]) for line in lines if line.startswith("lorakit_rows{")]
        if rows == [0, 0, 0]:
            return
        assert time.monotonic() < until, rows
        time.sleep(0.02)
