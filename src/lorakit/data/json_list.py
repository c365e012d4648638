"""Find the elements of a JSON list one after another, from any of them, in memory that does not depend on the list."""

from __future__ import annotations

import codecs
import json
import re
from pathlib import Path
from typing import IO

from lorakit.data.stored import READ_BYTES
from lorakit.errors import DataError


class ListText:
    """The text of a JSON list in an open file; only the part around the current element is kept.

    Args:
        path: The file, for messages.
        file: The open file, at an element or at the beginning of the list.
        offset: Byte offset of this position; then that of the element that was returned last.
        line: Its line number.
        longest: Maximum number of characters that are read to find the end of an element, or None.
    """

    def __init__(self, path: Path, file: IO[bytes], offset: int, line: int, longest: int | None) -> None:
        self.offset, self.line = offset, line
        self._path, self._file, self._longest = path, file, longest
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._json = json.JSONDecoder()
        self._text, self._at, self._counted, self._is_whole = "", 0, 0, False

    def element(self, following: str) -> str | None:
        """Return the text of the next element, which `following` (or "") must precede, or None at the end of the list.

        Raises:
            DataError: The text is not a JSON list, or an element is too long.
        """
        while True:
            begin = _after(self._text, self._at, following)
            end = self._end(begin)
            if begin is not None and end is not None:
                self._count(begin)
                self._at = end
                return self._text[begin:end]
            if self._is_closed(following, begin):
                return None
            is_too_long = self._longest is not None and len(self._text) - self._at > self._longest
            if self._is_whole or is_too_long:
                raise self._no_element(following, begin)
            self._read_more()

    def _end(self, begin: int | None) -> int | None:
        """Return the end of the element at a position, or None if it is not known or not complete."""
        if begin is None:
            return None
        try:
            end = self._json.raw_decode(self._text, begin)[1]
        except (ValueError, RecursionError):
            return None
        # a number may continue in the next piece, so something must follow it
        return end if self._is_whole or _skip_space(self._text, end) < len(self._text) else None

    def _is_closed(self, following: str, begin: int | None) -> bool:
        """Return whether the list ends here, and nothing follows it."""
        at = _after(self._text, begin if following == "[" and begin is not None else self._at, "]")
        return at == len(self._text) and self._is_whole and (following != "[" or begin is not None)

    def _count(self, begin: int) -> None:
        """Move the offset and the line number to a position in the text."""
        passed = self._text[self._counted : begin]
        self.offset += len(passed.encode())
        self.line += passed.count("\n")
        self._counted = begin

    def _read_more(self) -> None:
        """Remove the elements that were returned, and at least double the rest, so that reading takes linear time."""
        self._count(self._at)
        rest = self._text[self._at :]
        raw = self._file.read(max(READ_BYTES, len(rest)))
        try:
            self._text = rest + self._decoder.decode(raw, final=not raw)
        except UnicodeDecodeError as cause:
            raise self._error(
                f"not valid UTF-8 (byte 0x{cause.object[cause.start]:02x}) in this row or after it"
            ) from None
        self._at = self._counted = 0
        self._is_whole = not raw

    def _no_element(self, following: str, begin: int | None) -> DataError:
        # of a file that is read as a whole, the line is that of the last element's end
        self._count(begin or (self._at if self._longest is None else _skip_space(self._text, self._at)))
        expected = f"expected {following!r} and a value" if following else "expected a value"
        if self._is_whole:
            return self._error(f"not valid JSON: {expected}")
        return self._error(f"{expected} of at most {self._longest:,} characters")

    def _error(self, problem: str) -> DataError:
        where = f"{self._path}:{self.line}"
        return DataError(f"{where}: {problem}.", where=where)


_SPACE = re.compile(r"[ \t\r\n]*")


def _after(text: str, at: int, character: str) -> int | None:
    """Return the position after a character (or "") and white space around it, or None if something else follows."""
    begin = _skip_space(text, at)
    end = begin + len(character)
    return _skip_space(text, end) if text[begin:end] == character else None


def _skip_space(text: str, at: int) -> int:
    """Return the position after the white space at a position."""
    return _SPACE.match(text, at).end()  # type: ignore[union-attr]
