"""Versions in a registry, and leases, which keep `gc` from removing what a process uses.

A lease is a shared lock (flock) on the version's directory: it needs neither a file nor the lock of writers, and the
system releases it at the end of the process, however that ends. `gc` removes only what it can lock exclusively.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from lorakit.durable_folders import try_lock
from lorakit.errors import AdapterFileError
from lorakit.registry.names import version_id


@dataclass(frozen=True)
class Version:
    """A version of a name: the hash of its contents, and the directory that has them until `gc` removes it."""

    name: str
    hash: str
    folder: Path

    @property
    def id(self) -> str:
        """`NAME@HASH12`."""
        return version_id(self.name, self.hash)


class Lease:
    """Keeps `gc` from removing a version's directory until it is released; the end of the process releases it too."""

    def __init__(self, version: Version, descriptor: int) -> None:
        self.version = version
        self._descriptor = descriptor

    def release(self) -> None:
        """Release the lease; a second call does nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = -1

    def __enter__(self) -> Version:
        return self.version

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def take_lease(version: Version) -> Lease:
    """Keep a version until the lease is released.

    Raises:
        AdapterFileError: `gc` removed the version, or its directory cannot be read.
    """
    text = f"{version.id}: its files were removed or cannot be read; resolve the name again."
    gone = AdapterFileError(text, what=version.id, where=version.folder)
    try:
        descriptor = try_lock(version.folder, shared=True)
    except OSError as cause:
        raise gone from cause
    if descriptor is None:  # gc has the lock and is about to remove the directory
        raise gone
    lease = Lease(version, descriptor)
    if descriptor >= 0 and not _is_at(descriptor, version.folder):
        lease.release()
        raise gone
    return lease


def _is_at(descriptor: int, folder: Path) -> bool:
    """Return whether a path still leads to an open directory."""
    try:
        return os.path.samestat(os.fstat(descriptor), folder.stat())
    except OSError:
        return False
