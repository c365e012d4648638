"""Directories that are published or replaced as a whole, or updated file by file; a crash leaves none half-done.

To replace several files together, a complete new directory is built next to the old one, and the two are exchanged.
Files that are replaced one by one follow an order that lets readers detect an incomplete update. Directories are locked
themselves, so that no lock file is left behind.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import glob
import os
import re
import secrets
import shutil
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

from lorakit.durable import TEMPORARY, flush, flush_name, not_written, temporary_name, write_new
from lorakit.errors import DiskError

_EXCHANGED = re.compile(re.escape(TEMPORARY) + r"[0-9a-f]+\+(\d+)-(.+)", re.DOTALL)
"""Pattern for the names of directories built for an exchange; its groups match the old directory's inode and name."""

_SET_ASIDE = re.compile(re.escape(TEMPORARY) + r"[0-9a-f]+~(.+)", re.DOTALL)
"""Pattern for the names of directories that were set aside to make room for others; its group matches the old name."""

_LOCKS = Path("/proc/locks")

MOST_ENTRIES = 10_000
"""Maximum number of entries, counted recursively, in a directory that is exchanged as a whole; see `replace_files`."""

_CANNOT = frozenset(
    getattr(errno, name)
    for name in (
        *("EXDEV", "EPERM", "EACCES", "EROFS", "EMLINK", "ENOSYS", "EINVAL", "ENOTSUP", "EOPNOTSUPP", "EBUSY"),
        *("ENAMETOOLONG", "EEXIST", "ENOTEMPTY"),
    )
)
"""Error numbers indicating that directories cannot be exchanged; other errors, such as a full disk, abort the write."""


@contextlib.contextmanager
def publish_directory(final: str | os.PathLike[str], *, replace: bool = False) -> Iterator[Path]:
    """Yield a new directory next to `final` to write to, and rename it into place if the `with` block succeeds.

    `final` may be a symbolic link to a directory; unless `replace`, it must be empty. If there is any error, such as a
    DiskError, the new directory and new parents are removed.
    """
    final = Path(os.path.realpath(final))
    temporary, parents = temporary_name(final), [parent for parent in final.parents if not parent.exists()]
    try:
        temporary.mkdir(parents=True)
        if final.is_dir():
            with contextlib.suppress(PermissionError):
                _take_owner_and_mode(final, temporary)
        yield temporary
        for path in (*sorted(temporary.rglob("*")), temporary):
            if path.is_file() or path.is_dir():
                flush(path)
        if replace and final.is_dir() and any(final.iterdir()):
            _put_in_place_of(temporary, final)
        else:
            temporary.rename(final)
        flush_name(final)
    except DiskError:
        raise
    except OSError as cause:
        raise not_written(final, cause) from cause
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        for parent in parents:
            with contextlib.suppress(OSError):  # it is not empty
                parent.rmdir()


def copy_files(files: Mapping[str, Path], folder: Path) -> None:
    """Copy files, or the targets of links, to a directory under their names, which may have parent directories."""
    for name, path in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / name)


def replace_files(folder: str | os.PathLike[str], contents: Mapping[str, bytes | None]) -> bool:
    """Replace files in a directory together, and return whether they were; a crash leaves all old or all new files.

    `contents` has the new content of each file, None to remove it. A complete new directory is built next to the
    existing one and exchanged with it. Other files are hard-linked, and subdirectories are recreated. The directory
    keeps its owner and mode, and a symbolic link to it stays a link. A directory is not exchanged if it contains the
    working directory of this process, is a mount point, is not writable, or has more than `MOST_ENTRIES` entries. A
    DiskError says whether the files were replaced.
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
                old = temporary.stat().st_ino  # another process may have replaced `final` in the meantime
            else:
                temporary.rename(final)
        except OSError as cause:
            if cause.errno in _CANNOT:
                return False
            raise not_written(final, cause) from cause
        flush_name(final)  # before the old files are removed
    finally:
        _clear(temporary, final, old, contents)
    return True


def replace_in_order(folder: str | os.PathLike[str], steps: Sequence[Mapping[str, bytes | None]]) -> None:
    """Replace files in a directory step by step; each step is flushed to disk before the next one begins.

    A step has the new content of each file, None to remove it. All contents are written under temporary names and
    flushed before the first file is replaced, so a full disk leaves the directory unchanged. A DiskError says whether
    files were replaced.
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
        for targets in staged:
            for path, temporary in targets:
                path.unlink(missing_ok=True) if temporary is None else temporary.replace(path)
                begun = True
            flush(folder)
    except OSError as cause:
        for _, temporary in (target for targets in staged for target in targets):
            with contextlib.suppress(OSError):
                if temporary is not None:
                    temporary.unlink(missing_ok=True)
        if begun:
            raise DiskError(
                f"{folder}: {cause.strerror or cause}; some of its files were replaced and some were not. Save again.",
                where=folder,
            ) from cause
        raise not_written(folder, cause) from cause


