"""Measure the quality of training data: lengths, duplicates, leaks into the evaluation data, and unusual characters."""

from __future__ import annotations

import itertools
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from lorakit.data.encoding import IGNORED, Overlong, encode, lengths
from lorakit.data.loader import Split
from lorakit.data.records import Document, Record, content_key, is_empty, location, text_of_record
from lorakit.data.report import DataReport
from lorakit.data.stored import AnyRecords
from lorakit.data.tokens import Tokenizer, text_of
from lorakit.durable import JsonObject
from lorakit.errors import MissingExtra
from lorakit.tables import format_count, format_percent

MOST_COMPARED = 20_000
"""Number of rows that are compared for near duplicates; more rows are sampled at equal intervals."""

SIMILARITY = 0.8
"""Estimated Jaccard similarity of two rows' word 5-grams from which they count as near duplicates."""

_PERMUTATIONS, _WORDS = 64, 5

UNUSUAL = {"Cc": "control characters", "Co": "private-use characters", "Cn": "unassigned characters"}
"""Unicode category -> name in messages; line feeds, carriage returns and tabs are not counted."""

_REPLACEMENT = "replacement characters (U+FFFD)"


@dataclass(frozen=True)
class Token:
    """Adjacent tokens of a row that decode to whole characters.

    Attributes:
        text: The text.
        is_trained: Whether the tokens contribute to the loss.
    """

    text: str
    is_trained: bool


@dataclass(frozen=True)
class Quality:
    """The result of `measure`.

    Attributes:
        report: Row and token counts.
        histogram: (length, rows) pairs: the number of sequences with at most `length` tokens and more than in the
            previous pair.
        compared: Number of distinct, nonempty rows that were compared for near duplicates.
        near_duplicates: Number of compared rows that are similar to an earlier one.
        leaks: Locations of training rows whose content is also in the evaluation data.
        unusual: Kind of unusual character -> number of rows that contain such characters.
        examples: The first sequences as tokens.
    """

    report: DataReport
    histogram: tuple[tuple[int, int], ...] = ()
    compared: int = 0
    near_duplicates: int = 0
    leaks: tuple[str, ...] = ()
    unusual: dict[str, int] = field(default_factory=dict)
    examples: tuple[tuple[Token, ...], ...] = ()

    def as_dict(self) -> JsonObject:
        """Return all results as plain JSON values."""
        return {**asdict(self), "report": self.report.as_dict()}

    def warnings(self) -> list[str]:
        """Return a line of text for each problem; no problem here stops a run."""
        report, lines = self.report, list[str]()
        unended = report.rows - report.empty_rows - report.dropped_rows - report.ended_rows
        if unended > 0 and report.ended_rows:
            lines.append(f"{format_count(unended, 'row')} without an end marker that contributes to the loss.")
        if self.near_duplicates:
            share = format_percent(self.near_duplicates / self.compared, 1)
            lines.append(
                f"{format_count(self.near_duplicates, 'near duplicate')} among {self.compared:,} compared rows "
                f"({share}): at least {SIMILARITY:.0%} of their word {_WORDS}-grams are the same."
            )
        if self.leaks:
            lines.append(
                f"{format_count(len(self.leaks), 'training row')} also in the evaluation data, the first at "
                f"{self.leaks[0]}; the evaluation loss is too low."
            )
        lines += [f"{format_count(count, 'row')} with {name}." for name, count in self.unusual.items()]
        return lines


