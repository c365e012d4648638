"""Encode labeled records as sequences, and count what is truncated or left out.

A sequence of these tasks has the tokens that the tokenizer makes of a text, including special tokens. Its labels are
the class of the row, the classes of the row, a score (as float64), a tag per token, or the tokens of the target text.
"""

from __future__ import annotations

import itertools
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lorakit.data import AnyRecords, Conversation, Encoded, Labeled, Record, Tagged, Tokenizer
from lorakit.data.encoding import IGNORED, too_long
from lorakit.data.encoding import Sequence as Row
from lorakit.data.records import Completion, content_key, is_empty, location, text_of_record
from lorakit.data.stored import sized
from lorakit.data.tokens import cut, text_of
from lorakit.durable import JsonValue
from lorakit.errors import ConfigError, DataError, ModelError
from lorakit.tasks.encoded_rows import ROWS, RowReport
from lorakit.tasks.target import Target, score_of
from lorakit.tasks.task import EncodeOptions

_TYPE = "i"


@dataclass(frozen=True)
class Work:
    """What the rows of a task are encoded with, and the counts, which are updated."""

    tokenizer: Tokenizer
    target: Target
    options: EncodeOptions
    report: RowReport


Encode = Callable[[Record, Work], "Row | None"]
"""Function that encodes a record and updates the counts; None leaves the record out.

It raises a DataError if the record is of another kind, or is too long and `overlong` is "error"."""


@dataclass(frozen=True)
class RowEncoder:
    """A way of encoding the rows of a task, with a name for the token cache.

    Attributes:
        unit: What contributes to the loss: "token" or "row".
        has_target_text: Whether labels are the tokens of another text.
    """

    name: str
    one: Encode
    unit: str
    has_target_text: bool = False


def encode_rows(
    records: AnyRecords, tokenizer: Tokenizer, target: Target, options: EncodeOptions, encoder: RowEncoder
) -> Encoded:
    """Encode records one by one, or take them from the token cache.

    Raises:
        ConfigError: `overlong` is "split", which these tasks do not support.
        DataError: A record does not fit the task, or nothing is left to train on.
    """
    if options.overlong == "split":
        raise ConfigError.of("overlong", "split", "truncate, drop or error, because labels belong to whole rows")
    if options.cache is None or options.visit is not None or not options.is_labeled:
        return _encoded(records, tokenizer, target, options, encoder)
    parts: list[JsonValue] = [encoder.name, target.as_dict(), target.note, options.inputs()]
    return options.cache.fetch(records, parts, lambda: _encoded(records, tokenizer, target, options, encoder), ROWS)


def encode_row(
    record: Record, tokenizer: Tokenizer, target: Target, options: EncodeOptions, encoder: RowEncoder
) -> list[Row]:
    """Encode one record as `encode_rows` does, uncounted; an empty list if it is left out.

    Raises:
        DataError: The record does not fit the task.
    """
    if is_empty(record):
        return []
    row = encoder.one(record, Work(tokenizer, target, options, RowReport(options.max_length, unit=encoder.unit)))
    return [] if row is None else [row]


def _encoded(
    records: AnyRecords, tokenizer: Tokenizer, target: Target, options: EncodeOptions, encoder: RowEncoder
) -> Encoded:
    notes, unit = [*records.notes, *([target.note] if target.note else [])], encoder.unit
    report = RowReport(options.max_length, unit=unit, overlong=options.overlong, notes=notes)
    report.shape, report.columns = records.shape, dict(records.columns)
    work = Work(tokenizer, target, options, report)
    rows, kept, record_of, seen, done = list[Row](), list[Record](), array("q"), set[bytes](), 0
    for number, (record, size) in enumerate(sized(records)):
        report.rows += 1
        key = content_key(record)
        seen.add(key)
        if options.visit is not None:
            options.visit(record, key)
        if is_empty(record) if options.is_labeled else not text_of_record(record).strip():
            report.empty_rows += 1
        else:
            row = encoder.one(record, work)
            if row is not None:
                rows.append(row)
                kept.append(record)
                record_of.append(number)
        done += size
        if options.watch is not None:
            options.watch(done)
    report.duplicate_rows = report.rows - len(seen)
    report.sequences = len(rows)
    report.tokens = sum(len(ids) for row in rows for ids in (row.input_ids, *row.others))
    report.trained_tokens = sum(_targets(row, unit) for row in rows)
    report.tokens += report.trained_tokens if encoder.has_target_text else 0
    is_named = bool(target.names) and options.is_labeled
    counts = Counter(label for row in rows for label in row.labels if label != IGNORED) if is_named else Counter()
    report.labels = {target.names[number]: count for number, count in counts.most_common()}
    if not report.trained_tokens and options.is_labeled:
        raise DataError(
            f"No row contributes to the loss (rows: {report.rows:,}; {report.empty_rows:,} empty; {report.cut_rows:,} "
            "too long). Check the data, or increase --max-length.",
            field="data",
        )
    groups = itertools.groupby(kept, key=lambda record: record.source)
    sources = tuple((source, sum(1 for _ in group)) for source, group in groups)
    return Encoded(rows, report, record_of, sources, kept)


