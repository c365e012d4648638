"""The kinds of training records, and a list of records with notes for the user.

Each record has a `source`, the path of its file or another name to show in messages, and a `line`, starting at 1, or
None without one.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypeVar, overload

import numpy as np

from lorakit.durable import JsonObject, JsonValue

Item = TypeVar("Item")


class ReadOnAccess(Sequence[Item], ABC):
    """A sequence whose items are made when they are read."""

    @abstractmethod
    def _read(self, indexes: Iterable[int]) -> Iterator[Item]:
        """Yield the items at indices from 0 to the length - 1."""

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> list[Item]: ...
    def __getitem__(self, index: int | slice) -> Item | list[Item]:
        at = range(len(self))[index]
        return next(self._read([at])) if isinstance(at, int) else list(self._read(at))


KEY_BYTES = 16
"""Size of a record's content key in bytes."""

PIECE_CHARACTERS = 1 << 17
"""Maximum number of characters of a document that are processed at a time."""


@dataclass(frozen=True, slots=True)
class Document:
    """A text in which every token except the first contributes to the loss.

    Attributes:
        is_first: Whether the text begins here, so that a beginning-of-text token precedes it.
        is_last: Whether the text ends here, so that an end-of-text token follows it.
    """

    text: str
    source: str = "text"
    line: int | None = None
    is_first: bool = True
    is_last: bool = True

    def pieces(self) -> Iterator[str]:
        """Yield the text in pieces of at most `PIECE_CHARACTERS` characters."""
        for at in range(0, len(self.text), PIECE_CHARACTERS):
            yield self.text[at : at + PIECE_CHARACTERS]


@dataclass(frozen=True, slots=True)
class Completion:
    """A prompt and its completion; only the completion contributes to the loss."""

    prompt: str
    completion: str
    source: str = "row"
    line: int | None = None


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation; only turns of the assistant with `is_trained` contribute to the loss.

    Attributes:
        role: Role of the speaker, one of `ROLES`.
        content: Text of the turn; None if the turn has only tool calls or reasoning.
        fields: Other fields for the chat template, such as `tool_calls` and `reasoning_content`.
    """

    role: str
    content: str | None
    fields: Mapping[str, JsonValue] = field(default_factory=dict)
    is_trained: bool = True

    def untrained(self) -> Message:
        """Return the same turn, excluded from the loss."""
        return Message(self.role, self.content, self.fields, False)

    def as_dict(self) -> JsonObject:
        """Return the turn in the format that chat templates expect; many of them fail if the content is missing.

        Reasoning has both names that templates read, which releases of transformers before 5.24 do not add.
        """
        reasons = next((self.fields[name] for name in REASONING if self.fields.get(name) is not None), None)
        both = {} if reasons is None else {"thinking": reasons, "reasoning_content": reasons}
        return {"role": self.role, "content": self.content or "", **both, **self.fields}


REASONING = ("reasoning_content", "thinking", "reasoning")
"""Fields of a message that contain its reasoning."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """A chat in which only assistant turns contribute to the loss.

    Attributes:
        tools: JSON schemas of the functions that the assistant may call.
        options: Options for the chat template, such as `enable_thinking`.
        is_instruction: Whether the row is a single request with its answer; without a chat template, such a row is
            rendered as a prompt and a completion.
    """

    messages: tuple[Message, ...]
    source: str = "row"
    line: int | None = None
    tools: tuple[JsonObject, ...] = ()
    options: Mapping[str, JsonValue] = field(default_factory=dict)
    is_instruction: bool = False

    def as_dicts(self) -> list[JsonObject]:
        """Return the turns in the format that chat templates expect."""
        return [message.as_dict() for message in self.messages]

    def as_completion(self) -> Completion:
        """Return the row as a prompt, which ends with a blank line, and a completion."""
        *request, answer = (message.content or "" for message in self.messages)
        return Completion("".join(f"{part}\n\n" for part in request), answer, self.source, self.line)


@dataclass(frozen=True, slots=True)
class Labeled:
    """One or more texts with a label, for classification and embeddings.

    Attributes:
        texts: The text; or a pair of texts; or an anchor, a positive and a negative text.
        label: Name of the class, names of all classes that apply, or a score; None if the row has no label.
    """

    texts: tuple[str, ...]
    label: str | tuple[str, ...] | float | None = None
    source: str = "row"
    line: int | None = None


@dataclass(frozen=True, slots=True)
class Tagged:
    """Words with the name of one tag each, or with no tags, for token classification."""

    words: tuple[str, ...]
    tags: tuple[str, ...] = ()
    source: str = "row"
    line: int | None = None


Record: TypeAlias = Document | Completion | Conversation | Labeled | Tagged

ROLES = ("system", "developer", "user", "assistant", "tool")
"""The roles that a message may have."""


class Records(list[Record]):
    """A list of records with notes for the user, and the name of the shape of the rows that they were built from.

    `columns` maps required fields to columns, or is empty.
    """

    def __init__(self, records: Iterable[Record] = (), notes: Iterable[str] = ()) -> None:
        super().__init__(records)
        self.notes = list(notes)
        self.shape: str | None = None
        self.columns: dict[str, str] = {}

    def some(self, positions: Iterable[int], notes: Iterable[str] = ()) -> Records:
        """Return the records at the given positions."""
        return Records((self[at] for at in positions), notes)

    def cut(self, at: int, fraction: float) -> tuple[Records, Records]:
        """Return all documents up to a character, and the rest of the first one; see `StoredRecords.cut`."""
        heads, rests = Records(notes=self.notes), Records()
        for record in self:
            assert isinstance(record, Document)
            heads.append(Document(record.text[:at], record.source, record.line, is_last=False))
            rests.append(Document(record.text[at:], record.source, record.line))
        return heads, Records(rests[:1])


def location(record: Record) -> str:
    """Return a record's location as `file:line`, or as `file` if it has no line number."""
    return record.source if record.line is None else f"{record.source}:{record.line}"