def measure(
    parts: Split, tokenizer: Tokenizer, max_length: int, examples: int = 1, overlong: Overlong = "truncate"
) -> Quality:
    """Encode the training data and measure its quality.

    Args:
        parts: Training and evaluation records.
        tokenizer: A transformers tokenizer.
        max_length: Maximum sequence length in tokens.
        examples: Number of sequences to return as tokens.
        overlong: What to do with rows that are too long; see `encode`.

    Raises:
        DataError: No token contributes to the loss, or a record cannot be rendered or reread.
        MissingExtra: The package `datasketch` is not installed.
    """
    encoded = encode(parts.train, tokenizer, max_length, overlong=overlong)
    shown = [tuple(tokens_of(row.input_ids, row.labels, tokenizer)) for row in encoded.sequences[:examples]]
    compared, near = _near_duplicates(parts.train)
    held_out = {content_key(record) for record in parts.held_out}
    train = parts.train if held_out else ()
    leaks = tuple(location(record) for record in train if content_key(record) in held_out)
    sizes = _histogram(lengths(encoded.sequences), max_length)
    return Quality(encoded.report, sizes, compared, near, leaks, _unusual(parts.train), tuple(shown))


def tokens_of(ids: Sequence[int], labels: Sequence[int], tokenizer: Tokenizer) -> Iterator[Token]:
    """Yield the tokens of a sequence; tokens that form one character together are joined.

    Args:
        ids: Token ids.
        labels: Labels of the same length; -100 at positions that do not contribute to the loss.
        tokenizer: The tokenizer that made them.
    """
    for is_trained, group in itertools.groupby(zip(ids, labels, strict=True), key=lambda pair: pair[1] != IGNORED):
        held: list[int] = []
        for token, _ in group:
            held.append(token)
            text = text_of(tokenizer, held)
            if "\ufffd" not in text:
                yield Token(text, is_trained)
                held = []
        if held:
            yield Token(text_of(tokenizer, held), is_trained)


def _near_duplicates(records: AnyRecords) -> tuple[int, int]:
    """Return the number of compared distinct rows, and the number of them that are similar to an earlier row."""
    try:
        from datasketch import MinHash, MinHashLSH
    except ImportError as cause:
        text = "finding near duplicates needs the package datasketch: pip install 'lorakit[data]'"
        raise MissingExtra(text, what="datasketch") from cause
    step = -(-len(records) // MOST_COMPARED) if len(records) else 1
    index: Any = MinHashLSH(threshold=SIMILARITY, num_perm=_PERMUTATIONS)
    seen = set[bytes]()
    compared = near = 0
    for record in itertools.islice(records, 0, None, step):
        key = content_key(record)
        if key in seen or is_empty(record):  # both are counted elsewhere
            continue
        seen.add(key)
        (hashed,) = MinHash.bulk([_shingles(text_of_record(record))], num_perm=_PERMUTATIONS)
        compared += 1
        if index.query(hashed):
            near += 1
        else:  # one row of a group is enough, and keeps the comparison fast
            index.insert(compared, hashed)
    return compared, near


def _shingles(text: str) -> set[bytes]:
    words = text.lower().split()
    return {" ".join(words[at : at + _WORDS]).encode() for at in range(max(1, len(words) - _WORDS + 1))}


def _histogram(sizes: Sequence[int], max_length: int) -> tuple[tuple[int, int], ...]:
    """Return counts of lengths up to each power of two, and up to the maximum."""
    bounds = [bound for bound in (2**power for power in range(4, 40)) if bound < max_length] + [max_length]
    counts = Counter(next(bound for bound in bounds if size <= bound) for size in sizes)
    return tuple((bound, counts[bound]) for bound in bounds if counts[bound])


def _unusual(records: Iterable[Record]) -> dict[str, int]:
    """Return a dict from each kind of unusual character to the number of records that contain such characters."""
    counts = Counter[str]()
    for record in records:
        pieces = record.pieces() if isinstance(record, Document) else iter([text_of_record(record)])
        seen = {character for piece in pieces for character in set(piece)} - set("\n\r\t")
        kinds = {UNUSUAL.get(unicodedata.category(character)) for character in seen if not character.isprintable()}
        counts.update(kind for kind in kinds if kind is not None)
        counts.update([_REPLACEMENT] if "\ufffd" in seen else [])
    return dict(counts)