def _targets(row: Row, unit: str) -> int:
    return 1 if unit == "row" else len(row.labels) - row.labels.count(IGNORED)


def encode_labeled(record: Record, work: Work) -> Row | None:
    """Encode a text or a pair of texts with its label."""
    if not isinstance(record, Labeled):
        raise _unfit(record, "'text' and 'label'")
    tokens = _tokens(record, record.texts[:2], work)
    if tokens is None:
        return None
    types = tokens.get("token_type_ids")
    return Row(
        array(_TYPE, tokens["input_ids"]),
        labels_of(record, work.target) if work.options.is_labeled else array(_TYPE),
        types=array(_TYPE, types) if types and any(types) else None,
        pieces=tokens["pieces"],
    )


def labels_of(record: Labeled, target: Target) -> array[Any]:
    """Return the labels of a row: the ids of its classes, or its score.

    Raises:
        DataError: The row has no label, the label is not one of the target's classes, or it is not a number.
    """
    return array("d", [score_of(record)]) if target.kind == "score" else array(_TYPE, target.ids_of(record))


def encode_pair(record: Record, work: Work) -> Row | None:
    """Encode the texts of a row separately, with the row's score if it has one."""
    if not isinstance(record, Labeled):
        raise _unfit(record, "'anchor' and 'positive', or 'sentence1', 'sentence2' and 'score'")
    before = work.report.cut_rows
    texts = [_tokens(record, (work.options.prompt + text,), work) for text in record.texts]
    work.report.cut_rows = min(work.report.cut_rows, before + 1)
    first, *others = [None if one is None else array(_TYPE, one["input_ids"]) for one in texts]
    if first is None or None in others:
        return None
    scored = work.target.kind == "score" and work.options.is_labeled
    score: array[Any] = array("d", [score_of(record)] if scored else [])
    pieces = tuple(part for one in texts if one is not None for part in one["pieces"])
    return Row(first, score, others=tuple(ids for ids in others if ids is not None), pieces=pieces)


def encode_tagged(record: Record, work: Work) -> Row | None:
    """Encode the words of a row, joined by spaces; the first token of each word has the word's tag.

    In a row to predict, the first token of each word has the index of the word. A word that was truncated has no token.
    A ModelError means that the tokenizer does not report offsets.
    """
    if not isinstance(record, Tagged):
        raise _unfit(record, "'tokens' and 'tags'")
    tokens = _tokens(record, (" ".join(record.words),), work, offsets=True)
    if tokens is None:
        return None
    tags = work.target.ids_of(record) if work.options.is_labeled else range(len(record.words))
    labels = array(_TYPE, [IGNORED]) * len(tokens["input_ids"])
    places = word_tokens(record.words, tokens["offset_mapping"])
    if "kept" in tokens:
        places = [tokens["kept"].get(place) for place in places]
    for place, tag in zip(places, tags, strict=True):
        if place is not None:
            labels[place] = tag
    work.report.cut_words += places.count(None)
    if work.options.is_labeled and all(place is None for place in places):
        return None
    return Row(array(_TYPE, tokens["input_ids"]), labels, pieces=tokens["pieces"])


def word_tokens(words: Sequence[str], offsets: Sequence[tuple[int, int]]) -> list[int | None]:
    """Return the index of the first token of each word in words joined by spaces; None if the word has no token.

    `offsets` are the first and last character of each token; equal for special tokens.
    """
    places, at, begin = list[int | None](), 0, 0
    for word in words:
        end = begin + len(word)
        while at < len(offsets) and (offsets[at][1] <= begin or offsets[at][0] == offsets[at][1]):
            at += 1
        # a token may begin with the space before the word, so its end decides to which word it belongs
        places.append(at if word and at < len(offsets) and offsets[at][0] < end else None)
        begin = end + 1
    return places


