"""Find the files and data sets that the names given by the user stand for, which are read from any position.

A name is a file, a directory (all data files in it), a glob pattern such as `data/*.jsonl`, or a data set on the Hub
with the prefix `hf:`, optionally with a split, a revision and a configuration, as in `hf:owner/name:train@main#config`.
A split can be a slice, such as `train[:1000]`.
"""

from __future__ import annotations

import glob
import hashlib
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, ClassVar, Protocol, TypeAlias

from lorakit.data.messages import BadRow
from lorakit.data.records import Document
from lorakit.durable import JsonValue, sha256_rest
from lorakit.errors import ConfigError, DataError
from lorakit.file_hashes import FileStatus

TEXT = (".txt", ".md")
"""Suffixes of files that are read as one document each."""

LINES = (".jsonl", ".ndjson")
"""Suffixes of files with one JSON object per line."""

DELIMITED = (".csv", ".tsv")
"""Suffixes of files with one row of cells per line, below a row of column names."""

TABLES = (".parquet", ".arrow")
"""Suffixes of files that the package `datasets` reads."""

SUFFIXES = (*TEXT, *LINES, ".json", *DELIMITED, *TABLES)
"""Suffixes of all data files."""

HUB = "hf:"
"""Prefix of the name of a Hub data set."""

_HUB = re.compile(
    r"(?P<name>[\w.-]+(?:/[\w.-]+)?)(?::(?P<split>[\w.+%\[\]:-]+))?(?:@(?P<revision>[\w./-]+))?(?:#(?P<config>[\w.-]+))?"
)

_ABOUT_DATA = ("dataset_info.json", "dataset_dict.json", "state.json")
"""Files that `Dataset.save_to_disk` writes next to the data."""


@dataclass(frozen=True)
class HubSource:
    """A data set on the Hub, such as "owner/name"; the split may be a slice, and None selects the default."""

    name: str
    split: str = "train"
    revision: str | None = None
    config: str | None = None

    def __str__(self) -> str:
        revision = "" if self.revision is None else f"@{self.revision}"
        return f"{HUB}{self.name}:{self.split}{revision}" + ("" if self.config is None else f"#{self.config}")


def expand(names: Iterable[str | os.PathLike[str]]) -> list[Path | HubSource]:
    """Return the files and Hub data sets that names stand for, in order.

    Raises:
        DataError: There are no names, or a directory or pattern contains no data files.
    """
    sources = [source for name in names for source in _expanded(os.fspath(name))]
    if not sources:
        raise DataError("No data was given; pass at least one file, directory or Hub data set.", field="data")
    return sources


def weights_of(names: Iterable[str], weights: Mapping[str, float]) -> dict[str, float]:
    """Return the weight of each file or Hub data set, by `Record.source`; empty if no weights were given.

    Names that `weights` does not have get the weight 1.

    Raises:
        ConfigError: A name in `weights` is not one of `names`.
        DataError: Two names with different weights stand for the same file.
    """
    known = list(names)
    for name in weights:
        if name not in known:
            raise ConfigError.of("data_weights", name, allowed=known)
    weight_of = dict[str, float]()
    for name in known if weights else ():
        weight = weights.get(name, 1.0)
        for source in map(str, _expanded(name)):
            if weight_of.setdefault(source, weight) != weight:
                text = f"{source}: two names in --data with different weights stand for this file; omit one of them."
                raise DataError(text, where=source, field="data_weights")
    return weight_of


def _expanded(name: str) -> list[Path | HubSource]:
    path = Path(name)
    if name.startswith(HUB):
        return [_hub_source(name)]
    if path.is_dir():
        return _nonempty(name, [entry for entry in path.rglob("*") if not _is_hidden(entry.relative_to(path))])
    if glob.has_magic(name) and not path.exists():
        return _nonempty(name, [Path(entry) for entry in glob.glob(name, recursive=True)])  # noqa: PTH207 - absolute ones
    return [path]


