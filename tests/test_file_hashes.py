"""Hashes of files are kept while the files do not change, and no change of content goes unnoticed."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lorakit import file_hashes as hashes
from lorakit.caches import FILE_HASHES
from lorakit.file_hashes import FileStatus, file_hash

TICK_SECONDS = 0.02
"""Longer than a tick of the file system's clock."""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hashes, "LEAST_KEPT", 0)
    monkeypatch.setattr(hashes, "SETTLED_SECONDS", 0)
    return tmp_path / "cache" / FILE_HASHES.place


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that were read to hash them."""
    names: list[str] = []

    def counted(path: Path) -> str:
        names.append(path.name)
        return sha256(path.read_bytes())

    monkeypatch.setattr(hashes, "sha256_file", counted)
    return names


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    time.sleep(TICK_SECONDS)
    return path


def test_nothing_is_hashed_again_without_a_change(tmp_path: Path, hashed: list[str]) -> None:
    path = written(tmp_path / "a", b"one")
    assert [file_hash(path) for _ in range(3)] == [sha256(b"one")] * 3
    assert hashed == ["a"]


def in_place(path: Path) -> None:
    path.write_bytes(b"two")


def by_another_file(path: Path) -> None:
    (path.parent / "new").write_bytes(b"two")
    (path.parent / "new").replace(path)


def by_map(path: Path) -> None:
    import mmap

    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as data:
        data[:] = b"two"


@pytest.mark.parametrize("change", [in_place, by_another_file, by_map])
def test_other_content_under_the_same_size_and_times(
    change: Callable[[Path], None], tmp_path: Path, hashed: list[str]
) -> None:
    path = written(tmp_path / "a", b"one")
    before = path.stat()
    assert file_hash(path) == sha256(b"one")
    change(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = path.stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert file_hash(path) == sha256(b"two") and len(hashed) == 2


def test_the_hash_of_a_file_that_has_just_changed_is_not_kept(
    tmp_path: Path, hashed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hashes, "SETTLED_SECONDS", 60)
    path = written(tmp_path / "a", b"one")
    assert file_hash(path) == file_hash(path) == sha256(b"one")
    assert len(hashed) == 2


def test_a_file_that_changes_while_it_is_read_has_no_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "a", b"one")

    def slow(path: Path) -> str:
        path.write_bytes(b"two")
        return sha256(b"one")

    monkeypatch.setattr(hashes, "sha256_file", slow)
    with pytest.raises(OSError, match="changed"):
        file_hash(path)


@pytest.mark.parametrize("name", FileStatus._fields)
def test_each_part_of_a_status_is_part_of_the_key(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "a", b"one")
    assert file_hash(path) == sha256(b"one")
    status = FileStatus.of(path)
    monkeypatch.setattr(FileStatus, "of", lambda file: status._replace(**{name: 1}))
    monkeypatch.setattr(hashes, "sha256_file", lambda path: "f" * 64)
    assert file_hash(path) == "f" * 64


def test_a_file_with_the_same_status_under_another_name_is_hashed(tmp_path: Path, hashed: list[str]) -> None:
    path = written(tmp_path / "a", b"one")
    file_hash(path)
    (tmp_path / "link").hardlink_to(path)
    assert file_hash(tmp_path / "link") == sha256(b"one") and hashed == ["a", "link"]


@pytest.mark.parametrize(
    "content", [b"{", b"[]", b'{"format": 9, "files": []}', b'{"format": 3, "files": {}}', b"DIGIT"], ids=str
)
def test_a_damaged_cache_costs_a_hash(content: bytes, tmp_path: Path, cache: Path, hashed: list[str]) -> None:
    path = written(tmp_path / "a", b"one")
    file_hash(path)
    values = json.loads(cache.read_text(encoding="utf-8"))
    for entry in values["files"]:
        entry["sha256"] = entry["sha256"].translate({ord("b"): "c"})
    cache.write_bytes(json.dumps(values).encode() if content == b"DIGIT" else content)
    assert file_hash(path) == sha256(b"one") and len(hashed) == 2
    assert file_hash(path) and len(hashed) == 2


def test_a_cache_that_cannot_be_written_costs_a_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "a", b"one")
    monkeypatch.setenv("LORAKIT_CACHE", str(path / "cache"))
    assert file_hash(path) == sha256(b"one")
    for name in ("LORAKIT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("lorakit.machine.home_directory", lambda: None)
    assert file_hash(path) == sha256(b"one")


def test_hashes_of_small_files_are_not_kept_and_the_newest_is(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hashes, "LEAST_KEPT", 4)
    monkeypatch.setattr(hashes, "MOST_KEPT", 2)
    for name, content in (("c", b"four"), ("b", b"five"), ("a", b"seven"), ("d", b"one")):
        file_hash(written(tmp_path / name, content))
    kept = [entry["sha256"] for entry in json.loads(cache.read_text(encoding="utf-8"))["files"]]
    assert kept == [sha256(b"five"), sha256(b"seven")]


def test_a_total_that_is_too_large_is_not_hashed(tmp_path: Path, hashed: list[str]) -> None:
    paths = [written(tmp_path / name, b"1234") for name in "ab"]
    assert hashes.file_hashes(paths, most_bytes=7) == {} and hashed == []
    assert file_hash(paths[0])
    assert len(hashes.file_hashes(paths, most_bytes=7)) == 2  # a kept hash does not count
