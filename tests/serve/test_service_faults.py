"""lorakit.serve: versions come and go at the wrong moment, sources fail, names collide; what is served stays right."""

from __future__ import annotations

import contextlib
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import pytest

from lorakit import core, open_session
from lorakit.errors import AdapterFileError, RunError, UnknownModelError, UsageError
from lorakit.generate import Continuation, Failure
from lorakit.generate.rows import Event
from lorakit.registry import Registry, Version
from lorakit.serve.service import Limits, Service
from lorakit.serve.sources import Sources

from .test_service import PROMPTS, Reply, alone, wait_for

NEVER = 3600.0


class FailingSources(Sources):
    """Sources whose disk can fail."""

    error: Exception | None = None

    def current(self) -> dict[str, Version]:
        if self.error is not None:
            raise self.error
        return super().current()


@pytest.fixture
def registry(tmp_path: Path, save_adapter: Callable[..., Path]) -> Registry:
    registry = Registry(tmp_path / "registry")
    registry.add("it", save_adapter("it", 1))
    return registry


@contextlib.contextmanager
def served(model: Path, sources: Sources, base_name: str = "tiny", **limits: Any) -> Iterator[Service]:
    with open_session(str(model)) as session:
        service = Service(session, sources, base_name, Limits(**{"rows": 4, "poll_seconds": NEVER, **limits}))
        try:
            service.start()
            yield service
        finally:
            service.close()


def test_a_name_that_was_removed_and_added_again_between_two_looks_is_served(
    tiny_model_directory: Path, registry: Registry, tmp_path: Path
) -> None:
    with served(tiny_model_directory, Sources([registry.folder])) as service:
        before = service.find("it").id
        registry.remove("it")
        service.publish()
        with pytest.raises(UnknownModelError):
            service.find("it")
        registry.add("it", tmp_path / "it")
        service.publish()
        assert service.find("it").id == before


def test_a_name_that_was_unloaded_stays_so_while_its_file_is_damaged(
    tiny_model_directory: Path, registry: Registry
) -> None:
    with served(tiny_model_directory, Sources([registry.folder])) as service:
        service.unload("it")
        file = registry.folder / "names" / "it.json"
        contents = file.read_bytes()
        for data in (b"{", contents):
            file.write_bytes(data)
            service.publish()
        with pytest.raises(UnknownModelError):
            service.find("it")


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), MemoryError()])
def test_versions_are_published_again_after_any_error(
    tiny_model_directory: Path, registry: Registry, save_adapter: Callable[..., Path], error: Exception
) -> None:
    sources = FailingSources([registry.folder])
    with served(tiny_model_directory, sources, poll_seconds=0.02) as service:
        before = service.find("it").id
        sources.error = error
        wait_for(lambda: bool(service.faults))
        assert isinstance(service.faults[""], RunError)
        assert service.is_ready and service.find("it").id == before
        sources.error = None
        registry.add("it", save_adapter("new", 2))
        wait_for(lambda: service.find("it").id != before)
        assert not service.faults


def test_an_adapter_with_the_name_of_the_base_is_rejected_since_requests_would_get_the_base(
    tiny_model_directory: Path, registry: Registry, save_adapter: Callable[..., Path]
) -> None:
    with served(tiny_model_directory, Sources([registry.folder])) as service:
        registry.add("tiny", save_adapter("tiny", 2))
        service.publish()
        assert isinstance(service.faults["tiny"], UsageError)
        with pytest.raises(UsageError):
            service.load("tiny")
        assert [one.id for one in service.models()] == ["tiny", service.find("it").id]
    with pytest.raises(UsageError) as caught, served(tiny_model_directory, Sources([registry.folder])):
        pass
    assert caught.value.what == "tiny"


def test_no_version_beside_the_current_one_stays_if_none_may(
    tiny_model_directory: Path, registry: Registry, save_adapter: Callable[..., Path]
) -> None:
    old = registry.resolve("it").id
    registry.add("it", save_adapter("new", 2))
    with served(tiny_model_directory, Sources([registry.folder]), versions=0) as service:
        service.load(old)
        assert [one.id for one in service.models()] == ["tiny", registry.resolve("it").id]


def test_a_version_is_removed_once_if_its_last_request_ends_meanwhile(
    tiny_model_directory: Path, registry: Registry
) -> None:
    with served(tiny_model_directory, Sources([registry.folder])) as service, ThreadPoolExecutor(1) as pool:
        unloading = []

        def until(_: int) -> bool:
            """Wait, in the engine's thread, until the version is no longer found, but still in the session."""
            unloading.append(pool.submit(service.unload, "it"))
            wait_for(lambda: len(service.models()) == 1)
            return True

        assert len(Reply(service, service.find("it"), PROMPTS[0], until=until).tokens()) == 1
        unloading[0].result(60)
        assert not service.session.adapters