def sweep(folder: str | os.PathLike[str], name: str = "") -> list[str]:
    """Remove and return temporary files and directories that interrupted writers of `name`, or of any, left behind.

    If a directory was set aside but not replaced, its original name is restored. Before a replaced directory is
    removed, any of its entries that are missing from the new directory are moved there. Subdirectories are not
    searched.
    """
    removed = []
    for path in sorted(Path(folder).glob(f"{TEMPORARY}*{glob.escape(name)}")):
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


def try_lock(folder: Path, *, shared: bool = False) -> int | None:
    """Lock a directory (flock) until the returned descriptor is closed, also by the end of the process.

    A shared lock excludes exclusive locks only. The descriptor is -1 if the system or file system does not support
    locks, and None if another process holds the lock.
    """
    try:
        import fcntl
    except ImportError:
        return -1
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as cause:
        os.close(descriptor)
        return None if cause.errno in (errno.EWOULDBLOCK, errno.EACCES) else -1
    return descriptor


def lock_owner(folder: Path) -> int | None:
    """Return the id of the process that holds a directory's lock, or None if it is unknown.

    Linux lists locks in `/proc/locks`, with the columns number, type, kind, mode, pid, inode, start and end.
    """
    try:
        inode, rows = folder.stat().st_ino, _LOCKS.read_text(encoding="ascii").splitlines()
    except (OSError, UnicodeDecodeError):
        return None
    owners = {
        int(words[4])
        for words in map(str.split, rows)
        if len(words) == 8 and words[1] == "FLOCK" and words[5].rpartition(":")[2] == str(inode)
    }
    return owners.pop() if len(owners) == 1 and min(owners) > 0 else None


def _can_be_exchanged(final: Path) -> bool:
    """Return whether a directory can be exchanged; `replace_files` lists the conditions."""
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
    flush(new)


def _carry(old: Path, new: Path, left_out: Collection[str] = ()) -> None:
    """Copy a directory's contents to another directory: hard-link files and symlinks, and recreate subdirectories."""
    with os.scandir(old) as entries:
        for entry in entries:
            source, target = old / entry.name, new / entry.name
            if entry.is_dir(follow_symlinks=False):
                target.mkdir()
                _carry(source, target)
                _take_owner_and_mode(source, target)
                flush(target)
            elif entry.name not in left_out:
                os.link(source, target, follow_symlinks=False)


def _take_owner_and_mode(source: Path, target: Path) -> None:
    status, current = source.stat(), target.stat()
    if (status.st_uid, status.st_gid) != (current.st_uid, current.st_gid):
        os.chown(target, status.st_uid, status.st_gid)
    shutil.copystat(source, target)


def _clear(temporary: Path, final: Path, old: int, replaced: Collection[str] | None = None) -> None:
    """Remove a temporary directory; if it is the old directory, first save any entries that other processes added."""
    with contextlib.suppress(OSError):
        if old and temporary.stat().st_ino == old and final.is_dir():
            _retire(temporary, final, replaced)
        else:
            shutil.rmtree(temporary, ignore_errors=True)


def _retire(old: Path, new: Path, replaced: Collection[str] | None) -> None:
    """Remove an old directory, first moving entries that are missing or out of date in the new directory.

    `replaced` are the entries that were replaced on purpose; if they are unknown, all entries of `new` are kept.
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
    """Exchange two directories; if that is not supported, first give the old one a name that `sweep` recognizes."""
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
    """Exchange the names of two files or directories atomically; only Linux supports this."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE: linux/fcntl.h, linux/fs.h
    if rename is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    if rename(here, os.fsencode(first), here, os.fsencode(second), exchange):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
