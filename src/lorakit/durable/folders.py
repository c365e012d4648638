"""Directories: published whole, replaced whole, or replaced file by file in an order that readers can check.

Several files of a directory are replaced together by building a complete new directory next to it and exchanging the
two.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import secrets
import shutil
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

from lorakit.durable.files import TEMPORARY, raise_disk_error, sync_folder, sync_name, temporary_name, write_new
from lorakit.errors import DiskError

_EXCHANGED = re.compile(re.escape(TEMPORARY) + r"[0-9a-f]+\+(\d+)-(.+)", re.DOTALL)
"""Name of a directory built for an exchange: inode and name of the directory it replaces."""

_SET_ASIDE = re.compile(re.escape(TEMPORARY) + r"[0-9a-f]+~(.+)", re.DOTALL)
"""Name of a directory that was set aside for a new one: the original name."""

MOST_ENTRIES = 10_000
"""Directories with more entries, including subdirectories, are not rebuilt; their files are replaced in order."""

_CANNOT = frozenset(
    getattr(errno, name)
    for name in (
        *("EXDEV", "EPERM", "EACCES", "EROFS", "EMLINK", "ENOSYS", "EINVAL", "ENOTSUP", "EOPNOTSUPP", "EBUSY"),
        *("ENAMETOOLONG", "EEXIST", "ENOTEMPTY"),
    )
)
"""Errors of systems that cannot exchange two directories; any other error, such as a full disk, ends the write."""


@contextlib.contextmanager
def publish_directory(final: str | os.PathLike[str], *, replace: bool = False) -> Iterator[Path]:
    """Build a directory under a temporary name, then rename it into place if the block succeeds.

    Args:
        final: The final name; a symbolic link to a directory is followed.
        replace: Exchange it for an existing directory, which is then removed; otherwise that directory must be empty.

    Yields:
        A new directory next to it, on the same disk, to write into.

    Raises:
        DiskError: The disk fails, or `final` is a directory with content; nothing is left behind.
    """
    final = Path(os.path.realpath(final))
    temporary = temporary_name(final)
    try:
        temporary.mkdir(parents=True)
        if final.is_dir():
            with contextlib.suppress(PermissionError):
                _take_owner_and_mode(final, temporary)
        yield temporary
        for path in sorted(temporary.rglob("*")):
            if path.is_file():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
            elif path.is_dir():
                sync_folder(path)
        sync_folder(temporary)
        if replace and final.is_dir() and any(final.iterdir()):
            _put_in_place_of(temporary, final)
        else:
            temporary.rename(final)
        sync_name(final)
    except DiskError:
        raise
    except OSError as cause:
        raise_disk_error(final, cause)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def replace_files(folder: str | os.PathLike[str], contents: Mapping[str, bytes | None]) -> bool:
    """Replace files of a directory together: a crash leaves all old ones or all new ones.

    A complete new directory is built next to it and exchanged with it. Other files become hard links to the same files,
    subdirectories are recreated. The directory keeps its owner and mode, and a symbolic link to it stays a link. A
    directory that is the working directory of this process, a mount point, or not writable is not exchanged.

    Args:
        folder: The directory; created if missing.
        contents: Name -> content; None removes the file.

    Returns:
        Whether it was done. If the system cannot exchange directories, nothing has changed.

    Raises:
        DiskError: The disk is full or fails; the directory is unchanged.
    """
    final = Path(os.path.realpath(folder))
    if not _can_be_exchanged(final):
        return False
    old = final.stat().st_ino if final.is_dir() else 0
    temporary = final.with_name(f"{TEMPORARY}{secrets.token_hex(6)}+{old}-{final.name}")
    try:
        try:
            final.parent.mkdir(parents=True, exist_ok=True)
            _build(temporary, final, contents)
            if old and any(final.iterdir()):
                _exchange(temporary, final)
                old = temporary.stat().st_ino  # another process may have exchanged it meanwhile
            else:
                temporary.rename(final)
        except OSError as cause:
            if cause.errno in _CANNOT:
                return False
            raise_disk_error(final, cause)
        sync_name(final)  # before the old files are removed
    finally:
        _clear(temporary, final, old, contents)
    return True


def replace_in_order(folder: str | os.PathLike[str], steps: Sequence[Mapping[str, bytes | None]]) -> None:
    """Replace files of a directory one by one; every step is on disk before the next one begins.

    All contents are written and flushed under temporary names before the first file is replaced, so that a full disk
    changes nothing.

    Args:
        folder: The directory; created if missing.
        steps: Each step as name -> content; None removes the file.

    Raises:
        DiskError: The disk is full or fails. The message says whether files were replaced.
    """
    folder = Path(folder)
    staged: list[list[tuple[Path, Path | None]]] = []
    begun = False
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for step in steps:
            staged.append([])
            for name, data in step.items():
                path, temporary = folder / name, None if data is None else temporary_name(folder / name)
                staged[-1].append((path, temporary))
                if temporary is not None:
                    write_new(temporary, data or b"", path)
        for places in staged:
            for path, temporary in places:
                path.unlink(missing_ok=True) if temporary is None else temporary.replace(path)
                begun = True
            sync_folder(folder)
    except OSError as cause:
        for _, temporary in (place for places in staged for place in places):
            with contextlib.suppress(OSError):
                if temporary is not None:
                    temporary.unlink(missing_ok=True)
        if begun:
            raise DiskError(
                f"{folder}: {cause.strerror or cause}; some of its files were replaced, others were not. Save again.",
                where=folder,
            ) from cause
        raise_disk_error(folder, cause)


def sweep(folder: str | os.PathLike[str]) -> list[str]:
    """Remove what killed writers left in a directory.

    A directory that was set aside without a replacement gets its name back. Entries of an exchanged directory that the
    new one lacks are moved there first.

    Args:
        folder: The directory; its subdirectories are not entered.

    Returns:
        The names removed.
    """
    removed = []
    for path in sorted(Path(folder).glob(f"{TEMPORARY}*")):
        exchanged, aside = _EXCHANGED.fullmatch(path.name), _SET_ASIDE.fullmatch(path.name)
        if not path.is_dir():
            path.unlink(missing_ok=True)
        elif aside and not os.path.lexists(path.with_name(aside[1])):
            path.rename(path.with_name(aside[1]))
        elif exchanged:
            _clear(path, path.with_name(exchanged[2]), int(exchanged[1]))
        else:
            shutil.rmtree(path, ignore_errors=True)
        removed.append(path.name)
    return removed


def _can_be_exchanged(final: Path) -> bool:
    """Return whether a directory can be exchanged: it is not our working directory, and nothing is mounted there."""
    with contextlib.suppress(FileNotFoundError):  # the working directory may have been removed
        if Path.cwd().is_relative_to(final):
            return False
    if not os.path.lexists(final):
        return True
    if not final.is_dir() or os.path.ismount(final) or not os.access(final, os.W_OK | os.X_OK):
        return False
    entries = 0
    for _, folders, names in os.walk(final):
        entries += len(folders) + len(names)
        if entries > MOST_ENTRIES:
            return False
    return True


def _build(new: Path, old: Path, contents: Mapping[str, bytes | None]) -> None:
    new.mkdir()
    if old.is_dir():
        _take_owner_and_mode(old, new)
    for name, data in contents.items():
        if data is not None:
            write_new(new / name, data, old / name)
    if old.is_dir():
        _carry(old, new, contents)
    sync_folder(new)


def _carry(old: Path, new: Path, left_out: Collection[str] = ()) -> None:
    """Copy every entry of a directory to another one: files and links as hard links, subdirectories recreated."""
    with os.scandir(old) as entries:
        for entry in entries:
            source, target = old / entry.name, new / entry.name
            if entry.is_dir(follow_symlinks=False):
                target.mkdir()
                _carry(source, target)
                _take_owner_and_mode(source, target)
                sync_folder(target)
            elif entry.name not in left_out:
                os.link(source, target, follow_symlinks=False)


def _take_owner_and_mode(source: Path, target: Path) -> None:
    status, found = source.stat(), target.stat()
    if (status.st_uid, status.st_gid) != (found.st_uid, found.st_gid):
        os.chown(target, status.st_uid, status.st_gid)
    shutil.copystat(source, target)


def _clear(temporary: Path, final: Path, old: int, replaced: Collection[str] | None = None) -> None:
    """Remove a directory that was built, or, if it was exchanged, the old one after moving over entries added
    meanwhile.
    """
    with contextlib.suppress(OSError):
        if old and temporary.stat().st_ino == old and final.is_dir():
            _retire(temporary, final, replaced)
        else:
            shutil.rmtree(temporary, ignore_errors=True)


def _retire(old: Path, new: Path, replaced: Collection[str] | None) -> None:
    """Empty and remove a replaced directory; entries that the new one lacks, or has in an older version, are moved
    there.

    Args:
        old: The directory to remove.
        new: The directory that replaced it.
        replaced: Names that were replaced on purpose; None if unknown: then nothing in `new` is changed.
    """
    with os.scandir(old) as entries:
        for entry in list(entries):
            source, target = old / entry.name, new / entry.name
            if entry.is_dir(follow_symlinks=False) and target.is_dir():
                _retire(source, target, None if replaced is None else ())
            elif entry.name in (replaced or ()):
                source.unlink()
            elif not os.path.lexists(target):
                source.rename(target)
            elif replaced is not None and entry.stat(follow_symlinks=False).st_mtime_ns > target.lstat().st_mtime_ns:
                source.replace(target)
            else:
                source.unlink()
    old.rmdir()


def _put_in_place_of(new: Path, old: Path) -> None:
    """Exchange two directories; if the system cannot, set the old one aside under a name that a sweep restores."""
    try:
        _exchange(new, old)
    except OSError as cause:
        if cause.errno not in _CANNOT:
            raise
        aside = old.with_name(f"{TEMPORARY}{secrets.token_hex(6)}~{old.name}")
        old.rename(aside)
        try:
            new.rename(old)
        except OSError:
            aside.rename(old)
            raise
        shutil.rmtree(aside, ignore_errors=True)


def _exchange(first: Path, second: Path) -> None:
    """Exchange the names of two files or directories atomically, which only Linux supports."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE: linux/fcntl.h, linux/fs.h
    if rename is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    if rename(here, os.fsencode(first), here, os.fsencode(second), exchange):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
