"""Files: written atomically, and read only if regular, bounded and valid.

A file is written next to its final name, flushed to disk and renamed into place; then its directory is flushed too. A
replaced file keeps its mode, a new one gets the umask's.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

from lorakit.errors import AdapterFileError, DiskError

JsonObject: TypeAlias = dict[str, Any]
"""A JSON object, as `read_json` gives it: str, int, float, bool, None, lists and objects by name."""

TEMPORARY = ".lorakit-tmp-"
"""Part of the name of every unfinished file or directory, so that a sweep can find it."""

SEAL = "seal"
"""Key of a table's SHA-256 over all its other entries."""


def write_bytes(path: str | os.PathLike[str], data: bytes | memoryview) -> None:
    """Write a file atomically: a crash leaves the old content or the new.

    Args:
        path: The file; a missing directory is created.
        data: The content.

    Raises:
        DiskError: The disk is full, read-only or fails; the previous content is unchanged.
    """
    path = Path(path)
    temporary = temporary_name(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_new(temporary, data, path)
        temporary.replace(path)
    except OSError as cause:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise_disk_error(path, cause)
    sync_name(path)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write UTF-8 text with `write_bytes`.

    Raises:
        DiskError: As for `write_bytes`.
    """
    write_bytes(path, text.encode("utf-8"))


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write a value as JSON with sorted keys and an indent of two.

    Raises:
        DiskError: As for `write_bytes`.
        ValueError: The value contains NaN or infinity, which JSON does not support.
    """
    write_bytes(path, json_bytes(value))


def json_bytes(value: Any) -> bytes:
    """Return the bytes that `write_json` writes, to hash them first.

    Raises:
        ValueError: The value contains NaN or infinity, which JSON does not support.
    """
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n").encode()


def sealed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a table with a SHA-256 seal over all its other entries, so that any later change is detected.

    Args:
        values: Plain JSON values; an existing seal is replaced.

    Raises:
        ValueError: A value cannot be written as JSON.
    """
    return {**values, SEAL: _seal(parse_json(json_bytes(values)))}


def is_sealed(values: Mapping[str, Any]) -> bool:
    """Return whether a table contains its own valid seal."""
    return values.get(SEAL) == _seal(values)


def _seal(values: Mapping[str, Any]) -> str:
    body = {key: value for key, value in values.items() if key != SEAL}
    return sha256_bytes(json.dumps(body, sort_keys=True).encode())


def sha256_bytes(data: bytes | memoryview) -> str:
    """Return the SHA-256 of bytes, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file, in hexadecimal, read in 1 MiB blocks."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def read_bytes(path: str | os.PathLike[str], max_bytes: int) -> bytes:
    """Read a regular file of bounded size into memory.

    Args:
        path: The file; a symbolic link is followed, and its target must be a regular file.
        max_bytes: Maximum size.

    Returns:
        The whole content.

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
        return file.read()


def read_json(path: str | os.PathLike[str], max_bytes: int = 1 << 20) -> Any:
    """Read a JSON file strictly: UTF-8, bounded size and depth, no duplicate keys, no NaN.

    Args:
        path: The file.
        max_bytes: Maximum size.

    Returns:
        The value.

    Raises:
        AdapterFileError: The file is missing, too large, or not valid JSON; the message says where.
    """
    data = read_bytes(path, max_bytes)
    try:
        return parse_json(data)
    except (ValueError, RecursionError) as cause:
        reason = "nested too deeply" if isinstance(cause, RecursionError) else str(cause)
        raise AdapterFileError(f"{path}: not valid JSON ({reason}).", where=path) from None


def parse_json(data: bytes | str) -> Any:
    """Parse JSON and reject what the standard forbids but Python accepts.

    Raises:
        ValueError: Not JSON, not UTF-8, a duplicate key, or NaN or infinity.
    """
    text = data if isinstance(data, str) else data.decode("utf-8")
    return json.loads(text, object_pairs_hook=_without_repeats, parse_constant=_no_constant)


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
    """Return a temporary name next to a path, recognized by a sweep."""
    return path.with_name(f"{TEMPORARY}{secrets.token_hex(6)}-{path.name}")


def write_new(path: Path, data: bytes | memoryview, replaced: Path) -> None:
    """Write and flush a file that does not exist yet, with owner and mode of the regular file that it will replace.

    Args:
        path: The file; its directory exists.
        data: The content.
        replaced: The file that it will replace, if any. Owner and mode of a symbolic link are not copied.

    Raises:
        OSError: The disk is full or fails.
    """
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


def sync_name(path: Path) -> None:
    """Flush the directory of a newly written path.

    Raises:
        DiskError: The disk fails; a power failure may lose the content.
    """
    try:
        sync_folder(path.parent)
    except OSError as cause:
        reason = cause.strerror or str(cause)
        raise DiskError(
            f"{path}: written, but its directory was not flushed ({reason}); save again.", where=path
        ) from cause


def sync_folder(folder: Path) -> None:
    """Flush the names in a directory.

    Raises:
        OSError: The disk is full or fails.
    """
    if os.name == "nt":
        return  # Windows cannot flush a directory
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def raise_disk_error(path: Path, cause: OSError) -> NoReturn:
    """Raise a failed write as a lorakit error.

    Raises:
        DiskError: Always.
    """
    reason = cause.strerror or str(cause)
    text = f"{path}: cannot be written ({reason}); the previous content is unchanged."
    raise DiskError(text, what=reason, where=path) from cause
