"""Keep converted models as directories: written once, published atomically, and verified at each use.

A directory has a manifest with the key of its cache (`lorakit.caches`) and the size and SHA-256 of each file. Of
several processes that need a model, one converts it; what a killed process left is removed by the next conversion.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from lorakit.durable import JsonObject, publish_directory, read_json, sha256_file, sweep, write_json
from lorakit.errors import AdapterFileError, DiskError
from lorakit.file_hashes import file_hashes
from lorakit.tables import format_bytes

MANIFEST = "lorakit-model.json"
"""Name of the file in a converted directory that records its source and its files."""


def kept_directory(final: Path, key: str, needed_bytes: int, write: Callable[[Path], JsonObject]) -> Path:
    """Return a directory of converted files, written first if there is none with this key, or a damaged one.

    `write` fills an empty directory and returns more fields for the manifest.

    Raises:
        DiskError: The cache cannot be written, or its disk has too little free space.
    """
    if is_whole(final, key):
        return final
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
    except OSError as cause:
        raise _unwritable(final.parent, cause) from cause
    with _locked(final.with_name(f"{final.name}.lock")):
        if not is_whole(final, key):  # another process may have converted the model in the meantime
            sweep(final.parent, final.name)  # other entries have other locks
            check_space(final.parent, needed_bytes, "free some space, or set LORAKIT_CACHE to a directory elsewhere")
            with publish_directory(final, replace=True) as folder:  # `final` is missing, damaged or has another key
                about = write(folder)
                names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
                files = {
                    name: {"bytes": (folder / name).stat().st_size, "sha256": sha256_file(folder / name)}
                    for name in names
                }
                write_json(folder / MANIFEST, {**about, "key": key, "files": files})
    return final


def is_whole(folder: Path, key: str | None) -> bool:
    """Return whether a converted directory has a key, or any key if it is None, and files that match its manifest."""
    manifest = read_manifest(folder)
    files = manifest.get("files")
    if not isinstance(files, dict) or not files or key not in (None, manifest.get("key")):
        return False
    try:
        found = file_hashes([folder / name for name in files])
    except OSError:
        return False
    with contextlib.suppress(OSError):  # a cache that can only be read
        os.utime(folder)
    return all(isinstance(about, dict) and found[folder / name] == about.get("sha256") for name, about in files.items())


def read_manifest(folder: Path) -> JsonObject:
    """Return the manifest of a converted directory; empty if there is none, or a damaged one."""
    try:
        found = read_json(folder / MANIFEST)
    except AdapterFileError:
        return {}
    return found if isinstance(found, dict) else {}


def check_space(folder: Path, needed_bytes: int, advice: str = "free some space") -> None:
    """Raise a DiskError, with advice, if the disk of a directory has too little free space."""
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < needed_bytes:
        raise DiskError(
            f"{folder}: {format_bytes(needed_bytes)} needed, {format_bytes(free_bytes)} free; {advice}.", where=folder
        )


def _unwritable(path: Path, cause: OSError) -> DiskError:
    message = f"{path}: the cache cannot be written ({cause.strerror}); set LORAKIT_CACHE to a writable directory."
    return DiskError(message, where=path)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock on a file; the operating system releases the lock when the process ends."""
    try:
        import fcntl
    except ImportError:  # Windows has no fcntl: two processes may do the same work, but renaming is still atomic
        yield
        return
    try:
        file = path.open("a")
    except OSError as cause:
        raise _unwritable(path, cause) from cause
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