def encode_translation(record: Record, work: Work) -> Row | None:
    """Encode a source text, and the target text as labels; a ModelError if the tokenizer lacks its language."""
    completion = record.as_completion() if isinstance(record, Conversation) and record.is_instruction else record
    if not isinstance(completion, Completion):
        raise _unfit(record, "'source' and 'target', or a prompt and its completion")
    before = work.report.cut_rows
    source = _tokens(record, (completion.prompt.strip(),), work)
    answer: dict[str, Any] | None = {"input_ids": [], "pieces": ()}
    if work.options.is_labeled or completion.completion:
        answer = _tokens(record, (completion.completion,), work, is_target=True)
    work.report.cut_rows = min(work.report.cut_rows, before + 1)
    if source is None or answer is None:
        return None
    pieces = (*source["pieces"], *answer["pieces"])
    return Row(array(_TYPE, source["input_ids"]), array(_TYPE, answer["input_ids"]), pieces=pieces)


def _tokens(
    record: Record, texts: Sequence[str], work: Work, *, offsets: bool = False, is_target: bool = False
) -> dict[str, Any] | None:
    """Tokenize a text or a pair of texts, and count it if it is too long; None if it is to be left out.

    `pieces` has a list with the text of each token (empty without offsets), or none if rows are not shown. Offsets are
    those before truncation; see `_kept`.
    """
    options = work.options
    tokenizer: Any = work.tokenizer
    offsets = offsets or (options.shown is not None and getattr(tokenizer, "is_fast", False))
    arguments: dict[str, Any] = (
        {"text_target": texts[0]} if is_target else dict(zip(("text", "text_pair"), texts, strict=False))
    )
    arguments |= {"verbose": False} | ({"return_offsets_mapping": True} if offsets else {})
    try:
        tokens = tokenizer(**arguments)
    except NotImplementedError as cause:
        raise ModelError(
            f"{type(tokenizer).__name__} does not report the positions of tokens in the text, which tags need; use a "
            "model with a fast tokenizer (tokenizer.json).",
            what=type(tokenizer).__name__,
        ) from cause
    except KeyError as cause:
        if getattr(tokenizer, "tgt_lang", "") is not None:
            raise
        text = (
            f"{type(tokenizer).__name__} marks each text with its language, but names no language of the targets; set "
            '"src_lang" and "tgt_lang" in tokenizer_config.json.'
        )
        raise ModelError(text, what=type(tokenizer).__name__, field="tgt_lang") from cause
    count = len(tokens["input_ids"])
    kept = tokens
    if count > options.max_length:
        work.report.cut_rows += 1
        if options.overlong == "error":
            raise too_long(record, count, options.max_length)
        if options.overlong == "drop":
            return None
        kept = tokenizer(**arguments, truncation=True, max_length=options.max_length)
        if offsets:
            kept |= {"offset_mapping": tokens["offset_mapping"], "kept": _kept(tokenizer, tokens, kept)}
    return {**kept, "pieces": () if options.shown is None else (_pieces(tokenizer, texts, tokens, kept),)}


def _kept(tokenizer: Any, whole: Any, kept: Any) -> dict[int | None, int]:
    """Return a dict from the position of a token of the text to its position after truncation, if it is left."""
    before, after = ([at for at, one in enumerate(row.sequence_ids()) if one == 0] for row in (whole, kept))
    dropped = len(before) - len(after) if tokenizer.truncation_side == "left" else 0
    return dict(zip(before[dropped:], after, strict=False))


def _pieces(tokenizer: Any, texts: Sequence[str], whole: Any, kept: Any) -> list[str]:
    """Return the text of each token of `kept` as it is written, or nothing without offsets, which `whole` has."""
    if "offset_mapping" not in whole:
        return []
    remaining = []
    for number, text in enumerate(texts):
        positions = [at for at, one in enumerate(whole.sequence_ids()) if one == number]
        ids, spans = ([whole[name][at] for at in positions] for name in ("input_ids", "offset_mapping"))
        dropped = len(positions) - kept.sequence_ids().count(number) if tokenizer.truncation_side == "left" else 0
        remaining.append(iter(cut(tokenizer, text, ids, spans)[dropped:]))
    rows = zip(kept["input_ids"], kept.sequence_ids(), strict=True)
    return [text_of(tokenizer, [token]) if number is None else next(remaining[number]) for token, number in rows]


def _unfit(record: Record, fields: str) -> DataError:
    text = f"{location(record)}: the row does not fit this task, which needs {fields}."
    return DataError(text, where=location(record), field="data")


LABELED = RowEncoder("labeled", encode_labeled, "row")
PAIRS = RowEncoder("pairs", encode_pair, "row")
TAGGED = RowEncoder("tagged", encode_tagged, "token")
TRANSLATIONS = RowEncoder("translations", encode_translation, "token", has_target_text=True)
