"""lorakit.serve.service: no reply comes from another adapter or version than the named one, whatever happens meanwhile."""

from __future__ import annotations

import contextlib
import queue
import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from lorakit import open_session
from lorakit.errors import BusyError, LorakitError, NotYetSupported, RunError, UnknownModelError, UsageError
from lorakit.generate import Continuation, Engine, Failure, NewToken, Sampling
from lorakit.registry import Registry
from lorakit.serve.served import Served
from lorakit.serve.service import Limits, Service
from lorakit.serve.sources import Sources

PROMPTS = [tuple(range(3 + n, 9 + 3 * n)) for n in range(5)]
QUICK = Limits(rows=4, poll_seconds=0.02)


class Reply:
    """Collect the events of a request."""

    def __init__(self, service: Service, served: Served, prompt: tuple[int, ...], new: int = 8, **more: Any) -> None:
        self._events: queue.SimpleQueue[Any] = queue.SimpleQueue()
        given = Continuation(prompt, new, **more)
        self.number = service.submit(served, given, self._events.put).result(timeout=60)

    def next(self) -> Any:
        return self._events.get(timeout=60)

    def tokens(self) -> list[int]:
        found: list[int] = []
        while True:
            event = self.next()
            if isinstance(event, Failure):
                raise event.error
            found.append(event.token)
            if event.ended is not None:
                return found


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "registry")


@pytest.fixture
def start(tiny_model_directory: Path, registry: Registry) -> Iterator[Callable[..., Service]]:
    running: list[Service] = []

    def make(*paths: Path, limits: Limits = QUICK) -> Service:
        session = open_session(str(tiny_model_directory))
        service = Service(session, Sources(paths or [registry.folder]), "tiny", limits)
        service.start()
        running.append(service)
        return service

    yield make
    for service in running:
        service.close()


def alone(service: Service, folder: Path | None, prompt: tuple[int, ...], new: int = 8, **more: Any) -> list[int]:
    """Return the tokens of a session with this adapter alone, in an engine of its own."""
    path = service.session.spec.source.path_or_id
    with open_session(str(path), adapters={} if folder is None else {"it": folder}) as session:
        engine = Engine(session.model)
        engine.submit(Continuation(prompt, new, adapter=None if folder is None else "it", **more))
        found = []
        while not engine.is_idle:
            found += [event.token for event in engine.step() if isinstance(event, NewToken)]
        return found


def test_each_request_gets_the_tokens_of_its_own_version(
    registry: Registry, save_adapter: Callable[..., Path], start: Callable[..., Service]
) -> None:
    folders = {name: save_adapter(name, seed, r=2 + seed) for seed, name in enumerate(["a", "b"])}
    for name, folder in folders.items():
        registry.add(name, folder)
    service = start()
    ids = {name: registry.resolve(name).id for name in folders}
    assert [one.id for one in service.models()] == ["tiny", *ids.values()]
    found = {}
    for model in ("tiny", "a", ids["a"], "tiny:b", "base:b"):
        served = service.find(model)
        found[model] = Reply(service, served, PROMPTS[0]).tokens()
        assert found[model] == alone(service, folders.get(served.name), PROMPTS[0])
    assert found["a"] == found[ids["a"]] != found["tiny"] != found["base:b"]
    for unknown in ("c", "a@0123456789ab", "", "other:a", "a:tiny"):
        with pytest.raises(UnknownModelError) as caught:
            service.find(unknown)
        assert caught.value.what == unknown


def test_a_new_version_is_served_and_requests_in_flight_keep_theirs(
    registry: Registry, save_adapter: Callable[..., Path], start: Callable[..., Service]
) -> None:
    old, new = save_adapter("old", 1), save_adapter("new", 2)
    registry.add("it", old)
    service = start()
    before = service.find("it")
    running = Reply(service, before, PROMPTS[1], 100)
    running.next()
    registry.add("it", new)
    wait_for(lambda: service.find("it").id != before.id)
    with pytest.raises(UnknownModelError):
        service.find(before.id)
    assert Reply(service, service.find("it"), PROMPTS[1]).tokens() == alone(service, new, PROMPTS[1])
    assert running.tokens() == alone(service, old, PROMPTS[1], 100)[1:]
    wait_for(lambda: before.adapter not in service.session.adapters)
    registry.rollback("it")
    wait_for(lambda: service.find("it").id == before.id)
    assert Reply(service, service.find("it"), PROMPTS[1]).tokens() == alone(service, old, PROMPTS[1])
    registry.remove("it")
    wait_for(lambda: len(service.models()) == 1)


