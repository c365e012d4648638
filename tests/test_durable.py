"""Atomic writes, and reads only of regular, bounded and valid files."""

from __future__ import annotations

import itertools
import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorakit import durable
from lorakit.durable import (
    TEMPORARY,
    parse_json,
    read_bytes,
    read_json,
    sha256_bytes,
    sha256_file,
    write_bytes,
    write_json,
    write_text,
)
from lorakit.durable_folders import publish_directory, sweep
from lorakit.errors import AdapterFileError, DiskError


def test_writes_and_reads(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file"
    write_bytes(path, b"one")
    write_bytes(path, memoryview(b"two"))
    assert path.read_bytes() == read_bytes(path, 3) == b"two"
    write_text(path, "Grüße")
    assert path.read_text("utf-8") == "Grüße"
    write_json(path, {"b": 1, "a": [None, "ü"]})
    assert path.read_text("utf-8") == '{\n  "a": [\n    null,\n    "ü"\n  ],\n  "b": 1\n}\n'
    assert read_json(path) == {"b": 1, "a": [None, "ü"]}
    assert [p.name for p in path.parent.iterdir()] == ["file"]
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"a": float("nan")})


@pytest.mark.skipif(os.name == "nt", reason="POSIX modes")
@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_have_the_mode_that_the_umask_asks_for(mask: int, mode: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        write_bytes(tmp_path / "file", b"")
        with publish_directory(tmp_path / "folder") as folder:
            (folder / "inner").write_bytes(b"")
    finally:
        os.umask(before)
    for path in (tmp_path / "file", tmp_path / "folder" / "inner"):
        assert stat.S_IMODE(path.stat().st_mode) == mode


def crash_at_every_call(
    monkeypatch: pytest.MonkeyPatch, functions: tuple[str, ...], work: Callable[[], object], check: Callable[[], object]
) -> int:
    """Make the k-th call of any of these os functions fail, for every k, and check after each."""
    real = {name: getattr(os, name) for name in functions}
    for k in itertools.count(1):
        left = [k]

        def failing(name: str, left: list[int] = left) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                left[0] -= 1
                if left[0] == 0:
                    raise OSError(28, "No space left on device")
                return real[name](*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            for name in functions:
                patch.setattr(os, name, failing(name))
            try:
                work()
            except DiskError as error:
                assert "No space left on device" in str(error)
                done = False
            else:
                done = left[0] > 0
        check()
        if done:
            return k - 1
    raise AssertionError


FUNCTIONS = ("open", "fsync", "replace", "rename", "mkdir")


def test_a_failure_at_any_file_operation_leaves_old_or_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "folder" / "file"
    write_bytes(path, b"old")

    def check() -> None:
        assert path.read_bytes() in (b"old", b"new")
        assert [p.name for p in path.parent.iterdir()] == ["file"]

    assert crash_at_every_call(monkeypatch, FUNCTIONS, lambda: write_bytes(path, b"new"), check) >= 3


def test_a_failure_at_any_operation_of_publishing_leaves_nothing_or_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    final = tmp_path / "checkpoint"

    def work() -> None:
        with publish_directory(final) as folder:
            write_bytes(folder / "one", b"1")
            write_bytes(folder / "two", b"2")

    def check() -> None:
        left = [p.name for p in tmp_path.iterdir()]
        assert left in ([], ["checkpoint"])
        if left:
            assert sorted(p.name for p in final.iterdir()) == ["one", "two"]
            for path in final.iterdir():
                path.unlink()
            final.rmdir()

    assert crash_at_every_call(monkeypatch, FUNCTIONS, work, check) >= 8


def test_every_byte_is_flushed_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order that is safe in a power failure: content, then the name, then the directory."""
    events: list[str] = []
    fsync, replace = os.fsync, os.replace

    def note_fsync(descriptor: int) -> None:
        events.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        fsync(descriptor)

    def note_replace(*args: Any, **kwargs: Any) -> None:
        events.append("rename")
        replace(*args, **kwargs)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    write_bytes(tmp_path / "file", b"x")
    assert events == ["file", "rename", "folder"]


def test_a_kill_leaves_only_what_a_sweep_finds(tmp_path: Path) -> None:
    write_bytes(tmp_path / "file", b"old")
    code = f"""
import os
from lorakit import durable
os.fsync = lambda descriptor: os._exit(9)
durable.write_bytes({str(tmp_path / "file")!r}, b"new")
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    assert (tmp_path / "file").read_bytes() == b"old"
    left = [p.name for p in tmp_path.iterdir() if p.name != "file"]
    assert len(left) == 1 and left[0].startswith(TEMPORARY)
    (tmp_path / (TEMPORARY + "folder")).mkdir()
    (tmp_path / (TEMPORARY + "folder") / "x").touch()
    assert sweep(tmp_path) == sorted([*left, TEMPORARY + "folder"])
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert sweep(tmp_path / "nowhere") == []


@pytest.mark.parametrize(
    ("prepare", "reason"),
    [
        (lambda folder: (folder / "file").mkdir(), "directory"),
        (lambda folder: (folder.rmdir(), folder.write_text("x")), "directory|exists"),
    ],
)
def test_a_disk_that_refuses(prepare: Callable[[Path], object], reason: str, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    prepare(folder)
    with pytest.raises(DiskError, match=f"(?i)file: cannot be written .*({reason}).*unchanged") as caught:
        write_bytes(folder / "file", b"x")
    assert isinstance(caught.value, OSError)


@pytest.mark.skipif(os.name == "nt" or os.getuid() == 0, reason="root writes everywhere")
def test_a_folder_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(DiskError, match="Permission denied"):
        write_bytes(tmp_path / "file", b"x")


def test_only_regular_files_of_bounded_size(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with pytest.raises(AdapterFileError, match="file: no such file"):
        read_bytes(path, 10)
    path.write_bytes(b"x" * 11)
    with pytest.raises(AdapterFileError, match="file: 11 bytes exceed the limit of 10"):
        read_bytes(path, 10)
    (tmp_path / "link").symlink_to(path)
    assert read_bytes(tmp_path / "link", 11) == b"x" * 11
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "to-fifo").symlink_to(tmp_path / "fifo")
    for name in ("fifo", "to-fifo", ""):
        with pytest.raises(AdapterFileError, match="not a regular file"):
            read_bytes(tmp_path / name, 10)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"a": 1, "a": 2}', "duplicate key 'a'"),
        (b'{"x": {"a": 1, "a": 2}}', "duplicate key 'a'"),
        (b'{"a": NaN}', "NaN is not a JSON number"),
        (b'{"a": -Infinity}', "-Infinity is not a JSON number"),
        (b'{"a": "\xff"}', "not valid JSON"),
        (b"\xef\xbb\xbf{}", "not valid JSON"),
    ],
)
def test_json_is_read_strictly(text: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(text)
    with pytest.raises(
        AdapterFileError, match=f"x.json: not valid JSON.*{reason}" if reason != "not valid JSON" else reason
    ):
        read_json(path)


def test_hashes(tmp_path: Path) -> None:
    data = os.urandom((1 << 20) + 7)
    (tmp_path / "x").write_bytes(data)
    import hashlib

    assert sha256_bytes(data) == sha256_file(tmp_path / "x") == hashlib.sha256(data).hexdigest()


def test_parse_json_takes_text_and_bytes() -> None:
    value = {"a": [1, 2.5, None, True, "ü"]}
    assert parse_json(json.dumps(value)) == parse_json(json.dumps(value).encode()) == value


def test_nothing_but_the_standard_library() -> None:
    assert not {"torch", "numpy", "pydantic"} & set(vars(durable))
