"""A process that is killed, or a disk that fails or is full, at any file operation: the old or the new version."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from lorakit.durable import TEMPORARY
from lorakit.registry import Registry, content_hash, is_registry

from ..laws.crashing import How, at_every_operation
from ..laws.snapshots import files

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
HOWS: tuple[How, ...] = ("error", "full", "kill")


@dataclass(frozen=True)
class Action:
    """A change of the name "legal".

    Attributes:
        before: The adapters that were added before, 1 or 2.
        change: The change, given the registry and the directories of the adapters by number.
        results: The version before and after the change; "" if there is none.
    """

    before: tuple[int, ...]
    change: Callable[[Registry, dict[int, Path]], object]
    results: tuple[str, str]


def remove(registry: Registry, _: dict[int, Path]) -> None:
    if "legal" in registry.listing().entries:
        registry.remove("legal")


ACTIONS = {
    "first": Action((), lambda registry, adapters: registry.add("legal", adapters[1]), ("", "1")),
    "add": Action((1,), lambda registry, adapters: registry.add("legal", adapters[2]), ("1", "2")),
    "rollback": Action(
        (1, 2), lambda registry, adapters: registry.rollback(f"legal@{content_hash(adapters[1])}"), ("2", "1")
    ),
    "tag": Action((1,), lambda registry, adapters: registry.tag("legal", "stable"), ("1", "1")),
    "remove": Action((1,), remove, ("1", "")),
}


def current(root: Path, adapters: dict[int, Path]) -> str:
    """Return which version is current; all versions and names must be whole."""
    registry = Registry(root)
    if not is_registry(root):
        assert not list(root.rglob("*.json"))
        return ""
    assert registry.verify() == () and not registry.listing().damaged
    if "legal" not in registry.listing().entries:
        return ""
    with registry.lease(registry.resolve("legal")) as version:
        (number,) = (number for number, folder in adapters.items() if content_hash(folder) == version.hash)
        assert files(version.folder) == files(adapters[number])
        return str(number)


@pytest.mark.costly(cases=3)
@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("action", ACTIONS)
def test_a_crash_leaves_the_old_or_the_new_version(action: str, how: How, one: Path, two: Path, tmp_path: Path) -> None:
    template, adapters, entry = tmp_path / "template", {1: one, 2: two}, ACTIONS[action]
    template.mkdir()
    for number in entry.before:
        Registry(template).add("legal", adapters[number])

    def judge(root: Path) -> str:
        found = current(root, adapters)
        entry.change(Registry(root), adapters)  # repeated, which must succeed
        assert current(root, adapters) == entry.results[1]
        assert action != "tag" or Registry(root).resolve("legal@stable").hash == content_hash(one)
        Registry(root).gc()
        assert not list(root.rglob(f"{TEMPORARY}*"))
        return found

    found = at_every_operation(lambda root: entry.change(Registry(root), adapters), template, judge, how=how)
    old, new = entry.results
    assert found[-1] == new and set(found) <= {old, new}
    assert how != "kill" or found == [old] * found.count(old) + [new] * (len(found) - found.count(old))
    assert old in found or (how, action) == ("full", "remove")  # which needs no room


@pytest.mark.costly(cases=1)
@pytest.mark.parametrize("how", HOWS)
def test_a_crash_of_a_repair(how: How, one: Path, two: Path, tmp_path: Path) -> None:
    """A damaged version is replaced as a whole."""
    template = tmp_path / "template"
    damaged = Registry(template).add("legal", two).version.folder / "adapter_model.safetensors"
    Registry(template).add("legal", one)
    damaged.write_bytes(b"")

    def work(root: Path) -> None:
        Registry(root).add("legal", two)

    def judge(root: Path) -> str:
        problems = Registry(root).verify()
        work(root)
        assert Registry(root).verify() == ()
        return str(len(problems))

    found = Counter(at_every_operation(work, template, judge, how=how))
    assert set(found) == {"1", "0"} and found["1"] > 10


@pytest.mark.costly(cases=1)
@pytest.mark.parametrize("action", ["gc", "keep"])
@pytest.mark.parametrize("how", ["error", "kill"])
def test_a_crash_of_gc_leaves_what_names_need(
    how: How, action: str, one: Path, two: Path, save_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    template, three = tmp_path / "template", save_adapter("three", 3)
    registry = Registry(template)
    for name, source in (("legal", one), ("other", two), ("legal", three)):
        registry.add(name, source)
    registry.remove("other")
    current = registry.resolve("legal").hash

    def work(root: Path) -> None:
        Registry(root).gc(0 if action == "keep" else None)

    def judge(root: Path) -> str:
        found = Registry(root)
        assert found.verify() == () and found.resolve("legal").hash == current
        work(root)
        assert not list(root.rglob(f"{TEMPORARY}*"))
        left = {path.name for path in (root / "objects").iterdir()}
        assert left == found.entry("legal").hashes
        return str(len(left))

    found = at_every_operation(work, template, judge, how=how)
    assert len(found) > 5 and set(found) == ({"1"} if action == "keep" else {"2"})


PUBLISHING = """
import itertools, sys
from lorakit.registry import Registry
registry = Registry(sys.argv[1])
for source in itertools.cycle(sys.argv[2:]):
    registry.add("legal", source)
    print("added", flush=True)
"""


@pytest.mark.costly(cases=0)
def test_kill_9_while_publishing(one: Path, two: Path, registry: Registry) -> None:
    """Processes that publish two versions in turn are killed at random times; another one continues at once."""
    hashes = {content_hash(one), content_hash(two)}
    registry.add("legal", one)
    draws = random.Random(0)
    for _ in range(6):
        words = [sys.executable, "-c", PUBLISHING, str(registry.folder), str(one), str(two)]
        with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None and child.stdout.readline() == "added\n"
            time.sleep(draws.random() / 10)
            child.send_signal(signal.SIGKILL)
        assert registry.verify() == ()
        assert registry.resolve("legal").hash in hashes
        registry.tag("legal", "seen")
    registry.gc()
    assert not list(registry.folder.rglob(f"{TEMPORARY}*"))


LIMITED = """
import resource, signal, sys
from lorakit.core import check_adapter
from lorakit.errors import DiskError
from lorakit.registry import Registry
check_adapter(sys.argv[2])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), -1))
try:
    Registry(sys.argv[1]).add("legal", sys.argv[2])
except DiskError as error:
    print(error.where)
"""


@pytest.mark.parametrize("limit", [0, 100, 3000])
def test_files_that_the_system_limits(limit: int, one: Path, two: Path, registry: Registry) -> None:
    """The kernel ends a write in the middle (EFBIG), as a full disk does."""
    old = registry.add("legal", one).version
    words = [sys.executable, "-c", LIMITED, str(registry.folder), str(two), str(limit)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(registry.folder.resolve() / "objects" / content_hash(two))
    assert registry.resolve("legal") == old and registry.verify() == ()
    assert [path.name for path in (registry.folder / "objects").iterdir()] == [old.hash]