def wait_for(is_true: Callable[[], bool]) -> None:
    done = threading.Event()
    for _ in range(3000):
        if is_true():
            return
        done.wait(0.02)
    raise AssertionError("it did not happen within a minute")


@dataclass
class Canaries:
    """Names with two versions each, and clients that compare each reply with the version that the request names."""

    service: Service
    registry: Registry
    folders: dict[tuple[str, int], Path]
    expected: dict[tuple[str, tuple[int, ...]], list[int]]
    right: int = 0
    gone: int = 0
    faults: list[BaseException] = field(default_factory=list)
    is_over: threading.Event = field(default_factory=threading.Event)

    @property
    def names(self) -> list[str]:
        return list(dict.fromkeys(name for name, _ in self.folders))

    def ask(self, choose: random.Random, owner: str) -> None:
        prompt, served = choose.choice(PROMPTS), self.service.find(choose.choice([*self.names, "tiny"]))
        reply = Reply(self.service, served, prompt, owner=owner)
        if choose.random() < 0.2:
            self.service.cancel(reply.number)
            return
        assert reply.tokens() == self.expected[served.id, prompt]
        self.right += 1

    def client(self, seed: int, requests: int) -> None:
        choose = random.Random(seed)
        for _ in range(requests):
            try:
                self.ask(choose, str(seed % 3))
            except UnknownModelError:
                self.gone += 1
            except (LorakitError, AssertionError, queue.Empty) as error:
                self.faults.append(error)

    def publisher(self) -> None:
        choose = random.Random(99)
        while not self.is_over.wait(0.01):
            name, action = choose.choice(self.names), choose.choice(["add", "rollback", "load", "load", "unload"])
            with contextlib.suppress(LorakitError):  # there may be nothing to roll back to
                if action == "add":
                    self.registry.add(name, self.folders[name, choose.randrange(2)])
                else:
                    getattr(self.registry if action == "rollback" else self.service, action)(name)


@pytest.mark.costly
def test_no_reply_is_wrong_while_versions_change_and_requests_are_cancelled(
    registry: Registry, save_adapter: Callable[..., Path], start: Callable[..., Service]
) -> None:
    folders = {(name, n): save_adapter(f"{name}{n}", 10 * k + n) for k, name in enumerate("abcd") for n in range(2)}
    by_id = {registry.add(name, folder).version.id: folder for (name, _), folder in folders.items()}
    service = start()
    expected = {(id, prompt): alone(service, by_id.get(id), prompt) for id in (*by_id, "tiny") for prompt in PROMPTS}
    assert len({tuple(expected[id, PROMPTS[0]]) for id in (*by_id, "tiny")}) == 9
    canaries = Canaries(service, registry, folders, expected)
    clients = [threading.Thread(target=canaries.client, args=(seed, 40)) for seed in range(12)]
    writer = threading.Thread(target=canaries.publisher)
    for thread in (*clients, writer):
        thread.start()
    for thread in clients:
        thread.join()
    canaries.is_over.set()
    writer.join()
    assert not canaries.faults
    assert canaries.right > 100
    for name in canaries.names:
        service.load(name)
    wait_for(lambda: not any(service.counts()[state] for state in ("waiting", "reading", "open")))
    wait_for(lambda: {one.adapter for one in service.models()} == {*service.session.adapters, None})
    service.close()
    assert service.error is None


def test_names_can_be_unloaded_and_loaded_again(
    registry: Registry, save_adapter: Callable[..., Path], start: Callable[..., Service]
) -> None:
    first = registry.add("it", save_adapter("one", 1)).version
    second = registry.add("it", save_adapter("two", 2)).version
    service = start(limits=Limits(poll_seconds=0.02, versions=1))
    service.unload("it")
    service.unload("it")
    threading.Event().wait(0.2)  # several polls
    assert [one.id for one in service.models()] == ["tiny"]
    assert service.load("it").id == second.id
    assert service.load(first.id).id == first.id == service.find(first.id).id
    assert service.find("it").id == second.id
    with pytest.raises(UnknownModelError):
        service.load("nobody")
    with pytest.raises(UnknownModelError):
        service.load("../it")


def test_what_would_change_the_base_for_others_is_rejected_and_the_rest_is_served(
    registry: Registry, save_adapter: Callable[..., Path], start: Callable[..., Service]
) -> None:
    registry.add("it", save_adapter("one", 1))
    service = start()
    registry.add("kasa", save_adapter("kasa", 2, kasa_config={}))
    wait_for(lambda: "kasa" in service.faults)
    assert isinstance(service.faults["kasa"], NotYetSupported)
    assert Reply(service, service.find("it"), PROMPTS[2]).tokens()
    with pytest.raises(NotYetSupported):
        service.load("kasa")
    with pytest.raises(UnknownModelError):
        service.find("kasa")


