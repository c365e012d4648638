"""Encode labeled records as sequences, and count what is truncated or left out.

A sequence of these tasks has the tokens that the tokenizer makes of a text, including special tokens. Its labels are
the class of the row, the classes of the row, a score (as float64), a tag per token, or the tokens of the target text.
"""

from __future__ import annotations

import itertools
from array import array
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from lorakit.data import AnyRecords, Conversation, Labeled, Record, Tagged, Tokenizer
from lorakit.data.encoding import IGNORED
from lorakit.data.encoding import Sequence as Encoded
from lorakit.data.records import Completion, content_key, is_empty, location, text_of_record
from lorakit.data.stored import sized
from lorakit.data.token_cache import Buffers, Form
from lorakit.durable import JsonObject, JsonValue
from lorakit.errors import ConfigError, DataError, ModelError
from lorakit.tables import format_count, format_percent
from lorakit.tasks.labels import Target, names_of, score_of
from lorakit.tasks.stored_rows import StoredRows
from lorakit.tasks.task import EncodeOptions

_TYPE = "i"
_RARE_ROWS, _MAJORITY, _SHOWN = 10, 0.9, 8


@dataclass
class RowReport:
    """Counts of labeled rows and their tokens.

    Attributes:
        max_length_tokens: Maximum length of a text in tokens.
        unit: What contributes to the loss: "token" or "row".
        rows: Number of input rows.
        sequences: Number of encoded rows.
        tokens: Number of tokens in all encoded rows.
        trained_tokens: Number of targets that contribute to the loss.
        empty_rows: Number of rows left out because a text is empty.
        duplicate_rows: Number of rows with the same content as an earlier row; they are kept.
        overlong: What was done with rows that are longer than `max_length_tokens`.
        cut_rows: Number of these rows.
        cut_words: Number of tagged words without a token, because of truncation or because the tokenizer skips them.
        shape: Name of the shape of all rows, or None if it is unknown or differs between files.
        columns: Required field -> column, or an empty dict.
        labels: Number of rows (for tags: of words) with each label, most frequent first; empty for scores and texts.
        notes: Other messages for the user.
    """

    max_length_tokens: int
    unit: str
    rows: int = 0
    sequences: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    empty_rows: int = 0
    duplicate_rows: int = 0
    overlong: str = "truncate"
    cut_rows: int = 0
    cut_words: int = 0
    shape: str | None = None
    columns: dict[str, str] = field(default_factory=dict)
    labels: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def prompt_format(self) -> None:
        """Format of the prompts: these tasks have none."""
        return None

    def check_end(self) -> None:
        """Do nothing: these tasks do not learn where a text ends."""

    def as_dict(self) -> JsonObject:
        """Return all counts and notes as plain JSON values."""
        return asdict(self)

    def lines(self) -> list[str]:
        """Return the counts as lines of text: totals, labels, what was left out or truncated, and notes."""
        lines = [
            f"{format_count(self.sequences, 'row')} of at most {self.max_length_tokens:,} tokens; total: "
            f"{self.tokens:,} tokens"
            + (f"; {self.trained_tokens:,} contribute to the loss." if self.unit == "token" else ".")
        ]
        lines += self._label_lines()
        if self.empty_rows:
            lines.append(f"{format_count(self.empty_rows, 'row')} left out: empty.")
        if self.cut_rows:
            done = "left out because of more than" if self.overlong == "drop" else "truncated to"
            lines.append(
                f"{format_count(self.cut_rows, 'row')} {done} {self.max_length_tokens:,} tokens; a larger --max-length "
                "keeps them whole."
            )
        if self.cut_words:
            lines.append(
                f"{format_count(self.cut_words, 'tagged word')} left out: truncated, or skipped by the tokenizer."
            )
        if self.duplicate_rows:
            lines.append(f"{format_count(self.duplicate_rows, 'duplicate row')} kept.")
        return [*lines, *self.notes]

    def _label_lines(self) -> list[str]:
        """Return the number of rows with each label, and a warning if they are unbalanced."""
        total = sum(self.labels.values())
        if not total:
            return []
        shown = [f"{name} {n:,} ({format_percent(n / total, 0)})" for name, n in list(self.labels.items())[:_SHOWN]]
        more = f", and {len(self.labels) - _SHOWN} more" if len(self.labels) > _SHOWN else ""
        lines = [f"labels: {', '.join(shown)}{more}"]
        if self.unit == "token":  # most words have no entity
            return lines
        largest = max(self.labels.values()) / total
        rare = [name for name, count in self.labels.items() if count < _RARE_ROWS]
        if largest > _MAJORITY and total >= _RARE_ROWS:
            lines.append(
                f"warning: {format_percent(largest, 0)} of the labels are the same class; a model that always predicts "
                "it has that accuracy, so compare the F1 score instead."
            )
        if rare and total >= _RARE_ROWS * len(self.labels):
            lines.append(
                f"warning: {format_count(len(rare), 'class', 'classes')} with fewer than {_RARE_ROWS} rows: "
                f"{', '.join(rare[:5])}{' ...' if len(rare) > 5 else ''}."
            )
        return lines


