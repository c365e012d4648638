"""The three kinds of a training record, and a list of them that carries what is to be said about its source.

Knows nothing of files, tokens or tensors.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

KEY_BYTES = 16
"""Bytes of a digest that tell records apart."""

PIECE_CHARACTERS = 1 << 17
"""Characters that are held at once of a long text."""


@dataclass(frozen=True, slots=True)
class Document:
    """A text that is trained on as a whole.

    Attributes:
        text: The text.
        source: The file it stands in, or another name for messages.
        line: Line of the file, counted from 1; None where the file is the document.
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
    """A prompt and the answer to it; only the answer is trained.

    Attributes:
        prompt: What is given.
        completion: What shall follow it.
        source: The file it stands in, or another name for messages.
        line: Line of the file, counted from 1.
    """

    prompt: str
    completion: str
    source: str = "row"
    line: int | None = None


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation.

    Attributes:
        role: Who speaks: one of `ROLES`.
        content: What is said.
    """

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns of a chat; only those of the assistant are trained.

    Attributes:
        messages: The turns in order.
        source: The file it stands in, or another name for messages.
        line: Line of the file, counted from 1.
    """

    messages: tuple[Message, ...]
    source: str = "row"
    line: int | None = None

    def as_dicts(self) -> list[dict[str, str]]:
        """The turns in the form that chat templates take."""
        return [{"role": message.role, "content": message.content} for message in self.messages]


Record: TypeAlias = Document | Completion | Conversation

ROLES = ("system", "developer", "user", "assistant", "tool")
"""The roles that a message may have."""


class Records(list[Record]):
    """A list of records and the sentences that were earned on the way to it.

    Attributes:
        notes: Sentences to print: columns that are not used, and the like.
    """

    def __init__(self, records: Iterable[Record] = (), notes: Iterable[str] = ()) -> None:
        super().__init__(records)
        self.notes = list(notes)


def place(record: Record) -> str:
    """Where a record stands, as `file:line` or `file`."""
    return record.source if record.line is None else f"{record.source}:{record.line}"


def content_digest(record: Record, salt: str = "") -> str:
    """SHA-256 of what a record says, whatever file and line it stands in.

    Args:
        record: The record.
        salt: Mixed in first, so that different salts order records differently.

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
    """Return the first `KEY_BYTES` bytes of a record's `content_digest`, which tell records apart and order them."""
    return bytes.fromhex(content_digest(record, salt)[: 2 * KEY_BYTES])


def keys_of(joined: bytes | bytearray) -> np.ndarray[Any, Any]:
    """Return joined keys as an array, shape (keys,); they compare as their digests do."""
    return np.frombuffer(joined, dtype=f"S{KEY_BYTES}")


def distinct(joined: bytes | bytearray) -> int:
    """Return how many distinct keys there are."""
    return len(np.unique(keys_of(joined)))


def _document_digest(record: Document, salt: str) -> str:
    """SHA-256 of `[salt, "document", text]` as JSON, a piece of the text at a time."""
    opened, closed = json.dumps([salt, "document", ""])[:-2], '"]'
    digest = hashlib.sha256(opened.encode())
    for piece in record.pieces():
        digest.update(json.dumps(piece)[1:-1].encode())
    digest.update(closed.encode())
    return digest.hexdigest()


def is_empty(record: Record) -> bool:
    """Whether a record has nothing to train: no text, no answer, or no turn of the assistant with content."""
    if isinstance(record, Document):
        return not any(piece.strip() for piece in record.pieces())
    if isinstance(record, Completion):
        return not record.completion.strip()
    return not any(message.role == "assistant" and message.content.strip() for message in record.messages)
