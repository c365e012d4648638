"""A registry: immutable objects, names that are replaced atomically, one lock for writers, and leases for readers.

    objects/HASH/     an adapter's files; HASH is their hash
    names/NAME.json   the current version, the ones before it, their history and tags

A version is stored before a name refers to it, and a name is one file; so a crash leaves the old or the new version.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from lorakit.durable import flush_name, not_written, temporary_name, write_json
from lorakit.durable_folders import lock_owner, publish_directory, sweep, try_lock
from lorakit.errors import AdapterError, AdapterFileError, DiskError, UsageError
from lorakit.hub_cache import adapter_directory
from lorakit.registry.contents import checked_contents, content_hash
from lorakit.registry.leases import Lease, Version, take_lease
from lorakit.registry.names import HASH, NAME, NameEntry, check_name, check_tag, split_version

OBJECTS, NAMES, ENDING = "objects", "names", ".json"

LOCK_SECONDS = 60.0
"""Time that a writer waits for others; adding an adapter takes seconds."""

_PAUSE_SECONDS = 0.05


@dataclass(frozen=True)
class Change:
    """The current version of a name after a change, and the one before it; None for a new name."""

    version: Version
    before: Version | None

    @property
    def is_new(self) -> bool:
        """Return whether the current version changed."""
        return self.before is None or self.before.hash != self.version.hash


@dataclass(frozen=True)
class Listing:
    """The entries of all names, and the errors of the files that cannot be read."""

    entries: Mapping[str, NameEntry]
    damaged: Mapping[str, AdapterFileError]


@dataclass(frozen=True)
class Problem:
    """A damaged file or directory, and what is wrong with it."""

    where: Path
    text: str


@dataclass(frozen=True)
class Collected:
    """Result of `gc`: hashes of removed versions, of unused ones that a process has leased, and the freed bytes."""

    removed: tuple[str, ...]
    in_use: tuple[str, ...]
    freed_bytes: int


def is_registry(folder: str | os.PathLike[str]) -> bool:
    """Return whether a directory is a registry."""
    return all((Path(folder) / name).is_dir() for name in (OBJECTS, NAMES))


class Registry:
    """A registry in a directory, which `add` makes if it does not exist."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self._objects, self._names = self.folder / OBJECTS, self.folder / NAMES

    def listing(self, known: Mapping[str, NameEntry] | None = None) -> Listing:
        """Return the entries of all names; those in `known` are read again only if their file changed (one stat each).

        Raises:
            AdapterFileError: The directory is not a registry.
        """
        entries, damaged = dict[str, NameEntry](), dict[str, AdapterFileError]()
        for path in self._name_files():
            try:
                entries[path.stem] = NameEntry.read(path, (known or {}).get(path.stem))
            except AdapterError:  # removed meanwhile
                continue
            except AdapterFileError as error:
                damaged[path.stem] = error
        return Listing(entries, damaged)

    def entry(self, name: str) -> NameEntry:
        """Return the entry of a name.

        Raises:
            AdapterError: There is no such name.
            AdapterFileError: The directory is not a registry, or the name's file is damaged.
        """
        self._check()
        return NameEntry.read(self._path(name))

    def resolve(self, given: str, known: Mapping[str, NameEntry] | None = None) -> Version:
        """Return the version that `NAME`, `NAME@HASH12` or `NAME@TAG` stands for; see `entry` for errors.

        A name in `known` is not read again.
        """
        name, version = split_version(given)
        entry = (known or {}).get(name) or self.entry(name)
        return self._version(name, entry.hash_of(version))

    def lease(self, version: Version) -> Lease:
        """Keep a version until the lease is released; use it as a context manager, or call `release`.

        Raises:
            AdapterFileError: `gc` removed the version; resolve its name again.
        """
        return take_lease(version)

    def add(self, name: str, folder: str | os.PathLike[str]) -> Change:
        """Publish an adapter, in its directory or a run's, as the current version of a name.

        Its files are copied. Nothing changes if they already are the current version.

        Raises:
            UsageError: The name is not valid, or the registry's directory has other contents.
            AdapterError: The name has another version with the same first 12 digits of the hash.
            AdapterFileError: The adapter is incomplete or damaged, or has values that are NaN or infinite.
            DiskError: A file cannot be written, or another process changes the registry for a minute.
        """
        path, contents = self._path(name), checked_contents(adapter_directory(Path(folder).expanduser()))
        self._create()
        with self._writing():
            entry = NameEntry.read(path) if path.exists() else None
            new = NameEntry.first(name, contents.hash) if entry is None else entry.published(contents.hash)
            target = self._objects / contents.hash
            if self._problem(target) is not None:
                with publish_directory(target, replace=True) as draft:
                    contents.copy_to(draft)
            return self._replace(entry, new)

    def rollback(self, given: str) -> Change:
        """Go back to the version that the current version of `NAME` replaced, or to `NAME@VERSION`.

        Raises:
            AdapterError: There is no such name or version.
            AdapterFileError: The directory is not a registry, or the version is missing or damaged.
            DiskError: As for `add`.
        """
        name, version = split_version(given)
        with self._writing():
            entry = self.entry(name)
            new = entry.rolled_back(version)
            problem = self._problem(self._objects / new.current)
            if problem is not None:
                raise AdapterFileError(f"{problem.where}: {problem.text}", what=new.current, where=problem.where)
            return self._replace(entry, new)

    def tag(self, given: str, tag: str) -> Version:
        """Set a tag of a name to the version that `NAME` or `NAME@VERSION` stands for; see `rollback` for errors."""
        name, version = split_version(given)
        check_tag(tag)
        with self._writing():
            entry = self.entry(name)
            hash = entry.hash_of(version)
            self._replace(entry, entry.tagged(tag, hash))
        return self._version(name, hash)

    def untag(self, name: str, tag: str) -> None:
        """Remove a tag; see `rollback` for errors."""
        with self._writing():
            entry = self.entry(name)
            self._replace(entry, entry.tagged(tag, None))

    def remove(self, name: str) -> None:
        """Remove a name, its history and its tags; its versions stay until `gc`, unless other names have them.

        A damaged file of a name is removed too.

        Raises:
            AdapterError: There is no such name.
            DiskError: As for `add`.
        """
        path = self._path(name)
        with self._writing():
            if not path.exists():
                self.entry(name)
            try:
                path.unlink()
            except OSError as cause:
                raise not_written(path, cause) from cause
            flush_name(path)

    def verify(self) -> tuple[Problem, ...]:
        """Hash the files of all versions again, and return what is damaged or missing.

        Raises:
            AdapterFileError: The directory is not a registry.
        """
        checked = {path: self._problem(path) for path in self._object_folders()}
        problems = [problem for path, problem in checked.items() if problem and path.exists()]  # gc may remove others
        listing = self.listing()
        problems += [Problem(self._path(name), str(error)) for name, error in listing.damaged.items()]
        versions = [self._version(one.name, hash) for one in listing.entries.values() for hash in sorted(one.hashes)]
        missing = [version for version in versions if not version.folder.is_dir()]
        problems += [Problem(version.folder, f"missing; it is {version.id}") for version in missing]
        return tuple(problems)

    def gc(self, keep: int | None = None) -> Collected:
        """Remove versions that neither a name nor a process uses, and what interrupted writers left.

        With `keep`, each name first forgets all but its current version, the versions with tags, and the `keep` newest
        others.

        Raises:
            AdapterFileError: The directory is not a registry, or a name's file is damaged; nothing is removed.
            DiskError: As for `add`, or the file system has no locks.
        """
        with self._writing():
            listing = self.listing()
            if listing.damaged:
                raise next(iter(listing.damaged.values()))
            entries = list(listing.entries.values())
            if keep is not None:
                entries = [self._shortened(entry, keep) for entry in entries]
            for folder in (self._objects, self._names):
                sweep(folder)
            used = frozenset[str]().union(*(entry.hashes for entry in entries))
            unused = [path for path in self._object_folders() if path.name not in used]
            sizes = {path.name: self._discard(path) for path in unused}
        removed = {hash: size for hash, size in sizes.items() if size is not None}
        return Collected(tuple(removed), tuple(sizes.keys() - removed.keys()), sum(removed.values()))

    def _check(self) -> None:
        if not is_registry(self.folder):
            text = f"{self.folder}: not a registry; `lorakit adapters add` makes one."
            raise AdapterFileError(text, what="registry", where=self.folder)

    def _create(self) -> None:
        """Make the directories of a registry in a new or empty directory."""
        if is_registry(self.folder):
            return
        if self.folder.is_dir() and {path.name for path in self.folder.iterdir()} - {OBJECTS, NAMES}:
            text = f"{self.folder}: has other contents; pass a registry, or a new or empty directory."
            raise UsageError(text, where=self.folder, field="registry")
        try:
            for folder in (self._objects, self._names):
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as cause:
            raise not_written(self.folder, cause) from cause
        flush_name(self._names)
        flush_name(self.folder)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Hold the lock of writers, which the system releases at the end of the process."""
        self._check()
        deadline = time.monotonic() + LOCK_SECONDS
        while (descriptor := _locked(self.folder)) is None:
            if time.monotonic() > deadline:
                owner = lock_owner(self.folder)
                who = "another process" if owner is None else f"process {owner}"
                text = f"{self.folder}: {who} is changing the registry; retry later."
                raise DiskError(text, what=who, where=self.folder)
            time.sleep(_PAUSE_SECONDS)
        try:
            yield
        finally:
            os.close(descriptor)

    def _name_files(self) -> list[Path]:
        self._check()
        return sorted(path for path in self._names.glob(f"*{ENDING}") if NAME.fullmatch(path.stem))

    def _object_folders(self) -> list[Path]:
        self._check()
        return sorted(path for path in self._objects.iterdir() if HASH.fullmatch(path.name))

    def _path(self, name: str) -> Path:
        return self._names / f"{check_name(name)}{ENDING}"

    def _version(self, name: str, hash: str) -> Version:
        return Version(name, hash, self._objects / hash)

    def _replace(self, old: NameEntry | None, new: NameEntry) -> Change:
        if new != old:
            write_json(self._path(new.name), new.as_json())
        before = None if old is None else self._version(old.name, old.current)
        return Change(self._version(new.name, new.current), before)

    def _shortened(self, entry: NameEntry, keep: int) -> NameEntry:
        new = entry.with_newest(keep)
        self._replace(entry, new)
        return new

    def _problem(self, folder: Path) -> Problem | None:
        """Return what is wrong with a version's directory, or None."""
        try:
            if not folder.is_dir():
                return Problem(folder, "missing; add the adapter again")
            found = content_hash(folder)
        except OSError as cause:
            return Problem(folder, f"cannot be read ({cause.strerror or cause})")
        is_same = found == folder.name
        return None if is_same else Problem(folder, f"damaged: its hash is {found[:12]}; add the adapter again")

    def _discard(self, folder: Path) -> int | None:
        """Remove a version's directory, and return its size in bytes; None if a process uses it."""
        descriptor = _locked(folder)
        if descriptor is None:
            return None
        try:
            size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
            aside = temporary_name(folder)  # which the next `gc` removes if this one is interrupted
            folder.rename(aside)
            shutil.rmtree(aside)
        except OSError as cause:
            raise not_written(folder, cause) from cause
        finally:
            os.close(descriptor)
        return size


def _locked(folder: Path) -> int | None:
    """Lock a directory, as `try_lock` does; a DiskError if the file system has no locks, or the directory is closed."""
    try:
        descriptor = try_lock(folder)
    except OSError as cause:
        raise not_written(folder, cause) from cause
    if descriptor == -1:
        text = f"{folder}: this file system has no locks (flock), which a registry needs; use another directory."
        raise DiskError(text, what="flock", where=folder)
    return descriptor