def test_nothing_is_left_of_versions_that_were_replaced(
    tiny_model_directory: Path, registry: Registry, save_adapter: Callable[..., Path]
) -> None:
    folders = [save_adapter(f"new{n}", n) for n in range(2, 5)]
    with served(tiny_model_directory, Sources([registry.folder])) as service:
        for folder in folders:
            registry.add("it", folder)
            service.publish()
            assert Reply(service, service.find("it"), PROMPTS[0]).tokens() == alone(service, folder, PROMPTS[0])
        adapter = service.find("it").adapter
        assert [*service.session.adapters] == [*service._leases] == [adapter]
        assert set(service._uses) <= {adapter}
        registry.remove("it")
        assert len(registry.gc().in_use) == 1
    assert registry.gc().in_use == ()


def test_a_request_that_is_cancelled_before_it_is_added_leaves_nothing(
    tiny_model_directory: Path, registry: Registry
) -> None:
    with served(tiny_model_directory, Sources([registry.folder])) as service:
        busy = threading.Event()
        blocked = service._do(lambda: busy.wait(60))
        number = service.submit(service.find("it"), Continuation(PROMPTS[0], 4), lambda _: None)
        assert number.cancel()
        busy.set()
        assert blocked.result(60)
        assert len(Reply(service, service.find("it"), PROMPTS[0]).tokens()) == 8
        wait_for(lambda: service._submitted == 0)


def test_no_command_runs_beside_the_end_of_requests(tiny_model_directory: Path, registry: Registry) -> None:
    done: list[str] = []
    with served(tiny_model_directory, Sources([registry.folder])) as service, ThreadPoolExecutor(1) as pool:

        def sink(event: Event) -> None:
            if isinstance(event, Failure):
                wait([pool.submit(service._do, lambda: done.append("command"))], timeout=1)
                done.append("request")

        service.submit(service.find("it"), Continuation(PROMPTS[0], 10**6), sink).result(60)
        service.close()
        wait_for(lambda: len(done) == 2)
    assert done == ["request", "command"]


def test_a_registry_that_disappears_changes_nothing(tiny_model_directory: Path, registry: Registry) -> None:
    with served(tiny_model_directory, Sources([registry.folder])) as service:
        shutil.rmtree(registry.folder)
        service.publish()
        assert set(service.faults) == {""}
        assert Reply(service, service.find("it"), PROMPTS[0]).tokens()


def test_a_version_that_cannot_be_served_is_read_once(
    tiny_model_directory: Path, registry: Registry, save_adapter: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    read, reads = core.read_adapter, list[Path]()
    monkeypatch.setattr(core, "read_adapter", lambda folder: reads.append(folder) or read(folder))
    with served(tiny_model_directory, Sources([registry.folder])) as service:
        before, reads[:] = service.find("it").id, []
        version = registry.add("it", save_adapter("new", 2)).version
        weights = version.folder / "adapter_model.safetensors"
        contents = weights.read_bytes()
        weights.chmod(0o600)
        weights.write_bytes(contents[:-8])
        for _ in range(3):
            service.publish()
            assert isinstance(service.faults["it"], AdapterFileError) and service.find("it").id == before
        assert reads == [version.folder]
        weights.write_bytes(contents)
        assert service.load("it").id == service.find("it").id == version.id
        service.publish()
        assert not service.faults


def test_a_name_in_two_registries_stops_no_other(
    tiny_model_directory: Path, registry: Registry, save_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    other = Registry(tmp_path / "second")
    other.add("other", save_adapter("other", 3))
    with served(tiny_model_directory, Sources([registry.folder, other.folder])) as service:
        before = service.find("it").id
        other.add("it", save_adapter("it", 4))
        new = registry.add("new", save_adapter("new", 5)).version.id
        service.publish()
        assert isinstance(service.faults["it"], UsageError) and set(service.faults) == {"it"}
        assert (service.find("it").id, service.find("new").id) == (before, new)
        with pytest.raises(UsageError):
            Sources([registry.folder, other.folder])
        other.remove("it")
        service.publish()
        assert not service.faults and service.find("it").id == before


def test_files_that_changed_are_not_served_as_the_version_that_they_were(
    tiny_model_directory: Path, save_adapter: Callable[..., Path]
) -> None:
    folder, other = save_adapter("own", 1), save_adapter("other", 2)
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    with served(tiny_model_directory, Sources([folder])) as service:
        id = service.find("own").id
        shutil.copytree(other, folder, dirs_exist_ok=True)
        service.unload("own")
        with pytest.raises(AdapterFileError, match="no longer those of own@"):
            service.load("own")
        with pytest.raises(UnknownModelError):
            service.find("own")
        for path, contents in before.items():
            path.write_bytes(contents)
        assert service.load("own").id == id