@dataclass(frozen=True)
class EncodedRows:
    """Encoded rows with their counts.

    Attributes:
        sequences: The rows.
        report: Counts.
        sources: (source, number of rows) pairs for consecutive rows.
        records: The record of each sequence, in the same order; empty if the rows come from the token cache.
    """

    sequences: list[Encoded] | StoredRows
    report: RowReport
    sources: tuple[tuple[str, int], ...] = ()
    records: list[Record] = field(default_factory=list)


Encode = Callable[[Record, Tokenizer, Target, EncodeOptions, RowReport], "Encoded | None"]
"""Function that encodes a record and updates the counts; None leaves the record out."""


@dataclass(frozen=True)
class RowEncoder:
    """How the rows of a task are encoded.

    Attributes:
        name: Name of this way of encoding, for the token cache.
        one: Function that encodes a record.
        unit: What contributes to the loss: "token" or "row".
    """

    name: str
    one: Encode
    unit: str


def encode_rows(
    records: AnyRecords, tokenizer: Tokenizer, target: Target, options: EncodeOptions, encoder: RowEncoder
) -> EncodedRows:
    """Encode records one by one, or take them from the token cache.

    Args:
        records: The records.
        tokenizer: A transformers tokenizer.
        target: What is predicted.
        options: Maximum length, what happens to longer rows, and the cache.
        encoder: How a record is encoded.

    Raises:
        ConfigError: `overlong` is "split", which these tasks do not support.
        DataError: A record does not fit the task, or nothing is left to train on.
    """
    if options.overlong == "split":
        raise ConfigError.of("overlong", "split", "truncate, drop or error, because labels belong to whole rows")
    if options.cache is None or options.visit is not None or not options.is_labeled:
        return _encoded(records, tokenizer, target, options, encoder)
    parts: list[JsonValue] = [
        encoder.name,
        target.as_dict(),
        target.note,
        options.max_length,
        options.overlong,
    ]
    return options.cache.fetch(
        records, parts, lambda: _encoded(records, tokenizer, target, options, encoder), Form(_pack, _unpack)
    )


def encode_row(
    record: Record, tokenizer: Tokenizer, target: Target, options: EncodeOptions, encoder: RowEncoder
) -> list[Encoded]:
    """Encode one record as `encode_rows` does; nothing is counted.

    Args:
        record: The record.
        tokenizer: A transformers tokenizer.
        target: What is predicted.
        options: Maximum length, and what happens to longer rows.
        encoder: How a record is encoded.

    Returns:
        The encoded row, or an empty list if it is left out.

    Raises:
        DataError: The record does not fit the task.
    """
    if is_empty(record):
        return []
    row = encoder.one(record, tokenizer, target, options, RowReport(options.max_length, encoder.unit))
    return [] if row is None else [row]


def _encoded(
    records: AnyRecords, tokenizer: Tokenizer, target: Target, options: EncodeOptions, encoder: RowEncoder
) -> EncodedRows:
    notes, unit = [*records.notes, *([target.note] if target.note else [])], encoder.unit
    report = RowReport(options.max_length, unit, overlong=options.overlong, notes=notes)
    report.shape, report.columns = records.shape, dict(records.columns)
    rows, kept, seen, done = list[Encoded](), list[Record](), set[bytes](), 0
    for record, size in sized(records):
        report.rows += 1
        key = content_key(record)
        seen.add(key)
        if options.visit is not None:
            options.visit(record, key)
        if is_empty(record) if options.is_labeled else not text_of_record(record).strip():
            report.empty_rows += 1
        else:
            row = encoder.one(record, tokenizer, target, options, report)
            if row is not None:
                rows.append(row)
                kept.append(record)
        done += size
        if options.watch is not None:
            options.watch(done)
    report.duplicate_rows = report.rows - len(seen)
    report.sequences = len(rows)
    report.tokens = sum(len(ids) for row in rows for ids in (row.input_ids, *row.others))
    report.trained_tokens = sum(_targets(row, unit) for row in rows)
    counts = Counter(label for row in rows for label in row.labels if label != IGNORED) if target.names else Counter()
    report.labels = {target.names[number]: count for number, count in counts.most_common()}
    if not report.trained_tokens and options.is_labeled:
        raise DataError(
            f"No row contributes to the loss (rows: {report.rows:,}; {report.empty_rows:,} empty; {report.cut_rows:,} "
            "too long). Check the data, or increase --max-length.",
            field="data",
        )
    groups = itertools.groupby(kept, key=lambda record: record.source)
    return EncodedRows(rows, report, tuple((source, sum(1 for _ in group)) for source, group in groups), kept)


