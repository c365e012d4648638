"""Files: written so that a crash leaves the old content or the new, and read only if bounded, regular and sound.

A file is written next to its final name, flushed to the disk, and renamed into place, and the folder is flushed too.
A replaced file keeps its mode, a new one gets what the umask asks for.
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
"""Every unfinished file or folder carries this in its name, so that a sweep can find it."""

SEAL = "seal"
"""Key of a table's SHA-256 over the rest of it."""


def write_bytes(path: str | os.PathLike[str], data: bytes | memoryview) -> None:
    """Write a file so that a crash leaves the old content or the new.

    Args:
        path: Where the content shall stand; the folder is made when it is missing.
        data: The content.

    Raises:
        DiskError: The disk is full, read-only, or refuses; what stood there before still stands.
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
    """`write_bytes` for UTF-8 text.

    Raises:
        DiskError: As `write_bytes`.
    """
    write_bytes(path, text.encode("utf-8"))


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write a value as JSON with sorted keys and an indent of two.

    Raises:
        DiskError: As `write_bytes`.
        ValueError: The value holds a NaN or an infinity, which JSON has no word for.
    """
    write_bytes(path, json_bytes(value))


def json_bytes(value: Any) -> bytes:
    """What `write_json` writes, for those who need its hash first.

    Raises:
        ValueError: The value holds a NaN or an infinity, which JSON has no word for.
    """
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n").encode()


def sealed(values: Mapping[str, Any]) -> dict[str, Any]:
    """A table with a seal over everything else in it, so that a change of any value shows when it is read.

    Args:
        values: Plain JSON values; a seal among them is replaced.

    Raises:
        ValueError: A value cannot be written as JSON.
    """
    return {**values, SEAL: _seal(parse_json(json_bytes(values)))}


def is_sealed(values: Mapping[str, Any]) -> bool:
    """Whether a table that was read holds its own seal."""
    return values.get(SEAL) == _seal(values)


def _seal(values: Mapping[str, Any]) -> str:
    body = {key: value for key, value in values.items() if key != SEAL}
    return sha256_bytes(json.dumps(body, sort_keys=True).encode())


def sha256_bytes(data: bytes | memoryview) -> str:
    """The SHA-256 of some bytes, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file, in hexadecimal, read in pieces of one MiB."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def read_bytes(path: str | os.PathLike[str], max_bytes: int) -> bytes:
    """Read a regular file of bounded size into memory that is ours.

    Args:
        path: The file; a symbolic link is followed, and what it leads to must be a regular file.
        max_bytes: The largest size that is read.

    Returns:
        The whole content.

    Raises:
        AdapterFileError: The file is missing, not a regular file, larger than allowed, or unreadable.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except FileNotFoundError:
        raise AdapterFileError(f"{path}: there is no such file.", where=path) from None
    except OSError as cause:
        raise AdapterFileError(f"{path}: cannot be opened ({cause.strerror}).", where=path) from cause
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise AdapterFileError(f"{path}: not a regular file; only regular files are read.", where=path)
    with os.fdopen(descriptor, "rb") as file:
        if status.st_size > max_bytes:
            raise AdapterFileError(
                f"{path}: {status.st_size:,} bytes, more than the {max_bytes:,} that are allowed here.", where=path
            )
        return file.read()


def read_json(path: str | os.PathLike[str], max_bytes: int = 1 << 20) -> Any:
    """Read a JSON file strictly: UTF-8, bounded size and depth, no key twice, no NaN.

    Args:
        path: The file.
        max_bytes: The largest size that is read.

    Returns:
        The value.

    Raises:
        AdapterFileError: Missing, too large, or not such JSON; the message says where.
    """
    data = read_bytes(path, max_bytes)
    try:
        return parse_json(data)
    except (ValueError, RecursionError) as cause:
        reason = "nested too deeply" if isinstance(cause, RecursionError) else str(cause)
        raise AdapterFileError(f"{path}: not valid JSON ({reason}).", where=path) from None


def parse_json(data: bytes | str) -> Any:
    """Parse JSON and refuse what the standard forbids but Python lets pass.

    Raises:
        ValueError: Not JSON, not UTF-8, a key that stands twice, or a NaN or infinity.
    """
    text = data if isinstance(data, str) else data.decode("utf-8")
    return json.loads(text, object_pairs_hook=_without_repeats, parse_constant=_no_constant)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"the key {key!r} stands twice")
        result[key] = value
    return result


def _no_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is not a JSON number")


def temporary_name(path: Path) -> Path:
    """Return a temporary name next to a path, which a sweep finds."""
    return path.with_name(f"{TEMPORARY}{secrets.token_hex(6)}-{path.name}")


def write_new(path: Path, data: bytes | memoryview, replaced: Path) -> None:
    """Write and flush a file that does not exist yet, with owner and mode of the regular file that it will replace.

    Args:
        path: The file; its folder exists.
        data: The content.
        replaced: The file that it will replace, if there is one. Of a symbolic link nothing is taken over.

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
    """Flush the folder of a path that got its content.

    Raises:
        DiskError: The disk fails; the content may not survive a loss of power.
    """
    try:
        sync_folder(path.parent)
    except OSError as cause:
        reason = cause.strerror or str(cause)
        raise DiskError(
            f"{path}: written, but its folder was not flushed ({reason}); save again.", where=path
        ) from cause


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder.

    Raises:
        OSError: The disk is full or fails.
    """
    if os.name == "nt":
        return  # Windows has no handle on a folder to flush
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def raise_disk_error(path: Path, cause: OSError) -> NoReturn:
    """Raise a failed write as an error of lorakit.

    Raises:
        DiskError: Always.
    """
    reason = cause.strerror or str(cause)
    text = f"{path}: cannot be written ({reason}); what stood there before is unchanged."
    raise DiskError(text, what=reason, where=path) from cause
