"""Positions in streamed data, and what a file, table or Hub data set must offer to be read from any position."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from lorakit.data.messages import BadRow
from lorakit.data.records import Document
from lorakit.data.stored import CheckedFile
from lorakit.durable import JsonValue

PARTIAL = "partial:"
"""Prefix of the identity of streamed data, whose content was not hashed as a whole."""

_ENDS_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, order=True)
class Place:
    """The position of a row.

    Attributes:
        file: Index of the file or data set.
        offset: Byte offset of the row in the file; in a table or a Hub data set, the number of rows before it.
        line: Line number of the row, starting at 1; in a table or a Hub data set, its row number.
    """

    file: int = 0
    offset: int = 0
    line: int = 1


Read: TypeAlias = Iterator[tuple[JsonValue | BadRow | Document, Place]]
"""Rows, or the reasons why they cannot be parsed, each with its position."""


class Content(Protocol):
    """Data that can be read from the position of any row."""

    @property
    def label(self) -> str:
        """Path or name, as in `Record.source`."""

    @property
    def size(self) -> int:
        """Size in bytes, or 0 if it is unknown."""

    def identity(self) -> str:
        """Return `PARTIAL` and a hash that differs if the content was replaced."""

    def bytes_before(self, offset: int) -> int:
        """Return the (estimated) number of bytes before the row at an offset."""

    def read(self, at: Place) -> Read:
        """Yield the rows from a position to the end.

        Raises:
            DataError: The data cannot be read, or has changed since it was opened first.
        """


@dataclass(frozen=True)
class LargeFile(CheckedFile):
    """A file that is not hashed as a whole."""

    @property
    def label(self) -> str:
        """The path."""
        return str(self.path)

    def identity(self) -> str:
        """Return `PARTIAL` and a SHA-256 of the size, the modification time, and the first and last MiB of the file."""
        digest = hashlib.sha256(f"{self.size} {self.status.mtime_ns}\n".encode())
        with self.open() as file:
            digest.update(file.read(_ENDS_BYTES))
            file.seek(max(0, self.size - _ENDS_BYTES))
            digest.update(file.read(_ENDS_BYTES))
        return PARTIAL + digest.hexdigest()
