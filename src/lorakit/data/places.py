"""Positions of rows, and sources that are read from any position, as a whole or as a stream."""

from __future__ import annotations

import hashlib
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, ClassVar, Protocol, TypeAlias

from lorakit.data.messages import BadRow
from lorakit.data.records import Document
from lorakit.data.sources import SUFFIXES
from lorakit.durable import JsonValue, sha256_rest
from lorakit.errors import DataError
from lorakit.file_hashes import FileStatus

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


class StreamedContent(Content, Protocol):
    """Rows that are read as a stream."""

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
