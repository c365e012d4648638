"""Crash-safe writing and validated reading of files; no other module opens files for writing.

A crash at any point leaves a file with either its old content or its new content, never anything in between.

- A file is written under a temporary name in the same directory, flushed to disk and renamed into place; then the
  directory is flushed too. A file that replaces another keeps the old file's mode; any other new file gets the default
  mode (umask).
- A directory is published as a whole, replaced as a whole, or updated file by file in an order that lets readers detect
  an incomplete update. To replace several files together, a complete new directory is built next to the old one, and
  the two are exchanged.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import glob
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NoReturn, TypeAlias

from lorakit.errors import AdapterFileError, DiskError, printable

JsonObject: TypeAlias = dict[str, Any]
"""A JSON object as returned by `read_json`."""

JsonValue: TypeAlias = bool | int | float | str | list[Any] | JsonObject | None
"""Any JSON value."""

TEMPORARY = ".lorakit-tmp-"
"""Name prefix of all unfinished files and directories, by which `sweep` finds them."""

SEAL = "seal"
"""Key under which a dictionary stores the SHA-256 digest of all its other entries."""


def write_bytes(path: str | os.PathLike[str], data: bytes | memoryview) -> None:
    """Write a file atomically, with its parent directories; a DiskError says whether the content was replaced."""
    path = Path(path)
    temporary = temporary_name(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_new(temporary, data, path)
        temporary.replace(path)
    except OSError as cause:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        _raise_disk_error(path, cause)
    _sync_name(path)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write text to a file atomically, encoded as UTF-8; see `write_bytes`."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: str | os.PathLike[str], value: JsonValue) -> None:
    """Write a value to a file atomically, as JSON with sorted keys, indented by two spaces; see `json_bytes`."""
    write_bytes(path, json_bytes(value))


def json_bytes(value: JsonValue) -> bytes:
    """Return the bytes that `write_json` would write; a ValueError for NaN or infinity, which JSON does not support."""
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n").encode()


def sealed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of a dictionary of JSON values with a new seal: the SHA-256 digest of its other entries."""
    return {**values, SEAL: _seal(parse_json(json_bytes(dict(values))))}


def is_sealed(values: Mapping[str, Any]) -> bool:
    """Return whether a dictionary contains a seal that matches its other entries."""
    return values.get(SEAL) == _seal(values)


def _seal(values: Mapping[str, Any]) -> str:
    body = {key: value for key, value in values.items() if key != SEAL}
    return sha256_bytes(json.dumps(body, sort_keys=True).encode())


def sha256_bytes(data: bytes | memoryview) -> str:
    """Return the hexadecimal SHA-256 digest of `data`."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: str | os.PathLike[str]) -> str:
    """Return the hexadecimal SHA-256 digest of a file."""
    with Path(path).open("rb") as file:
        return sha256_rest(file)


def sha256_rest(file: IO[bytes]) -> str:
    """Return the hexadecimal SHA-256 digest of the rest of an open file, reading it in blocks of 1 MiB."""
    digest = hashlib.sha256()
    while piece := file.read(1 << 20):
        digest.update(piece)
    return digest.hexdigest()


def read_bytes(path: str | os.PathLike[str], max_bytes: int) -> bytes:
    """Read a regular file of bounded size into memory; a symbolic link is followed.

    Raises:
        AdapterFileError: The file is missing, not a regular file, too large, or unreadable.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except FileNotFoundError:
        raise AdapterFileError(f"{path}: no such file.", where=path) from None
    except OSError as cause:
        raise AdapterFileError(f"{path}: cannot be opened ({cause.strerror}).", where=path) from cause
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise AdapterFileError(f"{path}: not a regular file; only regular files are read.", where=path)
    with os.fdopen(descriptor, "rb") as file:
        if status.st_size > max_bytes:
            raise AdapterFileError(f"{path}: {status.st_size:,} bytes exceed the limit of {max_bytes:,}.", where=path)
        data = file.read(status.st_size + 1)
    if len(data) > status.st_size:  # a file of /proc, which has no size, or one that another process writes to
        raise AdapterFileError(f"{path}: the file has more bytes than its size says; not read.", where=path)
    return data


def read_json(path: str | os.PathLike[str], max_bytes: int = 1 << 20) -> Any:
    """Read a JSON file strictly: UTF-8, bounded size and depth, no duplicate keys, no NaN (AdapterFileError)."""
    data = read_bytes(path, max_bytes)
    try:
        return parse_json(data)
    except (ValueError, RecursionError) as cause:
        reason = "nested too deeply" if isinstance(cause, RecursionError) else str(cause)
        raise AdapterFileError(f"{path}: not valid JSON ({reason}).", where=path) from None


def parse_json(data: bytes | str) -> Any:
    """Parse JSON in UTF-8; a ValueError for duplicate keys, NaN and infinity too, which Python's own parser accepts."""
    text = data if isinstance(data, str) else data.decode("utf-8")
    return json.loads(text, object_pairs_hook=_without_repeats, parse_constant=_no_constant)


MOST_LEVELS = 100
"""Maximum depth of lists and objects that `problem_in` accepts; libraries that process values recurse per level."""


