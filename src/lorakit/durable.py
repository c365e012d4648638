"""Crash-safe writing and validated reading of files; only this module and `durable_folders` write to the disk.

A crash at any point leaves a file with either its old content or its new content, never anything in between.

A file is written under a temporary name in the same directory, flushed to disk and renamed into place; then the
directory is flushed too. A file that replaces another keeps the old file's mode; any other new file gets the default
mode (umask). `lorakit.durable_folders` does the same for directories.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any, NoReturn, TypeAlias

from lorakit.errors import AdapterFileError, DiskError, printable

JsonObject: TypeAlias = dict[str, Any]
"""A JSON object as returned by `read_json`."""

JsonValue: TypeAlias = bool | int | float | str | list[Any] | JsonObject | None
"""Any JSON value."""


def as_object(value: JsonValue) -> JsonObject:
    """Return a value read from a file if it is a JSON object, else {}: files may contain anything."""
    return value if isinstance(value, dict) else {}


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
        write_new(temporary, data, path)
        temporary.replace(path)
    except OSError as cause:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise not_written(path, cause) from cause
    flush_name(path)


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
    """Read a regular file, or the target of a link, of bounded size into memory, or raise an AdapterFileError."""
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
            if isinstance(key, str) and not key.isascii() and (problem := _unpaired(key)) is not None:
                return f".{printable(key, one_line=True)}", f"has a name that {problem[1]}"
        parts = ((f".{key}", part) for key, part in value.items())
    elif isinstance(value, list | tuple):
        parts = ((f"[{at}]", part) for at, part in enumerate(value))
    else:
        is_plain = value is None or isinstance(value, bool | int | float)
        return None if is_plain or not is_json else ("", f"is a {type(value).__name__}; it must be a JSON value")
    for where, part in parts:
        if (problem := problem_in(part, is_json=is_json, level=level + 1)) is not None:
            return where + problem[0], problem[1]
    return None


def _unpaired(text: str) -> tuple[str, str] | None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as cause:
        code_point = f"\\u{ord(text[cause.start]):04x}"
        return "", f"contains an unpaired surrogate ({code_point}) at character {cause.start}; remove or replace it"
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


def write_new(path: Path, data: bytes | memoryview, replaced: Path) -> None:
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


def flush_name(path: Path) -> None:
    """Flush the directory that contains a newly written file or directory, or raise a `DiskError`."""
    try:
        flush(path.parent)
    except OSError as cause:
        reason = cause.strerror or str(cause)
        raise DiskError(
            f"{path}: written, but its directory was not flushed ({reason}); save again.", where=path
        ) from cause


def flush(path: Path) -> None:
    """Flush a file, or the entries of a directory, to disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot flush a directory
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def not_written(path: Path, cause: OSError) -> DiskError:
    """Return the error for a write that failed before it changed anything."""
    reason = cause.strerror or str(cause)
    return DiskError(
        f"{path}: cannot be written ({reason}); the previous content is unchanged.", what=reason, where=path
    )
