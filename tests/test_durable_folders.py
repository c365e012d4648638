"""Files of a directory replaced together: nothing else is lost, whatever it contains and whoever else writes."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lorakit import durable, durable_folders
from lorakit.durable import TEMPORARY
from lorakit.durable_folders import publish_directory, replace_files, replace_in_order, sweep
from lorakit.errors import DiskError

from .laws.crashing import How, Operations, at_every_operation
from .laws.snapshots import files

pytestmark = pytest.mark.skipif(os.name == "nt", reason="POSIX folders")


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Return a directory with two files to replace and others to keep."""
    folder = tmp_path / "folder"
    (folder / "sub" / "empty").mkdir(parents=True)
    for name in ("one", "two", "other", "sub/inner"):
        (folder / name).write_text(f"old {name}")
    yield folder
    assert not list(tmp_path.rglob(f"{TEMPORARY}*"))


NEW = {"one": b"new one", "two": None, "three": b"new three"}
AFTER = {"one": b"new one", "three": b"new three", "other": b"old other", "sub/inner": b"old sub/inner"}


def needs_exchange(tmp_path: Path) -> None:
    for name in ("probe-a", "probe-b"):
        (tmp_path / name).mkdir()
    try:
        durable_folders._exchange(tmp_path / "probe-a", tmp_path / "probe-b")
    except OSError as cause:
        pytest.skip(f"this file system cannot exchange folders: {cause}")


def test_files_are_replaced_and_the_rest_stays(folder: Path, tmp_path: Path) -> None:
    needs_exchange(tmp_path)
    (folder / "one").chmod(0o640)
    (folder / "link").symlink_to("nowhere")
    os.mkfifo(folder / "fifo")
    os.utime(folder / "sub", (1, 2))
    (folder / "sub").chmod(0o710)
    folder.chmod(0o750)
    inode = (folder / "other").stat().st_ino
    assert replace_files(folder, NEW)
    (folder / "fifo").unlink()
    assert files(folder) == AFTER
    assert (folder / "sub" / "empty").is_dir() and (folder / "link").readlink() == Path("nowhere")
    modes = [stat.S_IMODE(path.stat().st_mode) for path in (folder, folder / "one", folder / "sub")]
    assert modes == [0o750, 0o640, 0o710]
    assert (folder / "sub").stat().st_mtime == 2
    assert ((folder / "other").stat().st_ino, (folder / "other").stat().st_nlink) == (inode, 1)


def test_a_link_to_the_folder_stays_and_a_link_among_the_files_is_replaced(folder: Path, tmp_path: Path) -> None:
    needs_exchange(tmp_path)
    blob = tmp_path / "blob"
    (folder / "one").rename(blob)
    (folder / "one").symlink_to(blob)
    (tmp_path / "link").symlink_to("folder")
    assert replace_files(tmp_path / "link", NEW)
    assert (tmp_path / "link").is_symlink() and files(folder) == AFTER
    assert not (folder / "one").is_symlink() and blob.read_text() == "old one"