def _pack(found: EncodedRows) -> tuple[Buffers, JsonObject]:
    values = {"report": asdict(found.report), "sources": [list(pair) for pair in found.sources]}
    return StoredRows.of(found.sequences).buffers, values


def _unpack(buffers: Buffers, values: Mapping[str, Any]) -> EncodedRows:
    sources = tuple((str(source), int(count)) for source, count in values["sources"])
    return EncodedRows(StoredRows(buffers), RowReport(**values["report"]), sources)


def _targets(row: Encoded, unit: str) -> int:
    return 1 if unit == "row" else len(row.labels) - row.labels.count(IGNORED)


def encode_labeled(
    record: Record, tokenizer: Tokenizer, target: Target, options: EncodeOptions, report: RowReport
) -> Encoded | None:
    """Encode a text or a pair of texts with its label.

    Raises:
        DataError: The record is of another kind, or is too long and `overlong` is "error".
    """
    if not isinstance(record, Labeled):
        raise _unfit(record, "'text' and 'label'")
    found = _tokens(record, record.texts[:2], tokenizer, options, report)
    if found is None:
        return None
    types = found.get("token_type_ids")
    return Encoded(
        array(_TYPE, found["input_ids"]),
        labels_of(record, target),
        types=array(_TYPE, types) if types and any(types) else None,
    )


def labels_of(record: Labeled, target: Target) -> array[Any]:
    """Return the labels of a row: the ids of its classes, or its score; empty if the row has no label.

    Raises:
        DataError: The label is not one of the target's classes, or not a number.
    """
    if record.label is None:
        return array(_TYPE)
    if target.kind == "score":
        return array("d", [score_of(record)])
    ids = target.ids()
    names = names_of(record, target.kind)
    unknown = [name for name in names if name not in ids]
    if unknown:
        raise DataError(
            f"{location(record)}: the label {unknown[0]!r} is not one of the model's: {', '.join(target.names[:10])}.",
            what=unknown[0],
            where=location(record),
            field="data",
            allowed=target.names,
        )
    return array(_TYPE, sorted(ids[name] for name in names))


def encode_pair(
    record: Record, tokenizer: Tokenizer, target: Target, options: EncodeOptions, report: RowReport
) -> Encoded | None:
    """Encode the texts of a row separately, with the row's score if it has one.

    Raises:
        DataError: The record is of another kind, or is too long and `overlong` is "error".
    """
    if not isinstance(record, Labeled):
        raise _unfit(record, "'anchor' and 'positive', or 'sentence1', 'sentence2' and 'score'")
    before = report.cut_rows
    found = [_tokens(record, (text,), tokenizer, options, report) for text in record.texts]
    report.cut_rows = min(report.cut_rows, before + 1)
    first, *others = [None if one is None else array(_TYPE, one["input_ids"]) for one in found]
    if first is None or None in others:
        return None
    scored = target.kind == "score" and record.label is not None
    score: array[Any] = array("d", [score_of(record)] if scored else [])
    return Encoded(first, score, others=tuple(ids for ids in others if ids is not None))


def encode_tagged(
    record: Record, tokenizer: Tokenizer, target: Target, options: EncodeOptions, report: RowReport
) -> Encoded | None:
    """Encode the words of a row, joined by spaces; the first token of each word has the word's tag.

    Raises:
        DataError: The record is of another kind, has an unknown tag, or is too long and `overlong` is "error".
        ModelError: The tokenizer does not report offsets.
    """
    if not isinstance(record, Tagged):
        raise _unfit(record, "'tokens' and 'tags'")
    found = _tokens(record, (" ".join(record.words),), tokenizer, options, report, offsets=True)
    if found is None:
        return None
    ids = target.ids()
    unknown = [tag for tag in record.tags if tag not in ids]
    if unknown:
        text = f"{location(record)}: the tag {unknown[0]!r} is not one of the model's: {', '.join(target.names[:10])}."
        raise DataError(text, what=unknown[0], where=location(record), field="data", allowed=target.names)
    labels = array(_TYPE, [IGNORED]) * len(found["input_ids"])
    places = word_tokens(record.words, found["offset_mapping"])
    for place, tag in zip(places, record.tags, strict=False):
        if place is not None:
            labels[place] = ids[tag]
    report.cut_words += places.count(None)
    if record.tags and all(place is None for place in places):
        return None
    return Encoded(array(_TYPE, found["input_ids"]), labels)


