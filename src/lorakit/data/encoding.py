"""Encode records as token sequences with labels, and count everything that is truncated or left out.

Positions that do not contribute to the causal language modeling loss have the label -100. The first label of a
sequence is always -100, because there is no earlier token from which to predict the first token.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Many
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import numpy as np

from lorakit.choices import Overlong
from lorakit.data.chat import TokenizedRow, is_plain_instruction, row_tokens
from lorakit.data.records import (
    Completion,
    Conversation,
    Document,
    Labeled,
    ReadOnAccess,
    Record,
    Tagged,
    content_key,
    is_empty,
    keys_of,
    location,
)
from lorakit.data.report import DataReport, Report
from lorakit.data.stored import AnyRecords, sized
from lorakit.data.tokens import Tokenizer, beginning, pieces_of, text_of, token_parts
from lorakit.errors import ConfigError, DataError

IGNORED = -100
"""The label of a token that does not contribute to the loss."""

_NARROW, _WIDE = "H", "i"
_NARROW_IDS = 1 << 16


@dataclass(frozen=True, slots=True)
class Sequence:
    """The tokens and labels of one row of a batch.

    Attributes:
        input_ids: Token ids, shape (length,), four bytes each.
        labels: For causal language models, token ids at positions that contribute to the loss, -100 elsewhere, shape
            (length,); the first label is always -100. For other tasks, see `lorakit.tasks`.
        others: Token ids of the row's other texts, if the task embeds several.
        types: Number of the segment (0 or 1) of each token, if the model distinguishes segments.
        pieces: Text of each token as it is written, in rows that are shown: of `input_ids`, of each of `others`, and of
            `labels` if they are the tokens of another text. A text is empty if the tokenizer provides no offsets.
    """

    input_ids: array[int]
    labels: array[int]
    others: tuple[array[int], ...] = ()
    types: array[int] | None = None
    pieces: tuple[Many[str], ...] = ()

    def __len__(self) -> int:
        return max(len(ids) for ids in (self.input_ids, self.labels, *self.others))

    @property
    def trained_tokens(self) -> int:
        """The number of positions that contribute to the loss."""
        return len(self.labels) - self.labels.count(IGNORED)


class Sequences(ReadOnAccess[Sequence]):
    """Rows stored in flat arrays; a `Sequence` is created when a row is read.

    Each token takes two or four bytes for its id and one byte for its loss flag; each row takes eight more bytes.
    """

    def __init__(self) -> None:
        self._ids: array[int] | memoryview[int] = array(_NARROW)
        self._trained: bytearray | memoryview[int] = bytearray()
        self._ends: array[int] | memoryview[int] = array("q", [0])

    @classmethod
    def of(cls, ids: memoryview[int], trained: memoryview[int], ends: memoryview[int]) -> Sequences:
        """Return read-only sequences that use the memory of the results of `buffers`."""
        sequences = cls()
        sequences._ids, sequences._trained, sequences._ends = ids, trained, ends
        return sequences

    def buffers(self) -> dict[str, memoryview[int]]:
        """Return the token ids (two or four bytes each), the loss flags (one byte each), and the ends (eight bytes)."""
        return {"ids": memoryview(self._ids), "trained": memoryview(self._trained), "ends": memoryview(self._ends)}

    def add(self, ids: Many[int], trained: Many[bool] | bytes) -> None:
        """Append a row; the first token never contributes to the loss, because no token precedes it."""
        assert isinstance(self._ids, array) and isinstance(self._ends, array) and isinstance(self._trained, bytearray)
        if self._ids.typecode == _NARROW and max(ids) >= _NARROW_IDS:
            self._ids = array(_WIDE, self._ids)
        self._ids.extend(array(self._ids.typecode, ids))
        self._trained += bytes(trained)
        self._trained[self._ends[-1]] = 0
        self._ends.append(len(self._ids))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def _read(self, indexes: Iterable[int]) -> Iterator[Sequence]:
        for at in indexes:
            begin, end = self._ends[at], self._ends[at + 1]
            ids = np.array(self._ids[begin:end], dtype=np.int32)
            marks = np.frombuffer(bytes(self._trained[begin:end]), dtype=np.bool_)
            labels = np.where(marks, ids, np.int32(IGNORED))
            yield Sequence(array(_WIDE, ids.tobytes()), array(_WIDE, labels.tobytes()))

    @property
    def tokens(self) -> int:
        """The total number of tokens."""
        return len(self._ids)

    @property
    def trained_tokens(self) -> int:
        """The total number of positions that contribute to the loss."""
        return int(np.count_nonzero(np.frombuffer(self._trained, dtype=np.uint8)))

    def lengths(self) -> array[int]:
        """Return the number of tokens in each row."""
        return array("q", np.diff(np.array(self._ends, dtype=np.int64)).tobytes())


def lengths(sequences: Iterable[Sequence]) -> array[int]:
    """Return the number of tokens in each sequence, without creating the rows of a `Sequences` object."""
    return sequences.lengths() if isinstance(sequences, Sequences) else array("q", map(len, sequences))


_TOKENS_AT_ONCE = 1 << 14


@dataclass(frozen=True, slots=True)
class Encoded:
    """The encoded rows in the order of the records, with counts, and (source, sequences) pairs of adjacent records.

    `record_of` has the number of the record of each sequence (sequences,), and `records` that record, if the task
    predicts rows and they do not come from the token cache.
    """

    sequences: Many[Sequence]
    report: Report
    record_of: array[int] | memoryview[int]
    sources: tuple[tuple[str, int], ...] = ()
    records: list[Record] = field(default_factory=list)


def encode(
    records: Iterable[Record],
    tokenizer: Tokenizer,
    max_length: int,
    watch: Callable[[int], None] | None = None,
    *,
    overlong: Overlong = "truncate",
    visit: Callable[[Record, bytes], None] | None = None,
) -> Encoded:
    """Encode records as sequences of at most `max_length` tokens.

    - A document starts with the beginning-of-text token if the tokenizer adds one, and ends with the end-of-text token,
      unless its text goes on in another part. It is split into consecutive windows. Each window after the first starts
      with the last token of the previous one as context, so every token of the document except the first contributes to
      the loss exactly once.
    - In a row with a prompt and a completion, the completion and the end-of-text token that follows contribute to the
      loss.
    - In a conversation, the assistant's turns and their end markers, as rendered by the chat template, contribute to
      the loss.
    - Completions and conversations that are too long are handled as `overlong` says, and rows in which no token
      contributes to the loss are left out; both are counted.

    Args:
        records: Records from `read_records` or `split`.
        tokenizer: Any transformers tokenizer.
        max_length: Maximum sequence length in tokens, at least 2.
        watch: Function that is called repeatedly with the number of bytes read from disk so far, or None.
        overlong: What to do with a completion or conversation of more than `max_length` tokens: "truncate" it on the
            right, "drop" it, "split" it into windows like a document, or raise an "error".
        visit: Function that is called with each record and its content key, or None.

    Raises:
        ConfigError: `max_length` is below 2.
        DataError: No token contributes to the loss after truncation, a conversation cannot be rendered, or a row is too
            long and `overlong` is "error".
    """
    if max_length < 2:
        raise ConfigError.of("max_length", max_length, "at least 2: one token to read and one to predict")
    report = DataReport(max_length, overlong=overlong)
    if isinstance(records, AnyRecords):
        report.notes += records.notes
        report.shape, report.columns = records.shape, dict(records.columns)
    work = _Work(tokenizer, report, watch or (lambda done: None), overlong)
    keys, first, ends, record_of = bytearray(), None, list[tuple[str, int]](), array("q")
    for number, (record, size) in enumerate(sized(records)):
        first = first or record
        report.documents += isinstance(record, Document)
        report.completions += isinstance(record, Completion)
        report.conversations += isinstance(record, Conversation)
        report.instructions += is_plain_instruction(record, tokenizer)
        key = content_key(record)
        keys += key
        if visit is not None:
            visit(record, key)
        if is_empty(record):
            report.empty_rows += 1
        else:
            work.add(record)
        work.done(size)
        record_of.extend([number] * (len(work.sequences) - len(record_of)))
        if ends and ends[-1][0] == record.source:
            ends.pop()
        ends.append((record.source, len(work.sequences)))
    sequences = work.sequences
    report.duplicate_rows = report.rows - len(np.unique(keys_of(keys)))
    report.sequences = len(sequences)
    report.tokens = sequences.tokens
    report.trained_tokens = sequences.trained_tokens
    if tokenizer.eos_token_id is None and (report.documents or report.completions):
        report.notes.append("The tokenizer has no end-of-text token, so the end of a text is not marked.")
    if not report.trained_tokens:
        raise DataError(_nothing_left(report, first), where=None if first is None else location(first))
    begins = [0, *(end for _, end in ends)]
    sources = tuple((source, end - begin) for (source, end), begin in zip(ends, begins, strict=False))
    return Encoded(sequences, report, record_of, sources)


def encode_record(record: Record, tokenizer: Tokenizer, max_length: int, overlong: Overlong) -> Sequences:
    """Encode one record as `encode` does, uncounted; no sequences result if no token contributes to the loss.

    Raises:
        DataError: The record cannot be rendered, or is too long and `overlong` is "error".
    """
    work = _Work(tokenizer, DataReport(max_length), lambda done: None, overlong)
    if not is_empty(record):
        work.add(record)
    return work.sequences


def shown_rows(record: Record, tokenizer: Tokenizer, max_length: int, overlong: Overlong) -> Iterator[Sequence]:
    """Yield the sequences of `encode_record` with the text of their tokens, if the tokenizer provides offsets."""
    work = _Work(tokenizer, DataReport(max_length), lambda done: None, overlong)
    work.with_text = getattr(tokenizer, "is_fast", False)
    if not is_empty(record):
        for ids, trained, pieces in work.rows(record):
            one = Sequences()
            one.add(ids, trained)
            yield replace(one[0], pieces=(pieces,) if pieces else ())


_Row: TypeAlias = "tuple[Many[int], Many[bool] | bytes, Many[str]]"
"""Token ids, whether each token contributes to the loss, and the text of each token if it is shown."""


def too_long(record: Record, tokens: int, length: int) -> DataError:
    """Return an error about a row with more tokens than the maximum length."""
    text = f"the row has {tokens:,} tokens, but max_length is {length:,}; see --overlong."
    return DataError(f"{location(record)}: {text}", where=location(record), field="overlong")


def _nothing_left(report: DataReport, first: Record | None) -> str:
    if first is None:
        return "The data has no rows."
    parts = [f"{report.empty_rows:,} empty"] if report.empty_rows else []
    parts += [f"{report.dropped_rows:,} with nothing to train on in the first {report.max_length_tokens:,} tokens"]
    advice = "Check the data, or increase --max-length."
    if report.untrained_turns:
        advice = (
            f"Assistant turns that could not be located: {report.untrained_turns:,}, because {report.untrained_reason}."
        )
    return (
        f"No token in the data contributes to the loss (rows: {report.rows:,}, starting at {location(first)}; "
        f"{', '.join(parts)}). {advice}"
    )


class _Work:
    """The state of one encoding pass.

    Attributes:
        sequences: The sequences encoded so far.
        with_text: Whether `rows` yields the text of tokens.
    """

    def __init__(
        self, tokenizer: Tokenizer, report: DataReport, watch: Callable[[int], None], overlong: Overlong
    ) -> None:
        self.sequences = Sequences()
        self.with_text = False
        self._overlong = overlong
        self._tokenizer = tokenizer
        self._report = report
        self._watch = watch
        self._bytes = 0

    def done(self, size: int) -> None:
        """Report that a record has been processed, given its size on disk in bytes."""
        self._bytes += size
        self._watch(self._bytes)

    def add(self, record: Record) -> None:
        """Encode a nonempty record and append its sequences."""
        for ids, trained, _ in self.rows(record):
            self.sequences.add(ids, trained)

    def rows(self, record: Record) -> Iterator[_Row]:
        """Yield the sequences of a nonempty record, and count them."""
        if isinstance(record, Labeled | Tagged):
            text = (
                f"{location(record)}: rows with labels or tags cannot be used for causal language modeling; pass "
                "another --task, or --format text to train on the text alone."
            )
            raise DataError(text, where=location(record), field="task")
        rows: Iterable[_Row]
        if isinstance(record, Document):
            rows, ended = self._windows(record), self._tokenizer.eos_token_id is not None
        else:
            rows, ended = self._cut(record)
        has_rows = False
        for row in rows:
            yield row
            has_rows = True
        if has_rows:
            self._report.ended_rows += ended
        else:
            self._report.dropped_rows += 1

    def _windows(self, record: Document) -> Iterator[_Row]:
        """Yield the windows of a document as its tokens become available."""
        length = self._report.max_length_tokens
        rest, pieces = array("q"), list[str]()
        for ids, texts in self._tokens(record):
            rest.extend(ids)
            pieces += texts
            while len(rest) > length:  # the tokens exceed one window, so at least one more window follows
                yield rest[:length], b"\1" * length, pieces[:length]
                del rest[: length - 1], pieces[: length - 1]  # the last token of a window is the context of the next
        if len(rest) > 1:
            yield rest, b"\1" * len(rest), pieces

    def _tokens(self, record: Document) -> Iterator[tuple[array[int], list[str]]]:
        """Yield the tokens of a document, including its start and end tokens, in chunks of limited size."""
        if record.is_first:
            yield self._special(beginning(self._tokenizer))
        end, last = self._tokenizer.eos_token_id if record.is_last else None, None
        for ids, pieces in token_parts(self._tokenizer, self._watched(record.pieces()), with_text=self.with_text):
            for at in range(0, len(ids), _TOKENS_AT_ONCE):
                yield array("q", ids[at : at + _TOKENS_AT_ONCE]), pieces[at : at + _TOKENS_AT_ONCE]
            last = ids[-1] if ids else last
        if end is not None and last != end:
            yield self._special([end])

    def _special(self, ids: list[int]) -> tuple[array[int], list[str]]:
        return array("q", ids), [text_of(self._tokenizer, [one]) for one in ids] if self.with_text else []

    def _watched(self, pieces: Iterable[str]) -> Iterator[str]:
        """Yield the pieces of a document; report each as processed when the next one is requested."""
        done = self._bytes
        for piece in pieces:
            yield piece
            done += len(piece.encode())
            self._watch(done)

    def _cut(self, record: Completion | Conversation) -> tuple[Iterable[_Row], bool]:
        """Return a record's rows, truncated or split if too long, and whether an end marker contributes to the loss."""
        report, row = self._report, row_tokens(record, self._tokenizer)
        report.untrained_turns += row.untrained_turns
        report.untrained_reason = report.untrained_reason or row.reason
        report.prompt = report.prompt or row.prompt
        report.joined_turns += row.joined_turns
        length = report.max_length_tokens
        if len(row.ids) > length:
            report.cut_rows += 1
            if self._overlong == "error":
                raise too_long(record, len(row.ids), length)
            if self._overlong == "drop":
                return (), False
            if self._overlong == "split":
                return self._split(row), row.ended
            report.cut_tokens += len(row.ids) - length
            report.cut_trained_tokens += sum(row.trained[length:])
            report.cut_answers += any(row.trained[length:])
        if not any(row.trained[1:length]):
            return (), False
        return [self._window(row, 0)], row.ended and len(row.ids) <= length

    def _split(self, row: TokenizedRow) -> Iterator[_Row]:
        """Yield the windows of a row in which a token contributes to the loss."""
        length = self._report.max_length_tokens
        for start in range(0, len(row.ids) - 1, length - 1):  # the last token of a window is the context of the next
            if any(row.trained[start + 1 : start + length]):
                yield self._window(row, start)

    def _window(self, row: TokenizedRow, start: int) -> _Row:
        pieces = pieces_of(self._tokenizer, row.ids, row.texts) if self.with_text else []
        part = slice(start, start + self._report.max_length_tokens)
        return row.ids[part], row.trained[part], pieces[part]