def problem_in(value: Any, *, is_json: bool = True, level: int = 0) -> tuple[str, str] | None:
    """Find text that cannot be encoded, deep nesting, and values that JSON lacks (if `is_json`), anywhere in a value.

    The result is the path to the first problem, such as ".calls[0].name", and a description; None if there is none.
    """
    if isinstance(value, str):
        return None if value.isascii() else _unpaired(value)
    if level == MOST_LEVELS:
        return "", f"is nested more than {MOST_LEVELS} levels deep; flatten or remove it"
    parts: Iterable[tuple[str, Any]]
    if isinstance(value, dict):
        for key in value:
            if isinstance(key, str) and not key.isascii() and (found := _unpaired(key)) is not None:
                return f".{printable(key, one_line=True)}", f"has a name that {found[1]}"
        parts = ((f".{key}", part) for key, part in value.items())
    elif isinstance(value, list | tuple):
        parts = ((f"[{at}]", part) for at, part in enumerate(value))
    else:
        is_plain = value is None or isinstance(value, bool | int | float)
        return None if is_plain or not is_json else ("", f"is a {type(value).__name__}; it must be a JSON value")
    for where, part in parts:
        if (found := problem_in(part, is_json=is_json, level=level + 1)) is not None:
            return where + found[0], found[1]
    return None


def _unpaired(text: str) -> tuple[str, str] | None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as cause:
        found = f"\\u{ord(text[cause.start]):04x}"
        return "", f"contains an unpaired surrogate ({found}) at character {cause.start}; remove or replace it"
    return None


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"duplicate key {key!r}")
        result[key] = value
    return result


def _no_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a JSON number")


def temporary_name(path: Path) -> Path:
    """Return a temporary path next to `path`, with a name that `sweep` recognizes."""
    return path.with_name(f"{TEMPORARY}{secrets.token_hex(6)}-{path.name}")


def _write_new(path: Path, data: bytes | memoryview, replaced: Path) -> None:
    """Write and flush a new file, with the owner and mode of the regular file, if any, that it will replace."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    descriptor = os.open(path, flags, 0o666)
    try:
        with contextlib.suppress(FileNotFoundError):
            status = os.lstat(replaced)
            if stat.S_ISREG(status.st_mode) and os.name != "nt":
                if (status.st_uid, status.st_gid) != (os.geteuid(), os.getegid()):
                    with contextlib.suppress(PermissionError):
                        os.fchown(descriptor, status.st_uid, status.st_gid)
                os.fchmod(descriptor, stat.S_IMODE(status.st_mode))
        left = memoryview(data).cast("B")
        while left:
            left = left[os.write(descriptor, left) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_name(path: Path) -> None:
    """Flush the directory that contains a newly written file or directory, or raise a `DiskError`."""
    try:
        _flush(path.parent)
    except OSError as cause:
        reason = cause.strerror or str(cause)
        raise DiskError(
            f"{path}: written, but its directory was not flushed ({reason}); save again.", where=path
        ) from cause


def _flush(path: Path) -> None:
    """Flush a file, or the entries of a directory, to disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot flush a directory
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _raise_disk_error(path: Path, cause: OSError) -> NoReturn:
    """Raise the `DiskError` for a failed write."""
    reason = cause.strerror or str(cause)
    text = f"{path}: cannot be written ({reason}); the previous content is unchanged."
    raise DiskError(text, what=reason, where=path) from cause


_EXCHANGED = re.compile(re.escape(TEMPORARY) + r"[0-9a-f]+\+(\d+)-(.+)", re.DOTALL)
"""Pattern for the names of directories built for an exchange; its groups match the old directory's inode and name."""

_SET_ASIDE = re.compile(re.escape(TEMPORARY) + r"[0-9a-f]+~(.+)", re.DOTALL)
"""Pattern for the names of directories that were set aside to make room for others; its group matches the old name."""

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
    DiskError, the new directory is removed.
    """
    final = Path(os.path.realpath(final))
    temporary = temporary_name(final)
    try:
        temporary.mkdir(parents=True)
        if final.is_dir():
            with contextlib.suppress(PermissionError):
                _take_owner_and_mode(final, temporary)
        yield temporary
        for path in (*sorted(temporary.rglob("*")), temporary):
            if path.is_file() or path.is_dir():
                _flush(path)
        if replace and final.is_dir() and any(final.iterdir()):
            _put_in_place_of(temporary, final)
        else:
            temporary.rename(final)
        _sync_name(final)
    except DiskError:
        raise
    except OSError as cause:
        _raise_disk_error(final, cause)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


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
            _raise_disk_error(final, cause)
        _sync_name(final)  # before the old files are removed
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
                    _write_new(temporary, data or b"", path)
        for targets in staged:
            for path, temporary in targets:
                path.unlink(missing_ok=True) if temporary is None else temporary.replace(path)
                begun = True
            _flush(folder)
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
        _raise_disk_error(folder, cause)


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
            _write_new(new / name, data, old / name)
    if old.is_dir():
        _carry(old, new, contents)
    _flush(new)


def _carry(old: Path, new: Path, left_out: Collection[str] = ()) -> None:
    """Copy a directory's contents to another directory: hard-link files and symlinks, and recreate subdirectories."""
    with os.scandir(old) as entries:
        for entry in entries:
            source, target = old / entry.name, new / entry.name
            if entry.is_dir(follow_symlinks=False):
                target.mkdir()
                _carry(source, target)
                _take_owner_and_mode(source, target)
                _flush(target)
            elif entry.name not in left_out:
                os.link(source, target, follow_symlinks=False)


def _take_owner_and_mode(source: Path, target: Path) -> None:
    status, found = source.stat(), target.stat()
    if (status.st_uid, status.st_gid) != (found.st_uid, found.st_gid):
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
