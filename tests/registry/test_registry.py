"""lorakit.registry: names, versions, tags, rollback, removal, verification, and polls of a server."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lorakit import durable_folders
from lorakit.durable import TEMPORARY
from lorakit.errors import AdapterError, AdapterFileError, DiskError, UsageError
from lorakit.registry import Registry, content_hash, is_registry, names
from lorakit.registry import registry as module

from ..laws.snapshots import files

pytestmark = pytest.mark.skipif(os.name == "nt", reason="flock")


def test_a_version_is_a_copy_under_its_hash(one: Path, registry: Registry) -> None:
    change = registry.add("legal", one)
    version = change.version
    assert change.before is None and change.is_new
    assert version.folder == registry.folder / "objects" / content_hash(one)
    assert version.id == f"legal@{content_hash(one)[:12]}"
    assert files(version.folder) == files(one)
    assert registry.resolve("legal") == registry.resolve(version.id) == version
    assert is_registry(registry.folder) and not is_registry(one)


def test_the_adapter_of_a_run(one: Path, tmp_path: Path, registry: Registry) -> None:
    (tmp_path / "run").mkdir()
    one.rename(tmp_path / "run" / "adapter")
    assert registry.add("legal", tmp_path / "run").version.hash == content_hash(tmp_path / "run" / "adapter")


def test_adding_again_changes_nothing(one: Path, registry: Registry) -> None:
    first = registry.add("legal", one)
    before = files(registry.folder)
    again = registry.add("legal", one)
    assert again.version == first.version and not again.is_new
    assert files(registry.folder) == before


def test_names_share_a_version(one: Path, registry: Registry) -> None:
    registry.add("legal", one)
    registry.add("law", one)
    assert len(list((registry.folder / "objects").iterdir())) == 1
    registry.remove("legal")
    assert registry.gc().removed == ()
    assert registry.resolve("law").folder.is_dir()


def test_publish_roll_back_and_tag(one: Path, two: Path, registry: Registry) -> None:
    old = registry.add("legal", one).version
    change = registry.add("legal", two)
    assert change.before == old and change.version.hash == content_hash(two)
    assert registry.tag(old.id, "stable") == registry.resolve("legal@stable") == old
    back = registry.rollback("legal")
    assert (back.version, back.before) == (old, change.version)
    assert registry.rollback(change.version.id).version == change.version
    registry.tag("legal", "stable")
    assert registry.resolve("legal@stable") == change.version
    registry.untag("legal", "stable")
    with pytest.raises(AdapterError):
        registry.untag("legal", "stable")
    with pytest.raises(AdapterError):
        registry.resolve("legal@stable")


def test_unknown_names(one: Path, registry: Registry) -> None:
    for call in (registry.resolve, registry.entry, registry.rollback, registry.remove):
        with pytest.raises(AdapterFileError):  # not a registry
            call("legal")
    registry.add("legal", one)
    for call in (registry.resolve, registry.entry, registry.rollback, registry.remove):
        with pytest.raises(AdapterError) as caught:
            call("lega")
        assert (caught.value.what, caught.value.allowed) == ("lega", ("legal",))
        with pytest.raises(UsageError):
            call("../x")


def test_a_directory_with_other_contents_is_not_made_a_registry(one: Path, tmp_path: Path) -> None:
    (tmp_path / "runs" / "notes").mkdir(parents=True)
    with pytest.raises(UsageError) as caught:
        Registry(tmp_path / "runs").add("legal", one)
    assert caught.value.field == "registry"
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["notes"]


def test_removed_names_and_their_versions(one: Path, two: Path, registry: Registry) -> None:
    version = registry.add("legal", one).version
    registry.add("other", two)
    size = sum(path.stat().st_size for path in version.folder.iterdir())
    registry.remove("legal")
    assert version.folder.is_dir()
    with pytest.raises(AdapterError):
        registry.resolve("legal")
    found = registry.gc()
    assert (found.removed, found.in_use, found.freed_bytes) == ((version.hash,), (), size)
    assert not version.folder.exists() and registry.verify() == ()
    registry.add("legal", one)
    assert registry.verify() == ()


def test_gc_forgets_old_versions_only_if_told(one: Path, two: Path, registry: Registry) -> None:
    old = registry.add("legal", one).version
    registry.add("legal", two)
    assert registry.gc().removed == registry.gc(keep=1).removed == ()
    assert registry.gc(keep=0).removed == (old.hash,)
    with pytest.raises(AdapterError):
        registry.rollback("legal")


def test_gc_removes_what_was_interrupted(one: Path, registry: Registry) -> None:
    registry.add("legal", one)
    shutil.copytree(one, registry.folder / "objects" / f"{TEMPORARY}x")
    (registry.folder / "names" / f"{TEMPORARY}y-legal.json").write_text("{")
    before = registry.listing()
    registry.gc()
    assert not list(registry.folder.rglob(f"{TEMPORARY}*"))
    assert registry.listing().entries == before.entries == {"legal": registry.entry("legal")}


def test_damage_is_found_and_repaired_by_adding_again(one: Path, two: Path, registry: Registry) -> None:
    first = registry.add("legal", one).version
    second = registry.add("legal", two).version
    weights = first.folder / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    (problem,) = registry.verify()
    assert problem.where == first.folder
    with pytest.raises(AdapterFileError) as caught:
        registry.rollback("legal")
    assert caught.value.where == str(first.folder)
    assert registry.resolve("legal") == second
    shutil.rmtree(second.folder)
    assert {problem.where for problem in registry.verify()} == {first.folder, second.folder}
    registry.add("other", one)
    registry.add("other", two)
    assert registry.verify() == () and registry.resolve("legal") == second


def test_a_damaged_name_stops_neither_the_others_nor_loses_versions(one: Path, two: Path, registry: Registry) -> None:
    registry.add("legal", one)
    registry.add("other", two)
    path = registry.folder / "names" / "legal.json"
    path.write_text(path.read_text().replace("add", "odd"))
    listing = registry.listing()
    assert set(listing.entries) == {"other"} and listing.damaged["legal"].where == str(path)
    assert [problem.where for problem in registry.verify()] == [path]
    with pytest.raises(AdapterFileError):
        registry.gc()
    assert len(list((registry.folder / "objects").iterdir())) == 2
    with pytest.raises(AdapterFileError):
        registry.add("legal", two)
    registry.remove("legal")
    assert registry.add("legal", one).is_new and registry.verify() == ()


def test_a_poll_reads_only_the_names_that_changed(
    one: Path, two: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.add("a", one)
    registry.add("b", one)
    for name in ("a", "b"):  # as if they had been written a minute ago
        path = registry.folder / "names" / f"{name}.json"
        os.utime(path, (path.stat().st_mtime - 60,) * 2)
    monkeypatch.setattr("lorakit.file_hashes.SETTLED_SECONDS", -1e9)
    known = registry.listing().entries
    again = registry.listing(known).entries
    assert again == known and all(again[name] is known[name] for name in known)
    registry.add("b", two)
    entries = registry.listing(known).entries
    assert entries["a"] is known["a"] and entries["b"].current == content_hash(two)
    assert registry.resolve("b", known).hash == known["b"].current
    registry.remove("a")
    assert set(registry.listing(entries).entries) == {"b"}


@pytest.mark.parametrize("is_back", [False, True])
def test_a_name_that_is_removed_while_it_is_read(
    is_back: bool, one: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be added again before the reader looks for the reason."""
    registry.add("a", one)
    registry.add("b", one)
    path, real, data = registry.folder / "names" / "a.json", names.read_json, list[bytes]()

    def late(file: Path, max_bytes: int) -> Any:
        if file == path and not data:
            data.append(path.read_bytes())
            path.unlink()
            if is_back:
                path.write_bytes(data[0])
            raise AdapterFileError("no such file", where=file)
        return real(file, max_bytes)

    monkeypatch.setattr(names, "read_json", late)
    listing = registry.listing()
    assert (set(listing.entries), listing.damaged) == ({"a", "b"} if is_back else {"b"}, {})
    path.unlink(missing_ok=True)
    with pytest.raises(AdapterError) as caught:
        registry.entry("a")
    assert caught.value.what == "a"