def content_key(record: Record, salt: str = "") -> bytes:
    """Return a key that identifies and orders records by kind and content, regardless of file and line.

    It is the first `KEY_BYTES` bytes of a SHA-256 digest; different salts order records differently.
    """
    if isinstance(record, Document):  # hashes the JSON `[salt, "document", text]` piece by piece
        digest = hashlib.sha256(json.dumps([salt, "document", ""])[:-2].encode())
        for piece in record.pieces():
            digest.update(json.dumps(piece)[1:-1].encode())
        digest.update(b'"]')
    elif isinstance(record, Completion):
        digest = hashlib.sha256(json.dumps([salt, "completion", record.prompt, record.completion]).encode())
    elif isinstance(record, Labeled):
        digest = hashlib.sha256(json.dumps([salt, "labeled", record.texts, record.label]).encode())
    elif isinstance(record, Tagged):
        digest = hashlib.sha256(json.dumps([salt, "tagged", record.words, record.tags]).encode())
    else:
        turns = [_key_of(message) for message in record.messages]
        more = [record.tools, record.options] if record.tools or record.options else []
        digest = hashlib.sha256(json.dumps([salt, "conversation", *turns, *more], sort_keys=True).encode())
    return digest.digest()[:KEY_BYTES]


def _key_of(message: Message) -> list[JsonValue]:
    key: list[JsonValue] = [message.role, message.content]
    return key if message.is_trained and not message.fields else [*key, dict(message.fields), message.is_trained]


def keys_of(joined: bytes | bytearray) -> np.ndarray[Any, Any]:
    """Split concatenated keys into an array of shape (keys,) whose elements sort in the same order as the keys."""
    return np.frombuffer(joined, dtype=f"S{KEY_BYTES}")


def text_of_record(record: Record) -> str:
    """Return all text of a record, for comparisons."""
    if isinstance(record, Document):
        return record.text
    if isinstance(record, Completion):
        return f"{record.prompt} {record.completion}"
    if isinstance(record, Labeled):
        return " ".join(record.texts)
    if isinstance(record, Tagged):
        return " ".join(record.words)
    fields = (json.dumps(dict(message.fields)) for message in record.messages if message.fields)
    return " ".join([*(message.content or "" for message in record.messages), *fields])


def is_empty(record: Record) -> bool:
    """Return whether a record has nothing to train on, such as an empty text or no assistant turns with content."""
    if isinstance(record, Document):
        return not any(piece.strip() for piece in record.pieces())
    if isinstance(record, Completion):
        return not record.completion.strip()
    if isinstance(record, Labeled):
        return not all(text.strip() for text in record.texts)
    if isinstance(record, Tagged):
        return not record.words
    return not any(
        message.role == "assistant" and message.is_trained and ((message.content or "").strip() or message.fields)
        for message in record.messages
    )
