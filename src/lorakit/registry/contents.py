"""The files that a version consists of, and their hash, by which other programs name it too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lorakit.durable import sha256_bytes, sha256_file
from lorakit.durable_folders import copy_files
from lorakit.errors import AdapterFileError
from lorakit.hub_cache import CONFIG_FILE, adapter_contents


def files_hash(files: Mapping[str, Path]) -> str:
    """Return the SHA-256 of files by their names, 64 hexadecimal digits: of the sorted lines "NAME SHA256".

    Raises:
        AdapterFileError: A name has several lines, so that it could stand for several files.
    """
    for name, path in files.items():
        if "\n" in name:
            raise AdapterFileError(f"{path}: the name of the file has a line feed; rename it.", what=name, where=path)
    return sha256_bytes("".join(sorted(f"{name} {sha256_file(path)}\n" for name, path in files.items())).encode())


def content_hash(folder: Path) -> str:
    """Return the hash of an adapter's files: config, weights, `lorakit.json`, tokenizer and chat templates.

    `lorakit.json` can change answers: it has the alpha of each site and the format of prompts. The README cannot.
    """
    return files_hash(adapter_contents(folder))


@dataclass(frozen=True)
class Contents:
    """The files of an adapter that was checked, by name, and their hash."""

    source: Path
    files: Mapping[str, Path]
    hash: str

    def copy_to(self, folder: Path) -> None:
        """Copy the files to a directory.

        Raises:
            AdapterFileError: The files are no longer those that were checked.
        """
        copy_files(self.files, folder)
        if content_hash(folder) != self.hash:
            text = f"{self.source}: changed while it was being read; retry when no process writes to it."
            raise AdapterFileError(text, what="changed", where=self.source)


def checked_contents(folder: Path) -> Contents:
    """Return the files of an adapter; links may lead to files in its directory or in the Hub's cache only.

    Raises:
        AdapterFileError: The directory contains no adapter, or one that is incomplete or damaged, that has a value that
            is NaN or infinite, or a link that leads elsewhere.
        NotYetSupported: The adapter needs a feature that is not implemented.
    """
    from lorakit.core import check_adapter

    files = adapter_contents(folder)
    if CONFIG_FILE not in files:
        raise AdapterFileError(f"{folder}: no {CONFIG_FILE}, so this is not an adapter directory.", where=folder)
    root = folder.resolve()
    homes = [root, root.parents[1] / "blobs"] if root.parent.name == "snapshots" else [root]
    for name, path in files.items():
        target = path.resolve()
        if not any(target.is_relative_to(home) for home in homes):
            text = f"{path}: links to {target}, which is not in the adapter's directory; replace the link by the file."
            raise AdapterFileError(text, what=name, where=path)
    try:
        contents = Contents(folder, files, files_hash(files))
    except OSError as cause:
        raise AdapterFileError(f"{folder}: cannot be read ({cause.strerror or cause}).", where=folder) from cause
    check_adapter(folder)
    return contents