def test_a_name_that_was_just_written_is_read_again(one: Path, registry: Registry) -> None:
    """Its status might not show a second change within the resolution of the clock."""
    registry.add("a", one)
    assert registry.entry("a").status is None


def test_a_writer_waits_for_another_one(one: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    registry.add("legal", one)
    monkeypatch.setattr(module, "LOCK_SECONDS", 0.1)
    held = durable_folders.try_lock(registry.folder)
    assert held is not None and held >= 0
    with pytest.raises(DiskError) as caught:
        registry.tag("legal", "x")
    assert caught.value.where == str(registry.folder)
    if sys.platform == "linux":
        assert caught.value.what == f"process {os.getpid()}"
    assert registry.resolve("legal").name == "legal"  # readers need no lock
    os.close(held)
    registry.tag("legal", "x")


def test_without_locks_nothing_is_written(one: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    registry.add("legal", one)
    monkeypatch.setattr(module, "try_lock", lambda folder: -1)
    with pytest.raises(DiskError) as caught:
        registry.tag("legal", "x")
    assert caught.value.what == "flock"
    assert registry.resolve("legal").folder.is_dir()


def test_all_but_adding_needs_no_torch(one: Path, two: Path, registry: Registry) -> None:
    registry.add("legal", one)
    registry.add("legal", two)
    code = f"""
import sys
from lorakit.registry import Registry
registry = Registry({str(registry.folder)!r})
version = registry.resolve("legal")
with registry.lease(version) as held:
    assert held == version
registry.listing(), registry.tag("legal", "x"), registry.rollback("legal"), registry.verify(), registry.gc(0)
registry.remove("legal")
assert not {{"torch", "numpy", "transformers", "safetensors"}} & set(sys.modules), sorted(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