def _hub_source(name: str) -> HubSource:
    match = _HUB.fullmatch(name.removeprefix(HUB))
    if match is None:
        raise DataError(f"{name}: not the name of a Hub data set, such as hf:owner/name:train@main.", where=name)
    return HubSource(match["name"], match["split"] or "train", match["revision"], match["config"])


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _nonempty(name: str, paths: Iterable[Path]) -> list[Path | HubSource]:
    known = (path for path in paths if path.suffix.lower() in SUFFIXES and path.name not in _ABOUT_DATA)
    files = sorted(path for path in known if path.is_file())
    if not files:
        raise DataError(f"{name}: no data files found; their names must end in {', '.join(SUFFIXES)}.", where=name)
    return [*files]


PARTIAL = "partial:"
"""Prefix of the identity of streamed data, whose content was not hashed as a whole."""

CHANGED = "the data file changed while it was in use; read the data again."

_ENDS_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, order=True)
class Place:
    """The position of a row: the file's index, a byte offset in it, and a line number, starting at 1.

    In a table or a Hub data set, the offset is the number of rows before the row, and the line its row number.
    """

    file: int = 0
    offset: int = 0
    line: int = 1


Read: TypeAlias = Iterator[tuple[JsonValue | BadRow | Document, Place]]
"""Rows, or the reasons why they cannot be parsed, each with its position."""


class Content(Protocol):
    """Rows that can be read from the position of any of them.

    If `counts_rows`, an offset is a number of rows, whose search reads the rows before them, and not of bytes.
    """

    counts_rows: ClassVar[bool]

    @property
    def label(self) -> str:
        """Path or name, as in `Record.source`."""

    @property
    def size(self) -> int:
        """Size in bytes, or 0 if it is unknown."""

    def read(self, at: Place) -> Read:
        """Yield the rows from a position to the end; a DataError if they cannot be read or have changed."""

    def identity(self) -> str:
        """Return `PARTIAL` and a hash that differs if the content was replaced."""

    def bytes_before(self, offset: int) -> int:
        """Return the (estimated) number of bytes before the row at an offset."""


def file_error(path: Path, problem: str) -> DataError:
    """Return an error about a data file; `problem` says what is wrong and what to do about it."""
    return DataError(f"{path}: {problem}", where=path)


def unreadable(path: Path, cause: OSError) -> DataError:
    """Return an error about a data file that the system cannot read."""
    return file_error(path, f"the data file cannot be read ({cause.strerror}).")


def check_kind(path: Path) -> None:
    """Check that a path is a regular file whose suffix is one of `SUFFIXES`.

    Raises:
        DataError: It is not.
        OSError: The file does not exist or cannot be examined.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise file_error(path, "not a regular file; write the data to a regular file first.")
    if path.suffix.lower() not in SUFFIXES:
        raise file_error(path, f"data files must end in {', '.join(SUFFIXES)}, not '{path.suffix}'.")


@dataclass(frozen=True)
class CheckedFile:
    """A data file, with the status that it had when it was checked."""

    path: Path
    status: FileStatus

    @property
    def label(self) -> str:
        """The path."""
        return str(self.path)

    @property
    def size(self) -> int:
        """Size in bytes."""
        return self.status.size

    def open(self) -> IO[bytes]:
        """Open the file for reading; a DataError if it cannot be read, or has changed since it was checked."""
        try:
            file = self.path.open("rb")
        except OSError as cause:
            raise unreadable(self.path, cause) from cause
        try:
            self._check(file)
        except DataError:
            file.close()
            raise
        return file

    def digest(self) -> tuple[str, str]:
        """Return the path and the SHA-256 of the file; a DataError if it cannot be read, or has changed."""
        with self.open() as file:
            sha256 = sha256_rest(file)
            self._check(file)
        return self.label, sha256

    def identity(self) -> str:
        """Return `PARTIAL` and a SHA-256 of the size, the modification time, and the first and last MiB of the file."""
        digest = hashlib.sha256(f"{self.size} {self.status.mtime_ns}\n".encode())
        with self.open() as file:
            digest.update(file.read(_ENDS_BYTES))
            file.seek(max(0, self.size - _ENDS_BYTES))
            digest.update(file.read(_ENDS_BYTES))
        return PARTIAL + digest.hexdigest()

    def _check(self, file: IO[bytes]) -> None:
        if FileStatus.of(file.fileno()) != self.status:
            raise file_error(self.path, CHANGED)
