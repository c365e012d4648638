"""The lock of a run directory: one process trains into a folder at a time.

The folder itself is locked (flock), so that no file is left and the system frees it however the process ends.
"""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path

from lorakit.errors import RunError

_ATTEMPTS = 3
_PAUSE_SECONDS = 0.05
_LOCKS = Path("/proc/locks")


def claim(folder: Path) -> int:
    """Lock a folder for this process.

    Args:
        folder: The folder; it exists.

    Returns:
        A descriptor that holds the lock until it is closed; -1 if the system or file system has no such locks.

    Raises:
        RunError: Another process has it.
    """
    for attempt in range(_ATTEMPTS):
        descriptor = _locked(folder)
        if descriptor is not None:
            return descriptor
        if attempt + 1 < _ATTEMPTS:  # `refuse_live` of another process holds it for a moment
            time.sleep(_PAUSE_SECONDS)
    raise _live(folder)


def release(lock: int) -> None:
    """Unlock a folder.

    Args:
        lock: What `claim` gave.
    """
    if lock >= 0:
        os.close(lock)


def refuse_live(folder: Path) -> None:
    """Refuse a folder that another process is training into; a folder that does not exist is free.

    Args:
        folder: The folder.

    Raises:
        RunError: Another process has it.
    """
    if folder.is_dir():
        release(claim(folder))


def _locked(folder: Path) -> int | None:
    """The descriptor of a locked folder, -1 without locks, None if another process has it."""
    try:
        import fcntl
    except ImportError:
        return -1
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as cause:
        os.close(descriptor)
        return None if cause.errno in (errno.EWOULDBLOCK, errno.EACCES) else -1
    return descriptor


def _live(folder: Path) -> RunError:
    process = _owner(folder)
    who = "another process" if process is None else f"process {process}"
    return RunError(
        f"{folder}: a run is active here: {who} is training into this folder. Wait until it ends, or pass another "
        "--output-dir."
    )


def _owner(folder: Path) -> int | None:
    """The process that holds the lock, where Linux tells: number, type, kind, mode, pid, major:minor:inode, range."""
    try:
        inode, rows = folder.stat().st_ino, _LOCKS.read_text(encoding="ascii").splitlines()
    except (OSError, UnicodeDecodeError):
        return None
    found = {
        int(words[4])
        for words in map(str.split, rows)
        if len(words) == 8 and words[1] == "FLOCK" and words[5].rpartition(":")[2] == str(inode)
    }
    return found.pop() if len(found) == 1 and min(found) > 0 else None