def places_of(words: Sequence[str], tokenizer: Tokenizer) -> list[int | None]:
    """Return the index of the first token of each word, as in `encode_tagged`.

    Args:
        words: The words.
        tokenizer: A transformers tokenizer that reports offsets.
    """
    return word_tokens(words, tokenizer(" ".join(words), return_offsets_mapping=True, verbose=False)["offset_mapping"])


def word_tokens(words: Sequence[str], offsets: Sequence[tuple[int, int]]) -> list[int | None]:
    """Return the index of the first token of each word in a text of words joined by spaces.

    Args:
        words: The words.
        offsets: First and last character of each token; equal for special tokens.

    Returns:
        An index for each word; None if the word has no token.
    """
    found, at, begin = list[int | None](), 0, 0
    for word in words:
        end = begin + len(word)
        while at < len(offsets) and (offsets[at][1] <= begin or offsets[at][0] == offsets[at][1]):
            at += 1
        # a token may begin with the space before the word, so its end decides to which word it belongs
        found.append(at if word and at < len(offsets) and offsets[at][0] < end else None)
        begin = end + 1
    return found


def encode_translation(
    record: Record, tokenizer: Tokenizer, target: Target, options: EncodeOptions, report: RowReport
) -> Encoded | None:
    """Encode a source text, and the target text as labels.

    Raises:
        DataError: The record is a document or has several turns, or is too long and `overlong` is "error".
    """
    completion = record.as_completion() if isinstance(record, Conversation) and record.is_instruction else record
    if not isinstance(completion, Completion):
        raise _unfit(record, "'source' and 'target', or a prompt and its completion")
    source = _tokens(record, (completion.prompt.strip(),), tokenizer, options, report)
    before = report.cut_rows
    answer = _tokens(record, (completion.completion,), tokenizer, options, report, is_target=True)
    if source is None or answer is None:
        return None
    report.cut_rows = min(report.cut_rows, before + 1)
    return Encoded(array(_TYPE, source["input_ids"]), array(_TYPE, answer["input_ids"]))


def _tokens(
    record: Record,
    texts: Sequence[str],
    tokenizer: Tokenizer,
    options: EncodeOptions,
    report: RowReport,
    *,
    offsets: bool = False,
    is_target: bool = False,
) -> dict[str, Any] | None:
    """Tokenize a text or a pair of texts, and count it if it is too long; None if it is to be left out."""
    call: Any = tokenizer
    given: dict[str, Any] = (
        {"text_target": texts[0]} if is_target else dict(zip(("text", "text_pair"), texts, strict=False))
    )
    given |= {"verbose": False} | ({"return_offsets_mapping": True} if offsets else {})
    try:
        found = call(**given)
    except NotImplementedError as cause:
        raise ModelError(
            f"{type(tokenizer).__name__} does not report the positions of tokens in the text, which tags need; use a "
            "model with a fast tokenizer (tokenizer.json).",
            what=type(tokenizer).__name__,
        ) from cause
    count = len(found["input_ids"])
    if count <= options.max_length:
        return dict(found)
    report.cut_rows += 1
    if options.overlong == "error":
        raise DataError(
            f"{location(record)}: the row has {count:,} tokens, but max_length is {options.max_length:,}; "
            "see --overlong.",
            where=location(record),
            field="overlong",
        )
    if options.overlong == "drop":
        return None
    return dict(call(**given, truncation=True, max_length=options.max_length))


def _unfit(record: Record, fields: str) -> DataError:
    text = f"{location(record)}: the row does not fit this task, which needs {fields}."
    return DataError(text, where=location(record), field="data")


LABELED = RowEncoder("labeled", encode_labeled, "row")
PAIRS = RowEncoder("pairs", encode_pair, "row")
TAGGED = RowEncoder("tagged", encode_tagged, "token")
TRANSLATIONS = RowEncoder("translations", encode_translation, "token")