@pytest.mark.parametrize("standing", [None, "empty"])
def test_a_new_folder_needs_no_exchange(standing: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(durable_folders, "_exchange", None)
    final = tmp_path / "a" / "b"
    if standing:
        final.mkdir(parents=True)
        final.chmod(0o700)
    assert replace_files(final, {"one": b"1", "two": None})
    assert files(final) == {"one": b"1"}
    assert not standing or stat.S_IMODE(final.stat().st_mode) == 0o700


def fail(code: int) -> Callable[..., Any]:
    def call(*_: Any, **__: Any) -> Any:
        raise OSError(code, os.strerror(code))

    return call


CANNOT: dict[str, Callable[[Path, pytest.MonkeyPatch], object]] = {
    "no system call": lambda f, patch: patch.setattr(durable_folders, "_exchange", fail(errno.ENOSYS)),
    "no such rename here": lambda f, patch: patch.setattr(durable_folders, "_exchange", fail(errno.EINVAL)),
    "no hard links": lambda f, patch: patch.setattr(os, "link", fail(errno.EPERM)),
    "another disk below": lambda f, patch: patch.setattr(os, "link", fail(errno.EXDEV)),
    "another owner": lambda f, patch: patch.setattr(durable_folders, "_take_owner_and_mode", fail(errno.EPERM)),
    "the parent is closed": lambda f, patch: patch.setattr(durable.Path, "mkdir", fail(errno.EACCES)),
    "mount point": lambda f, patch: patch.setattr(os.path, "ismount", lambda path: True),
    "not writable": lambda f, patch: patch.setattr(os, "access", lambda *_: False),
    "working directory": lambda f, patch: patch.chdir(f),
    "working directory below": lambda f, patch: patch.chdir(f / "sub"),
    "too many entries": lambda f, patch: patch.setattr(durable_folders, "MOST_ENTRIES", 4),
    "a folder in the way": lambda f, patch: (f / "three").mkdir(),
}


@pytest.mark.parametrize("why", CANNOT)
def test_what_cannot_be_exchanged_is_not_touched(why: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, inode = files(folder), folder.stat().st_ino
    with monkeypatch.context() as patch:
        CANNOT[why](folder, patch)
        assert replace_files(folder, NEW) is False
    assert (files(folder), folder.stat().st_ino) == (before, inode)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
@pytest.mark.parametrize("where", ["write", "link", "fsync"])
def test_a_disk_that_is_full_or_fails_ends_the_write(
    where: str, code: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = files(folder)
    with monkeypatch.context() as patch:
        patch.setattr(os, where, fail(code))
        with pytest.raises(DiskError, match=f"folder: cannot be written .*{os.strerror(code)}.*unchanged"):
            replace_files(folder, NEW)
    assert files(folder) == before


def test_what_others_write_meanwhile_is_kept(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between hard links and exchange: new files, a newer one, one deeper down."""
    needs_exchange(tmp_path)
    real = durable_folders._exchange

    def late(new: Path, old: Path) -> None:
        (old / "late").write_text("late")
        (old / "sub" / "late").write_text("late")
        (old / "fresh").mkdir()
        (tmp_path / "newer").write_text("newer")
        (tmp_path / "newer").replace(old / "other")
        os.utime(old / "other", ns=(1 << 62, 1 << 62))
        real(new, old)

    monkeypatch.setattr(durable_folders, "_exchange", late)
    assert replace_files(folder, NEW)
    late_ones = {"late": b"late", "sub/late": b"late", "other": b"newer"}
    assert files(folder) == {**AFTER, **late_ones}
    assert (folder / "fresh").is_dir()


def test_all_is_flushed_before_the_exchange_and_that_before_the_old_files_go(folder: Path, tmp_path: Path) -> None:
    """The order that is safe in a power failure."""
    needs_exchange(tmp_path)
    operations = Operations(0, "error")
    with operations.watched():
        assert replace_files(folder, NEW)
    log = operations.log
    at = log.index("exchange")
    assert [name for name in log[:at] if name in ("write", "fsync")] == ["write", "fsync"] * 2 + ["fsync"] * 3
    assert log[at - 1] == "fsync" and log[at + 1 : at + 3] == ["read", "fsync"]
    assert "unlink" not in log[:at] and not {"write", "link"} & set(log[at:])
    assert log.count("fsync") == 6  # two files, two subdirectories, the directory, its parent


def test_two_writers_of_one_folder_lose_nothing(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second exchanges first, and a file is added to its directory before the first exchanges that one."""
    needs_exchange(tmp_path)
    real = durable_folders._exchange

    def late(new: Path, old: Path) -> None:
        monkeypatch.setattr(durable_folders, "_exchange", real)
        assert replace_files(folder, {"one": b"second", "two": None, "three": None})
        (folder / "late").write_text("late")
        real(new, old)

    monkeypatch.setattr(durable_folders, "_exchange", late)
    assert replace_files(folder, NEW)
    assert files(folder) == {**AFTER, "late": b"late"}


def test_a_sweep_after_the_exchange_loses_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs_exchange(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(durable_folders, "_retire", fail(errno.EIO))  # as if the process had been killed here
        assert replace_files(folder, NEW)
    (left,) = tmp_path.glob(f"{TEMPORARY}*")
    assert (left / "one").read_text() == "old one"
    (left / "late").write_text("late")
    assert sweep(tmp_path) == [left.name]
    assert files(folder) == {**AFTER, "late": b"late", "two": b"old two"}


def test_a_sweep_before_the_exchange_removes_what_was_not_finished(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    inode = (tmp_path / "folder").stat().st_ino
    left = tmp_path / f"{TEMPORARY}00+{inode}-folder"
    left.mkdir()
    (left / "new").touch()
    assert sweep(tmp_path) == [left.name]
    assert files(tmp_path) == {} and (tmp_path / "folder").is_dir()


@pytest.mark.costly
@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "two renames"])
@pytest.mark.parametrize("how", ["error", "kill"])
def test_a_published_folder_that_replaces_another_is_old_or_new(how: How, exchange: bool, tmp_path: Path) -> None:
    template = tmp_path / "template"
    (template / "final").mkdir(parents=True)
    (template / "final" / "file").write_text("old")

    def work(root: Path) -> None:
        with publish_directory(root / "final", replace=True) as folder:
            (folder / "file").write_text("new")

    def judge(root: Path) -> str:
        sweep(root)
        assert set(files(root)) == {"final/file"}
        return (root / "final" / "file").read_text()

    found = at_every_operation(work, template, judge, how=how, exchange=exchange)
    assert set(found[:-1]) == {"old", "new"} and found[-1] == "new"


def test_files_in_order_change_nothing_before_all_are_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, left, write = files(folder), [2], os.write

    def full(*args: Any) -> int:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(*args)

    steps: list[dict[str, bytes | None]] = [{"one": b"1"}, {"three": b"3"}, {"one": b"11", "two": None}]
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(DiskError, match=r"No space left on device.*unchanged"):
            replace_in_order(folder, steps)
    assert files(folder) == before
    replace_in_order(folder, steps)
    assert files(folder) == {**AFTER, "one": b"11", "three": b"3"}


def test_files_in_order_say_when_some_were_replaced(folder: Path) -> None:
    (folder / "three").mkdir()
    with pytest.raises(DiskError, match=r"some of its files were replaced.*Save again"):
        replace_in_order(folder, [{"one": b"1"}, {"three": b"3"}])


def test_publishing_is_refused_over_content_and_forgets_what_failed(tmp_path: Path) -> None:
    with publish_directory(tmp_path / "a") as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "x").write_text("x")
    with pytest.raises(DiskError, match=r"a: cannot be written"), publish_directory(tmp_path / "a") as folder:
        (folder / "y").write_text("y")
    assert [p.name for p in (tmp_path / "a").rglob("*")] == ["sub", "x"]
    for name in ("b", "new/deep/b"):
        with pytest.raises(KeyError), publish_directory(tmp_path / name):
            raise KeyError
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
