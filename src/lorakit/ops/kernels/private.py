"""Directories and files that no other user can have written, so that code may be loaded from them.

A directory qualifies if it belongs to the user and has mode 0700, and if each of its parents belongs to the user or
root and cannot be written by others. A parent with the sticky bit, such as /tmp, may be world-writable: its entries can
be renamed or removed only by their owner, and the owner of each entry is checked too. After the check no other user can
replace any part of the path, so the path may be used by name.

Not detected: access control lists beyond the mode bits (a POSIX list shows in the group's bits, an NFSv4 list does
not), mounts over a path, and actions of root.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH


def private_directory(path: Path) -> Path:
    """Return the real path of a directory that only the user can write to; create missing parts.

    Raises:
        PermissionError: It or a parent belongs to another user, or others may write to one of them.
        OSError: It cannot be created.
    """
    if not hasattr(os, "geteuid"):
        raise PermissionError(f"{path}: file owners cannot be checked on this system")
    real = Path(os.path.realpath(path))
    for parent in reversed(real.parents):
        info = _directory(parent)
        if _is_writable_by_others(info) and not info.st_mode & stat.S_ISVTX:
            raise PermissionError(f"{parent}: other users may write to this directory")
    info = _directory(real)
    if info.st_uid != os.geteuid():
        raise PermissionError(f"{real}: this directory belongs to another user")
    if _is_writable_by_others(info):
        raise PermissionError(f"{real}: other users may have written to this directory; remove it")
    if stat.S_IMODE(info.st_mode) != stat.S_IRWXU:
        real.chmod(stat.S_IRWXU)
    return real


def is_private_file(path: Path) -> bool:
    """Return whether the path is a regular file, not a link, owned by the user or root and not writable by others."""
    try:
        info = path.lstat()
    except FileNotFoundError:
        return False
    return stat.S_ISREG(info.st_mode) and info.st_uid in (os.geteuid(), 0) and not info.st_mode & WRITABLE_BY_OTHERS


def _directory(path: Path) -> os.stat_result:
    """Return the status of a directory owned by the user or root; create it if missing."""
    if not os.path.lexists(path):
        path.mkdir(mode=stat.S_IRWXU, exist_ok=True)
    info = path.lstat()
    if not stat.S_ISDIR(info.st_mode):
        raise NotADirectoryError(f"{path}: not a directory")
    if info.st_uid not in (os.geteuid(), 0):
        raise PermissionError(f"{path}: this directory belongs to another user")
    return info


def _is_writable_by_others(info: os.stat_result) -> bool:
    if info.st_mode & stat.S_IWOTH:
        return True
    return bool(info.st_mode & stat.S_IWGRP) and not _is_group_of_one(info.st_gid)


def _is_group_of_one(gid: int) -> bool:
    """Return whether a group is the user's private group, which many systems pair with a umask of 002.

    Its name and number are those of the user, and it has no other members. Group 0 never qualifies.
    """
    import grp
    import pwd

    try:
        user, group = pwd.getpwuid(os.geteuid()), grp.getgrgid(gid)
    except KeyError:
        return False
    is_own = gid != 0 and gid == user.pw_gid and group.gr_name == user.pw_name
    return is_own and set(group.gr_mem) <= {user.pw_name}
