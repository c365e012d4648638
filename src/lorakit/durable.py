"""The one place that opens files for writing, and the readers that verify.

A file is written beside its final name, flushed to the disk, and renamed into place, and the folder is
flushed too: after a crash the old content or the new stands there, never a part. A folder of files is
published the same way. Files get the mode that the umask asks for. Only the standard library is used.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from lorakit.errors import AdapterFileError, DiskError

TEMPORARY = ".lorakit-tmp-"
"""Every unfinished file or folder carries this in its name, so that a sweep can find it."""


def write_bytes(path: str | os.PathLike[str], data: bytes | memoryview) -> None:
    """Write a file so that a crash leaves the old content or the new.

    Args:
        path: Where the content shall stand; the folder is made when it is missing.
        data: The content.

    Raises:
        DiskError: The disk is full, read-only, or refuses; what stood there before still stands.
    """
    path = Path(path)
    temporary = path.with_name(f"{TEMPORARY}{secrets.token_hex(6)}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    except OSError as cause:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        _refuse(path, cause)


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


@contextlib.contextmanager
def publish_directory(final: str | os.PathLike[str]) -> Iterator[Path]:
    """Build a folder out of sight, then rename it into place when the block ends well.

    Args:
        final: The folder's name once it is whole; nothing but an empty folder may stand there.

    Yields:
        A fresh folder beside it, on the same disk, to write into.

    Raises:
        DiskError: The disk refuses, or a folder with content stands at `final`; nothing is left behind.
    """
    final = Path(final)
    temporary = final.with_name(f"{TEMPORARY}{secrets.token_hex(6)}-{final.name}")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for path in sorted(temporary.rglob("*")):
            if path.is_file():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
            elif path.is_dir():
                _sync_folder(path)
        _sync_folder(temporary)
        temporary.rename(final)
        _sync_folder(final.parent)
    except DiskError:
        raise
    except OSError as cause:
        _refuse(final, cause)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def sweep(folder: str | os.PathLike[str]) -> list[str]:
    """Remove what writers that were killed have left in a folder.

    Args:
        folder: The folder to look into; its subfolders are not entered.

    Returns:
        The names removed.
    """
    removed = []
    for path in sorted(Path(folder).glob(f"{TEMPORARY}*")):
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        removed.append(path.name)
    return removed


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
        raise AdapterFileError(f"{path}: there is no such file.") from None
    except OSError as cause:
        raise AdapterFileError(f"{path}: cannot be opened ({cause.strerror}).") from cause
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise AdapterFileError(f"{path}: not a regular file; only regular files are read.")
    with os.fdopen(descriptor, "rb") as file:
        if status.st_size > max_bytes:
            raise AdapterFileError(
                f"{path}: {status.st_size:,} bytes, more than the {max_bytes:,} that are allowed here."
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
        raise AdapterFileError(f"{path}: not valid JSON ({reason}).") from None


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


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":
        return  # Windows has no handle on a folder to flush
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _refuse(path: Path, cause: OSError) -> NoReturn:
    reason = cause.strerror or str(cause)
    raise DiskError(f"{path}: cannot be written ({reason}); what stood there before is unchanged.") from cause
