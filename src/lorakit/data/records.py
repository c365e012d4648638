"""The three kinds of training records, and a list of records with notes about its source.

This module does not depend on files, tokens or tensors.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

KEY_BYTES = 16
"""Bytes of a digest that distinguish records."""

PIECE_CHARACTERS = 1 << 17
"""Characters of a long text that are in memory at a time."""


@dataclass(frozen=True, slots=True)
class Document:
    """A text in which every token has loss.

    Attributes:
        text: The text.
        source: Its file, or another name for messages.
        line: Line in the file, counted from 1; None if the file is the document.
    """

    text: str
    source: str = "text"
    line: int | None = None

    def pieces(self) -> Iterator[str]:
        """Return the text in pieces of at most `PIECE_CHARACTERS`."""
        for at in range(0, len(self.text), PIECE_CHARACTERS):
            yield self.text[at : at + PIECE_CHARACTERS]


@dataclass(frozen=True, slots=True)
class Completion:
    """A prompt and its completion; only the completion has loss.

    Attributes:
        prompt: The input.
        completion: The text that follows it.
        source: Its file, or another name for messages.
        line: Line in the file, counted from 1.
    """

    prompt: str
    completion: str
    source: str = "row"
    line: int | None = None


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation.

    Attributes:
        role: Role of the speaker: one of `ROLES`.
        content: Text of the turn.
    """

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns of a chat; only those of the assistant have loss.

    Attributes:
        messages: The turns in order.
        source: Its file, or another name for messages.
        line: Line in the file, counted from 1.
    """

    messages: tuple[Message, ...]
    source: str = "row"
    line: int | None = None

    def as_dicts(self) -> list[dict[str, str]]:
        """Return the turns in the form that chat templates take."""
        return [{"role": message.role, "content": message.content} for message in self.messages]


Record: TypeAlias = Document | Completion | Conversation

ROLES = ("system", "developer", "user", "assistant", "tool")
"""The roles that a message may have."""


class Records(list[Record]):
    """A list of records with notes.

    Attributes:
        notes: Messages for the user, such as unused columns.
    """

    def __init__(self, records: Iterable[Record] = (), notes: Iterable[str] = ()) -> None:
        super().__init__(records)
        self.notes = list(notes)


def location(record: Record) -> str:
    """Return the location of a record, as `file:line` or `file`."""
    return record.source if record.line is None else f"{record.source}:{record.line}"


def content_digest(record: Record, salt: str = "") -> str:
    """Return the SHA-256 of a record's content, independent of its file and line.

    Args:
        record: The record.
        salt: Hashed first, so that different salts order records differently.

    Returns:
        64 hexadecimal digits; equal for equal kind and content.
    """
    if isinstance(record, Document):
        return _document_digest(record, salt)
    if isinstance(record, Completion):
        parts: list[object] = ["completion", record.prompt, record.completion]
    else:
        parts = ["conversation", *([message.role, message.content] for message in record.messages)]
    return hashlib.sha256(json.dumps([salt, *parts]).encode()).hexdigest()


def content_key(record: Record, salt: str = "") -> bytes:
    """Return the first `KEY_BYTES` bytes of a record's `content_digest`; they distinguish and order records."""
    return bytes.fromhex(content_digest(record, salt)[: 2 * KEY_BYTES])


def keys_of(joined: bytes | bytearray) -> np.ndarray[Any, Any]:
    """Return joined keys as an array, shape (keys,); they sort like their digests."""
    return np.frombuffer(joined, dtype=f"S{KEY_BYTES}")


def distinct(joined: bytes | bytearray) -> int:
    """Return the number of distinct keys."""
    return len(np.unique(keys_of(joined)))


def _document_digest(record: Document, salt: str) -> str:
    """Return the SHA-256 of `[salt, "document", text]` as JSON, reading the text in pieces."""
    opened, closed = json.dumps([salt, "document", ""])[:-2], '"]'
    digest = hashlib.sha256(opened.encode())
    for piece in record.pieces():
        digest.update(json.dumps(piece)[1:-1].encode())
    digest.update(closed.encode())
    return digest.hexdigest()


def is_empty(record: Record) -> bool:
    """Return whether a record has nothing to train on: no text, no completion, or no assistant turn with content."""
    if isinstance(record, Document):
        return not any(piece.strip() for piece in record.pieces())
    if isinstance(record, Completion):
        return not record.completion.strip()
    return not any(message.role == "assistant" and message.content.strip() for message in record.messages)