def test_requests_are_rejected_when_they_are_invalid_or_too_many(
    registry: Registry, save_adapter: Callable[..., Path], start: Callable[..., Service]
) -> None:
    registry.add("it", save_adapter("one", 1))
    service = start(limits=Limits(rows=1, waiting=1))
    with pytest.raises(UsageError):
        Reply(service, service.find("it"), (1,) * 128)
    running = [Reply(service, service.find("it"), PROMPTS[0], 100) for _ in range(2)]
    with pytest.raises(BusyError):
        Reply(service, service.find("it"), PROMPTS[0])
    for reply in running:
        assert len(reply.tokens()) > 1
    assert Reply(service, service.find("it"), PROMPTS[0]).tokens()
    service.drain()
    with pytest.raises(BusyError):
        Reply(service, service.find("it"), PROMPTS[0])
    assert service.ended.wait(60)
    assert service.error is None


def test_draining_ends_the_requests_that_have_begun(
    registry: Registry, save_adapter: Callable[..., Path], start: Callable[..., Service]
) -> None:
    registry.add("it", folder := save_adapter("one", 1))
    service = start()
    reply = Reply(service, service.find("it"), PROMPTS[0], 60)
    service.drain()
    assert reply.tokens() == alone(service, folder, PROMPTS[0], 60)
    assert service.ended.wait(60)


def test_a_step_that_fails_ends_its_requests_only_and_three_in_a_minute_the_service(
    registry: Registry, save_adapter: Callable[..., Path], start: Callable[..., Service]
) -> None:
    registry.add("it", folder := save_adapter("one", 1))
    service = start()
    fail = threading.Event()

    def hook(*_: Any) -> None:
        if fail.is_set():
            raise RuntimeError("the device is gone")

    service.session.model.model.layers[1].register_forward_pre_hook(hook)
    for _ in range(2):
        fail.set()
        with pytest.raises(RunError, match="the device is gone"):
            Reply(service, service.find("it"), PROMPTS[0]).tokens()
        fail.clear()
        assert Reply(service, service.find("it"), PROMPTS[0]).tokens() == alone(service, folder, PROMPTS[0])
    fail.set()
    with pytest.raises(RunError):
        Reply(service, service.find("it"), PROMPTS[0]).tokens()
    assert service.ended.wait(60)
    assert isinstance(service.error, RuntimeError)
    assert not service.is_ready


def test_a_reader_that_fails_loses_its_own_request_only(
    registry: Registry, save_adapter: Callable[..., Path], start: Callable[..., Service]
) -> None:
    registry.add("it", folder := save_adapter("one", 1))
    service = start()

    def broken(_: Any) -> None:
        raise OSError("nobody listens")

    service.submit(service.find("it"), Continuation(PROMPTS[0], 100), broken).result(60)
    assert Reply(service, service.find("it"), PROMPTS[0]).tokens() == alone(service, folder, PROMPTS[0])
    wait_for(lambda: service.counts()["open"] == 0)


def test_directories_are_sources_too(
    tmp_path: Path, save_adapter: Callable[..., Path], start: Callable[..., Service]
) -> None:
    runs = tmp_path / "runs"
    for name in ("legal", "sql"):
        save_adapter(name, len(name)).rename((runs / name).parent.mkdir(exist_ok=True) or runs / name)
    (runs / "sql" / "nested").mkdir()
    (runs / "notes.txt").write_text("no adapter")
    service = start(runs)
    assert [one.name for one in service.models()] == ["tiny", "legal", "sql"]
    one = start(runs / "legal")
    assert [each.id for each in one.models()] == [each.id for each in service.models()[:2]]
    for wrong in (tmp_path / "nowhere", tmp_path / "tiny-llama"):
        with pytest.raises(UsageError):
            Sources([wrong])
    with pytest.raises(UsageError):
        Sources([runs, runs / "legal"])


def test_a_seed_gives_the_same_reply_whatever_runs_beside_it(
    registry: Registry, save_adapter: Callable[..., Path], start: Callable[..., Service]
) -> None:
    registry.add("it", folder := save_adapter("one", 1))
    service = start()
    sampling = Sampling(1.0, seed=7)
    replies = [Reply(service, service.find("it"), PROMPTS[n % 5], 20, sampling=sampling) for n in range(9)]
    for n, reply in enumerate(replies):
        assert reply.tokens() == alone(service, folder, PROMPTS[n % 5], 20, sampling=sampling)
    assert torch.is_grad_enabled()
