"""Names of adapters and their versions: the rule for names, `NAME@VERSION`, and what `names/NAME.json` contains."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from lorakit.durable import JsonObject, as_object, is_sealed, read_json, sealed
from lorakit.errors import AdapterError, AdapterFileError, UsageError, did_you_mean
from lorakit.file_hashes import FileStatus

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
HASH = re.compile(r"[0-9a-f]{64}")
_HASH_START = re.compile(r"[0-9a-f]{12,64}")

FORMAT_VERSION = 1
MAX_BYTES = 16 << 20

ADDED, ROLLED_BACK = "add", "rollback"
"""Actions that change the current version."""


def check_name(name: str, field: str = "name") -> str:
    """Return a name if it is one that all runtimes accept in requests, paths and buckets, else raise a UsageError."""
    if not NAME.fullmatch(name):
        text = (
            f"{name!r} is not a valid {field}; use up to 64 letters, digits, '.', '_' and '-', first a letter or digit."
        )
        raise UsageError(text, what=name, field=field)
    return name


def name_of(folder: Path) -> str:
    """Return a name for an adapter: that of its directory, or of the run directory that contains it.

    It is "adapter" if that name has no character that all runtimes accept.
    """
    folder = folder.resolve()
    name = folder.parent.name if folder.name == "adapter" else folder.name
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).lstrip("._-")[:64] or "adapter"


def check_tag(tag: str) -> str:
    """Return a tag if it is valid and does not look like a hash, else raise a UsageError."""
    if _HASH_START.fullmatch(tag):
        raise UsageError(f"the tag {tag!r} looks like a hash; use another one.", what=tag, field="tag")
    return check_name(tag, "tag")


def version_id(name: str, hash: str) -> str:
    """Return `NAME@HASH12`, the name of a version in requests, in replies and in other runtimes."""
    return f"{name}@{hash[:12]}"


def split_version(given: str) -> tuple[str, str | None]:
    """Split `NAME` or `NAME@VERSION`, where a version is a tag or the beginning of a hash; a UsageError for others."""
    name, at, version = given.partition("@")
    return check_name(name), check_name(version, "version") if at else None


@dataclass(frozen=True)
class Event:
    """A change of the current version: "add" or "rollback", to which hash, and when (UTC)."""

    action: str
    hash: str
    date: str


@dataclass(frozen=True)
class NameEntry:
    """The contents of `names/NAME.json`; hashes have 64 hexadecimal digits.

    Attributes:
        current: Hash of the version that the name stands for.
        previous: Hashes of the versions before it, to which rollbacks lead, the last one first.
        history: All changes of the current version, the oldest first.
        tags: Tag -> hash.
        status: Status of the file if it shows every later change, else None.
    """

    name: str
    current: str
    previous: tuple[str, ...] = ()
    history: tuple[Event, ...] = ()
    tags: Mapping[str, str] = field(default_factory=dict)
    status: FileStatus | None = field(default=None, compare=False)

    @classmethod
    def first(cls, name: str, hash: str) -> NameEntry:
        """Return the entry of a new name."""
        return cls(name, hash, history=(_event(ADDED, hash),))

    @classmethod
    def read(cls, path: Path, known: NameEntry | None = None) -> NameEntry:
        """Read an entry from its file, or return `known` if that was read from the file as it is now.

        Raises:
            AdapterError: There is no such file.
            AdapterFileError: The file is damaged or in a newer format.
        """
        status = _status(path)
        if known is not None and known.status == status:
            return known
        try:
            values = as_object(read_json(path, MAX_BYTES))
        except AdapterFileError:
            if _status(path) == status:
                raise
            return cls.read(path)  # it was removed, and perhaps added again, since its status was read
        version = values.get("format_version")
        if isinstance(version, int) and version > FORMAT_VERSION:
            text = f"{path}: format {version} is newer than format {FORMAT_VERSION}; upgrade lorakit."
            raise AdapterFileError(text, what="format_version", where=path)
        if is_sealed(values) and values.get("name") == path.stem:
            with contextlib.suppress(KeyError, TypeError, AttributeError, ValueError):
                return cls._parsed(values, status)
        text = f"{path}: damaged or edited; restore it from a copy, or remove it and add its adapters again."
        raise AdapterFileError(text, what="seal", where=path)

    @classmethod
    def _parsed(cls, values: JsonObject, status: FileStatus) -> NameEntry:
        entry = cls(
            name=values["name"],
            current=values["current"],
            previous=tuple(values["previous"]),
            history=tuple(Event(**event) for event in values["history"]),
            tags=dict(values["tags"]),
            status=status if status.is_settled else None,
        )
        if not all(HASH.fullmatch(hash) for hash in entry.hashes):
            raise ValueError(f"{entry.name}: not a hash")
        return entry

    def as_json(self) -> JsonObject:
        """Return the contents of the file."""
        values: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "name": self.name,
            "current": self.current,
            "previous": list(self.previous),
            "history": [vars(event) for event in self.history],
            "tags": dict(self.tags),
        }
        return sealed(values)

    @property
    def hashes(self) -> frozenset[str]:
        """The hashes of all versions."""
        return frozenset((self.current, *self.previous, *self.tags.values(), *(event.hash for event in self.history)))

    def hash_of(self, version: str | None) -> str:
        """Return the hash of the current version (None), of a tag, or of a version by its first 12 to 64 digits.

        Raises:
            AdapterError: The name has no such version.
        """
        if version is None:
            return self.current
        if version in self.tags:
            return self.tags[version]
        found = [hash for hash in self.hashes if _HASH_START.fullmatch(version) and hash.startswith(version)]
        if len(found) != 1:
            known = (*self.tags, *sorted(hash[:12] for hash in self.hashes))
            text = f"{self.name} has no version {version!r}; it has {', '.join(known)}."
            raise AdapterError(text, what=version, where=self.name, field="version", allowed=known)
        return found[0]

    def published(self, hash: str) -> NameEntry:
        """Return the entry after a version was added; it is the same if this is the current version.

        Raises:
            AdapterError: Another version has the same first 12 digits, which then would name both.
        """
        if hash == self.current:
            return self
        if any(other != hash and other[:12] == hash[:12] for other in self.hashes):
            text = f"{version_id(self.name, hash)}: names another version already; publish it under another name."
            raise AdapterError(text, what=hash, where=self.name, field="hash")
        return self._after(ADDED, hash, (*self.previous, self.current))

    def rolled_back(self, version: str | None) -> NameEntry:
        """Return the entry after a rollback to a version, or to the one that the current version replaced.

        Raises:
            AdapterError: There is no such version.
        """
        if version is None and not self.previous:
            text = f"{self.name} has no version before {version_id(self.name, self.current)}."
            raise AdapterError(text, what=self.current, where=self.name, field="version")
        hash = self.previous[-1] if version is None else self.hash_of(version)
        if hash == self.current:
            return self
        if hash in self.previous:
            last = len(self.previous) - 1 - self.previous[::-1].index(hash)
            return self._after(ROLLED_BACK, hash, self.previous[:last])
        return self._after(ROLLED_BACK, hash, (*self.previous, self.current))

    def tagged(self, tag: str, hash: str | None) -> NameEntry:
        """Return the entry with a tag for a hash, or without the tag.

        Raises:
            AdapterError: A tag to be removed does not exist.
        """
        if hash is None and tag not in self.tags:
            text = f"{self.name} has no tag {tag!r}.{did_you_mean(tag, self.tags)}"
            raise AdapterError(text, what=tag, where=self.name, field="tag", allowed=self.tags)
        others = {name: value for name, value in self.tags.items() if name != tag}
        return replace(self, tags=others if hash is None else {**others, tag: hash})

    def with_newest(self, count: int) -> NameEntry:
        """Return the entry with the current version, those with tags, and the `count` newest ones before it."""
        before = dict.fromkeys(event.hash for event in reversed(self.history) if event.hash != self.current)
        kept = {self.current, *self.tags.values(), *list(before)[:count]}
        previous = tuple(hash for hash in self.previous if hash in kept)
        return replace(self, previous=previous, history=tuple(event for event in self.history if event.hash in kept))

    def _after(self, action: str, hash: str, previous: tuple[str, ...]) -> NameEntry:
        return replace(self, current=hash, previous=previous, history=(*self.history, _event(action, hash)))


def _event(action: str, hash: str) -> Event:
    return Event(action, hash, datetime.now(timezone.utc).isoformat(timespec="seconds"))


def _status(path: Path) -> FileStatus:
    """Return the status of a name's file; an AdapterError if there is none."""
    try:
        return FileStatus.of(path)
    except FileNotFoundError:
        raise _unknown_name(path) from None
    except OSError as cause:
        raise AdapterFileError(f"{path}: cannot be read ({cause.strerror or cause}).", where=path) from cause


def _unknown_name(path: Path) -> AdapterError:
    names = sorted(other.stem for other in path.parent.glob("*.json") if NAME.fullmatch(other.stem))
    text = f"{path.stem} is not a name in {path.parent.parent}.{did_you_mean(path.stem, names)}"
    return AdapterError(text, what=path.stem, where=path.parent.parent, field="name", allowed=names)
