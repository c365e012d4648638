"""Where a server's adapters come from: registries, whose names can change while it runs, and directories."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lorakit.errors import AdapterError, LorakitError, UsageError
from lorakit.hub_cache import CONFIG_FILE, adapter_directory
from lorakit.registry import Lease, NameEntry, Registry, Version, check_name, content_hash, is_registry, name_of


@dataclass
class _Names:
    """A registry, and its entries when it was last read."""

    registry: Registry
    entries: dict[str, NameEntry] = field(default_factory=dict)


class Sources:
    """The adapters that a server can serve.

    Args:
        paths: Registries; directories of adapters or runs; directories that contain some of them. A directory's name is
            the adapter's name.

    Attributes:
        faults: Name -> why its current version cannot be read, or that two sources have the name.

    Raises:
        UsageError: A directory contains no adapter, two adapters have the same name, or a name is not valid.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._registries: list[_Names] = []
        self._fixed: dict[str, Version] = {}
        self.faults: dict[str, LorakitError] = {}
        for path in paths:
            if is_registry(path):
                self._registries.append(_Names(Registry(path)))
                continue
            folders = _adapters_in(path)
            if not folders:
                text = f"{path}: neither a registry nor a directory with adapters or runs."
                raise UsageError(text, what=str(path), where=path, field="adapters")
            for name, folder in folders.items():
                self._add(name, folder)
        self.current()
        for fault in self.faults.values():
            if isinstance(fault, UsageError):
                raise fault

    def _add(self, name: str, folder: Path) -> None:
        if name in self._fixed:
            text = f"two adapters have the name {name!r}: {self._fixed[name].folder} and {folder}; rename a directory."
            raise UsageError(text, what=name, where=folder, field="adapters")
        self._fixed[check_name(name)] = Version(name, content_hash(folder), folder)

    def current(self) -> dict[str, Version]:
        """Return the current version of each name without a fault; only files of registries that changed are read.

        Raises:
            AdapterFileError: A directory is no longer a registry.
        """
        found = dict(self._fixed)
        self.faults.clear()
        for names in self._registries:
            listing = names.registry.listing(names.entries)
            names.entries = dict(listing.entries)
            self.faults |= listing.damaged
            for name in names.entries:
                if name in found:
                    text = f"two sources have the name {name!r}: {found[name].folder} and {names.registry.folder}."
                    self.faults[name] = UsageError(text, what=name, where=names.registry.folder, field="adapters")
                else:
                    found[name] = names.registry.resolve(name, names.entries)
        return {name: version for name, version in found.items() if name not in self.faults}

    def resolve(self, given: str) -> Version:
        """Return the version for `NAME`, `NAME@HASH12` or `NAME@TAG`.

        Raises:
            AdapterError: There is none.
        """
        name = given.partition("@")[0]
        if name in self._fixed and given in (name, self._fixed[name].id):
            return self._fixed[name]
        for names in self._registries:
            if name in names.entries:
                return names.registry.resolve(given)
        known = ", ".join(sorted(self.current())) or "none"
        raise AdapterError(f"there is no adapter {given!r}; available: {known}.", what=given, field="model")

    def lease(self, version: Version) -> Lease | None:
        """Keep the files of a version in a registry until the lease is released; None for other directories."""
        for names in self._registries:
            if version.folder.is_relative_to(names.registry.folder):
                return names.registry.lease(version)
        return None


def _adapters_in(path: Path) -> dict[str, Path]:
    """Return the directories of adapters by name: that of an adapter or a run, or of those directly below."""
    if not path.is_dir():
        return {}
    folders = [path] if _adapter_of(path) else sorted(one for one in path.iterdir() if one.is_dir())
    return {name_of(adapter): adapter for one in folders if (adapter := _adapter_of(one)) is not None}


def _adapter_of(path: Path) -> Path | None:
    folder = adapter_directory(path)
    return folder if (folder / CONFIG_FILE).is_file() else None
