"""Several processes at once: writers lose nothing, and readers never see a version that is incomplete."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lorakit.errors import AdapterFileError
from lorakit.registry import Lease, Registry, Version, content_hash

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def forked(work: Callable[[], object]) -> int:
    """Start a process that does a piece of work, and return its id; it exits with 0 if the work succeeded."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return child


def ended(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def open_files() -> int:
    """Return the number of this process's open files; 0 if the system does not tell."""
    return len(list(Path("/proc/self/fd").glob("*")))


TAGGING = """
import sys
from lorakit.registry import Registry
registry = Registry(sys.argv[1])
for number in range(20):
    registry.tag("legal", f"{sys.argv[2]}-{number}")
    registry.rollback(f"legal@{sys.argv[3 + number % 2]}")
"""


def test_processes_that_tag_and_roll_back_lose_nothing(one: Path, two: Path, registry: Registry) -> None:
    hashes = [registry.add("legal", source).version.hash for source in (one, two)]
    words = [sys.executable, "-c", TAGGING, str(registry.folder)]
    children = [subprocess.Popen([*words, name, *hashes]) for name in "abc"]
    assert [child.wait() for child in children] == [0, 0, 0]
    entry = registry.entry("legal")
    assert set(entry.tags) == {f"{name}-{number}" for name in "abc" for number in range(20)}
    changes = [event.hash for event in entry.history]
    assert entry.current == changes[-1] and all(before != after for before, after in itertools.pairwise(changes))
    assert registry.verify() == ()


def test_processes_that_add_to_one_name_lose_nothing(save_adapter: Callable[..., Path], registry: Registry) -> None:
    sources = [save_adapter(f"source-{seed}", seed, target_modules=["q_proj"]) for seed in range(1, 7)]

    def publishing(mine: list[Path]) -> Callable[[], object]:
        return lambda: [registry.add("legal", source) for source in mine]

    children = [forked(publishing(sources[start::3])) for start in range(3)]
    assert [ended(child) for child in children] == [0, 0, 0]
    entry = registry.entry("legal")
    assert sorted(event.hash for event in entry.history) == sorted(map(content_hash, sources))
    assert (*entry.previous, entry.current) == tuple(event.hash for event in entry.history)
    assert registry.verify() == ()


def test_readers_see_whole_versions_while_others_publish_and_collect(one: Path, two: Path, registry: Registry) -> None:
    registry.add("legal", one)

    def publish() -> None:
        for number in range(40):
            registry.add("legal", (two, one)[number % 2])
            registry.gc(keep=0)

    def read() -> None:
        seen, deadline = set[str](), time.monotonic() + 120
        while os.getppid() == parent and time.monotonic() < deadline and not done.exists():
            version = registry.resolve("legal")
            try:
                lease = registry.lease(version)
            except AdapterFileError as error:
                assert error.what == version.id
                continue
            with lease:
                assert content_hash(version.folder) == version.hash
                seen.add(version.hash)
        assert len(seen) == 2

    parent, done = os.getpid(), registry.folder.parent / "done"
    readers = [forked(read) for _ in range(2)]
    writer = forked(publish)
    code = ended(writer)
    done.touch()
    assert [code, *map(ended, readers)] == [0, 0, 0]


HOLDING = """
import sys, time
from lorakit.registry import Registry
registry = Registry(sys.argv[1])
lease = registry.lease(registry.resolve("legal"))
print("holding", flush=True)
time.sleep(600)
"""


@contextlib.contextmanager
def held(registry: Registry) -> Iterator[subprocess.Popen[str]]:
    """Start a process that holds a lease, and kill it at the end."""
    words = [sys.executable, "-c", HOLDING, str(registry.folder)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as child:
        try:
            assert child.stdout is not None and child.stdout.readline() == "holding\n"
            yield child
        finally:
            child.kill()


def test_gc_spares_what_a_process_uses_until_it_is_killed(one: Path, registry: Registry) -> None:
    version = registry.add("legal", one).version
    with held(registry) as first, held(registry):
        registry.remove("legal")
        found = registry.gc()
        assert (found.removed, found.in_use) == ((), (version.hash,))
        first.send_signal(signal.SIGKILL)
        first.wait()
        assert registry.gc().in_use == (version.hash,)
        assert content_hash(version.folder) == version.hash
    found = registry.gc()
    assert (found.removed, found.in_use) == ((version.hash,), ())


def test_a_lease_is_released_once(one: Path, registry: Registry) -> None:
    version = registry.add("legal", one).version
    registry.remove("legal")
    lease, other = registry.lease(version), registry.lease(version)
    assert isinstance(lease, Lease) and registry.gc().in_use == (version.hash,)
    lease.release()
    lease.release()
    assert registry.gc().in_use == (version.hash,)
    with other as same:
        assert same == version
    assert registry.gc().removed == (version.hash,)


def test_a_lease_of_what_gc_removed(one: Path, registry: Registry) -> None:
    version = registry.add("legal", one).version
    registry.remove("legal")
    registry.gc()
    with pytest.raises(AdapterFileError) as caught:
        registry.lease(version)
    assert (caught.value.what, caught.value.where) == (version.id, str(version.folder))
    registry.add("legal", one)
    registry.lease(version).release()


def test_a_lease_that_came_between_lock_and_removal(
    one: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The directory was opened before `gc` moved it away, and locked after that."""
    from lorakit.registry import leases

    version, real = registry.add("legal", one).version, leases.try_lock
    registry.remove("legal")

    def late(folder: Path, *, shared: bool) -> int | None:
        descriptor = real(folder, shared=shared)
        folder.rename(folder.with_name("moved"))
        return descriptor

    monkeypatch.setattr(leases, "try_lock", late)
    open_before = open_files()
    with pytest.raises(AdapterFileError) as caught:
        registry.lease(version)
    assert caught.value.what == Version("legal", version.hash, version.folder).id
    assert open_files() == open_before
