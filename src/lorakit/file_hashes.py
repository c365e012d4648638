"""SHA-256 hashes of files, which are computed once while a file does not change, and the status that shows changes.

A hash is kept with the file's device, inode, size, modification time and change time (ctime). Programs can set the
modification time, as `cp -p` does, but not the change time, which the system sets at each change of content, mode or
name. A status cannot show these changes:

- A second change within the resolution of the file system's clock. A hash is therefore kept only if the file was last
  changed `SETTLED_SECONDS` before it was read.
- Writes through a memory map that was dirty when the file was hashed, writes to the disk under the file system, and
  changes after the system's clock, or that of a file server, was set back.

On Windows, where `st_ctime` is the time of creation, nothing is kept.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from lorakit.caches import FILE_HASHES
from lorakit.durable import sha256_file

MOST_KEPT = 512
"""Maximum number of kept hashes; the oldest are removed."""

LEAST_KEPT = 1 << 20
"""Minimum size in bytes of files whose hashes are kept; smaller files can be hashed as fast as looked up."""

SETTLED_SECONDS = 2.0
"""Minimum age of a file's last change when its hash is kept; the coarsest clocks of file systems tick every 2 s."""


class FileStatus(NamedTuple):
    """Status of a file that shows whether it has changed; the module describes what it cannot show."""

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, file: str | os.PathLike[str] | int) -> FileStatus:
        """Return the status of a regular file, given its path or descriptor; an OSError for any other."""
        status = os.fstat(file) if isinstance(file, int) else Path(file).stat()
        if not stat.S_ISREG(status.st_mode):
            raise OSError(f"{file}: not a regular file")
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)

    @property
    def is_settled(self) -> bool:
        """Return whether a later change would have another status."""
        changed_ns = max(self.mtime_ns, self.ctime_ns)
        return os.name != "nt" and time.time_ns() - changed_ns > SETTLED_SECONDS * 1e9


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file, which is kept while the file does not change."""
    return file_hashes([path])[path]


def file_hashes(paths: Iterable[Path], most_bytes: int | None = None) -> dict[Path, str]:
    """Return the SHA-256 of each file, 64 hexadecimal digits; those of large files are kept while the files do not
    change.

    Nothing is hashed or returned if the files without a kept hash exceed `most_bytes` in total. An OSError if a file is
    not a regular file, cannot be read, or changes while it is read.
    """
    kept, hashes = _kept(), dict[Path, str]()
    unknown = dict[Path, tuple[str, FileStatus]]()
    for path in paths:
        status = FileStatus.of(path)
        key = _key(path, status)
        if key in kept:
            hashes[path] = kept[key]
        else:
            unknown[path] = key, status
    if most_bytes is not None and sum(status.size for _, status in unknown.values()) > most_bytes:
        return {}
    fresh = dict[str, str]()
    for path, (key, status) in unknown.items():
        is_settled = status.is_settled
        hashes[path] = sha256_file(path)
        if FileStatus.of(path) != status:
            raise OSError(f"{path}: changed while it was being read")
        if is_settled and status.size >= LEAST_KEPT:
            fresh[key] = hashes[path]
    if fresh:
        _keep({**{key: value for key, value in kept.items() if key not in fresh}, **fresh})
    return hashes


def _key(path: Path, status: FileStatus) -> str:
    return FILE_HASHES.key(path=os.path.realpath(path), **status._asdict())


def _kept() -> dict[str, str]:
    """Return the kept hashes by key, oldest first; empty if there is no cache file, or a damaged one."""
    return {entry["key"]: entry["sha256"] for entry in FILE_HASHES.read().get("files", ())}


def _keep(kept: dict[str, str]) -> None:
    newest = [{"key": key, "sha256": value} for key, value in kept.items()]
    FILE_HASHES.write({"files": newest[-MOST_KEPT:]})  # if it fails, the files are hashed again next time
