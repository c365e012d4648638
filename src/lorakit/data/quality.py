"""Measure the quality of training data: lengths, duplicates, leaks into the evaluation data, and unusual characters."""

from __future__ import annotations

import importlib.util
import itertools
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Many
from dataclasses import asdict, dataclass, field, replace
from html import escape
from pathlib import Path
from typing import Any, TypeAlias

from lorakit.data.encoding import IGNORED, Encoded, Sequence, lengths
from lorakit.data.records import Document, Record, content_key, is_empty, location, text_of_record
from lorakit.data.report import DataReport, Report
from lorakit.data.splitting import Split
from lorakit.data.tokens import Tokenizer, text_of
from lorakit.durable import JsonObject, write_text
from lorakit.errors import printable
from lorakit.tables import format_count, format_percent

MOST_COMPARED = 20_000
"""Number of rows that are compared for near duplicates; more rows are sampled at equal intervals."""

SIMILARITY = 0.8
"""Estimated Jaccard similarity of two rows' word 5-grams from which they count as near duplicates."""

_PERMUTATIONS, _WORDS = 64, 5

UNUSUAL = {"Cc": "control characters", "Co": "private-use characters", "Cn": "unassigned characters"}
"""Unicode category -> name in messages; line feeds, carriage returns and tabs are not counted."""

_NO_DATASKETCH = "Near duplicates were not counted: this needs the package datasketch (pip install 'lorakit[data]')."

_REPLACEMENT = "replacement characters (U+FFFD)"


@dataclass(frozen=True)
class Token:
    """Adjacent tokens of a row that are whole characters, as they are written; `count` is 0 for other text."""

    text: str
    is_trained: bool
    count: int = 0


Visit: TypeAlias = Callable[[Record, bytes], None]
"""Function that is called with each record and its content key."""


@dataclass(frozen=True)
class Quality:
    """The result of `measure`.

    Attributes:
        histogram: (length, rows) pairs: the number of sequences with at most `length` tokens and more than in the
            previous pair.
        compared: Number of distinct, nonempty rows that were compared for near duplicates.
        near_duplicates: Number of compared rows that are similar to an earlier one.
        near_leaks: Locations of compared rows that are similar, but not equal, to a row of the evaluation data.
        leaks: Locations of training rows whose content is also in the evaluation data.
        unusual: Kind of unusual character -> number of rows that contain such characters.
        examples: The first sequences as tokens.
        notes: Messages for the user about what was not measured.
    """

    report: Report
    histogram: tuple[tuple[int, int], ...] = ()
    compared: int = 0
    near_duplicates: int = 0
    near_leaks: tuple[str, ...] = ()
    leaks: tuple[str, ...] = ()
    unusual: dict[str, int] = field(default_factory=dict)
    examples: tuple[tuple[Token, ...], ...] = ()
    notes: tuple[str, ...] = ()

    def as_dict(self) -> JsonObject:
        """Return all results as plain JSON values."""
        return {**asdict(self), "report": self.report.as_dict()}

    def warnings(self) -> list[str]:
        """Return a line of text for each problem; no problem here stops a run."""
        report, lines = self.report, list[str]()
        if isinstance(report, DataReport):
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
        if self.near_leaks:
            lines.append(
                f"{format_count(len(self.near_leaks), 'compared training row')} nearly the same as a row in the "
                f"evaluation data, the first at {self.near_leaks[0]}; the evaluation loss may be too low."
            )
        lines += [f"{format_count(count, 'row')} with {name}." for name, count in self.unusual.items()]
        return lines


def measure(
    parts: Split,
    tokenizer: Tokenizer,
    max_length: int,
    encode: Callable[[Visit], Encoded],
    show: Callable[[Record, int], Iterable[Sequence]],
    examples: int = 1,
    names: Many[str] = (),
) -> Quality:
    """Encode the training data and measure its quality.

    Args:
        parts: Training and evaluation records.
        tokenizer: A transformers tokenizer.
        max_length: Maximum sequence length in tokens.
        encode: Function that encodes the training records, and calls the given function with each record and its key.
        show: Function that returns the first sequences of a record, at most the given number, with their text.
        examples: Number of sequences to return as tokens.
        names: Names of the classes, if rows are classified.

    Raises:
        DataError: No token contributes to the loss, or a record cannot be rendered or reread.
    """
    scan, shown = _Scan(parts), list[Sequence]()

    def visit(record: Record, key: bytes) -> None:
        scan.add(record, key)
        if len(shown) < examples:
            shown.extend(show(record, examples - len(shown)))

    encoded = encode(visit)
    near = scan.near
    return Quality(
        encoded.report,
        histogram=_histogram(lengths(encoded.sequences), max_length),
        compared=0 if near is None else near.compared,
        near_duplicates=0 if near is None else near.duplicates,
        near_leaks=() if near is None else tuple(near.leaks),
        leaks=tuple(scan.leaks),
        unusual=dict(scan.unusual),
        examples=tuple(tuple(shown_tokens(row, tokenizer, names)) for row in shown),
        notes=(_NO_DATASKETCH,) if near is None else (),
    )


class _Scan:
    """Counts of what training rows contain, updated row by row, as in `Quality`; evaluation rows are read first.

    `near` is the comparison for near duplicates, or None if the package `datasketch` is not installed.
    """

    def __init__(self, parts: Split) -> None:
        self.leaks = list[str]()
        self.unusual = Counter[str]()
        self.near = None if importlib.util.find_spec("datasketch") is None else _NearDuplicates()
        self._rows, self._step = 0, -(-len(parts.train) // MOST_COMPARED) if parts.train else 1
        self._held_out = set[bytes]()
        held_out_step = -(-len(parts.held_out) // MOST_COMPARED) if parts.held_out else 1
        for number, record in enumerate(parts.held_out):
            key = content_key(record)
            if self.near is not None and key not in self._held_out and number % held_out_step == 0:
                self.near.hold_out(record)
            self._held_out.add(key)

    def add(self, record: Record, key: bytes) -> None:
        """Update the counts."""
        if key in self._held_out:
            self.leaks.append(location(record))
        if self.near is not None and self._rows % self._step == 0:
            self.near.add(record, key, is_leak=key in self._held_out)
        self._rows += 1
        self.unusual.update(_unusual(record))


def shown_tokens(row: Sequence, tokenizer: Tokenizer, names: Many[str] = ()) -> Iterator[Token]:
    """Yield the tokens of a row; labels that do not belong to single tokens follow as text."""
    ids, pieces = row.input_ids, iter(row.pieces)
    is_target = len(row.pieces) > 1 + len(row.others)  # labels may have as many tokens as the text
    if len(row.labels) == len(ids) and not (row.others or names or is_target):
        yield from tokens_of(ids, row.labels, tokenizer, next(pieces, ()))
        return
    for part in (ids, *row.others):
        yield from tokens_of(part, [IGNORED] * len(part), tokenizer, next(pieces, ()))
        yield Token(" ", False)
    values = [label for label in row.labels if label != IGNORED]
    if names:
        yield Token(", ".join(names[label] for label in values), True)
    elif row.labels.typecode == "d":
        yield Token(", ".join(f"{score:g}" for score in values), True)
    elif values:
        yield from tokens_of(values, values, tokenizer, next(pieces, ()))


def row_title(number: int, tokens: Iterable[Token]) -> str:
    """Return the number of a row with its number of tokens and, if labels belong to tokens, of those with loss."""
    counts = [(token.count, token.is_trained) for token in tokens]
    total, trained = sum(count for count, _ in counts), sum(count for count, is_trained in counts if is_trained)
    return f"Row {number}: {format_count(total, 'token')}" + (f", {trained:,} with loss" if trained else "")


def marked(tokens: Iterable[Token], most: int | None = None) -> str:
    """Return the text of a row with brackets around the parts with loss, each shortened to `most` characters."""
    text = ""
    for is_trained, group in itertools.groupby(tokens, key=lambda token: token.is_trained):
        part = printable("".join(token.text for token in group))
        if most is not None and len(part) > most:
            part = f"{part[: most * 2 // 3]} … {part[-(most // 3) :]}"
        text += f"[{part}]" if is_trained and part else part
    return text


def tokens_of(ids: Many[int], labels: Many[int], tokenizer: Tokenizer, pieces: Many[str] = ()) -> Iterator[Token]:
    """Yield the tokens of a sequence; tokens that form one character together are joined.

    `pieces` has the text of each token as it is written; if it is empty, tokens are decoded.
    """
    if pieces:
        yield from _joined(pieces, [label != IGNORED for label in labels])
        return
    before, pending, is_trained = list[int](), list[int](), False
    for token, label in zip(ids, labels, strict=True):
        if pending and is_trained != (label != IGNORED):  # an incomplete character that crosses the border
            yield Token(_text_after(before, pending, tokenizer), is_trained, len(pending))
            before, pending = pending, []
        is_trained = label != IGNORED
        pending.append(token)
        text = _text_after(before, pending, tokenizer)
        if not text.endswith("\ufffd"):
            yield Token(text, is_trained, len(pending))
            before, pending = pending, []
    if pending:
        yield Token(_text_after(before, pending, tokenizer), is_trained, len(pending))


def _joined(pieces: Many[str], trained: Many[bool]) -> Iterator[Token]:
    """Yield tokens with their texts; tokens within one character, such as an emoji of several, are joined."""
    merged: Token | None = None
    for piece, is_trained in zip(pieces, trained, strict=True):
        if merged is not None and merged.is_trained == is_trained and _continues(merged.text, piece):
            merged = replace(merged, text=merged.text + piece, count=merged.count + 1)
            continue
        if merged is not None:
            yield merged
        merged = Token(piece, is_trained, 1)
    if merged is not None:
        yield merged


_JOINER = "\u200d"
_TONES = frozenset(map(chr, range(0x1F3FB, 0x1F400)))


def _continues(before: str, piece: str) -> bool:
    """Return whether a piece begins within a character that the text before it begins."""
    begin = piece[:1]
    is_joined = begin in _TONES or _JOINER in (begin, before[-1:])
    return not begin or is_joined or unicodedata.category(begin).startswith("M")


def _text_after(before: list[int], tokens: list[int], tokenizer: Tokenizer) -> str:
    """Decode tokens in the context of the tokens before them, on which the spaces between words depend."""
    if not before:
        return text_of(tokenizer, tokens)
    context, both = text_of(tokenizer, before), text_of(tokenizer, before + tokens)
    return both[len(context) :] if both.startswith(context) else text_of(tokenizer, tokens)


class _NearDuplicates:
    """A comparison of rows by MinHash; identical and empty rows, which are counted elsewhere, are not compared."""

    def __init__(self) -> None:
        from datasketch import MinHash, MinHashLSH

        self.compared = self.duplicates = 0
        self.leaks = list[str]()
        self._hashed: Callable[[Record], Any] = lambda record: MinHash.bulk(
            [_shingles(text_of_record(record))], num_perm=_PERMUTATIONS
        )[0]
        self._train, self._held_out = (MinHashLSH(threshold=SIMILARITY, num_perm=_PERMUTATIONS) for _ in range(2))
        self._seen, self._held = set[bytes](), 0

    def hold_out(self, record: Record) -> None:
        """Add an evaluation row."""
        if not is_empty(record):
            self._held += 1
            self._held_out.insert(self._held, self._hashed(record))

    def add(self, record: Record, key: bytes, *, is_leak: bool) -> None:
        """Compare a training row, given its content key and whether an evaluation row has the same content."""
        if key in self._seen or is_empty(record):
            return
        self._seen.add(key)
        hashed = self._hashed(record)
        self.compared += 1
        if self._held and not is_leak and self._held_out.query(hashed):
            self.leaks.append(location(record))
        if self._train.query(hashed):
            self.duplicates += 1
        else:  # one row of a group is enough, and keeps the comparison fast
            self._train.insert(self.compared, hashed)


def _shingles(text: str) -> set[bytes]:
    words = text.lower().split()
    return {" ".join(words[at : at + _WORDS]).encode() for at in range(max(1, len(words) - _WORDS + 1))}


def _histogram(sizes: Many[int], max_length: int) -> tuple[tuple[int, int], ...]:
    """Return counts of lengths up to each power of two, and up to the maximum."""
    bounds = [bound for bound in (2**power for power in range(4, 40)) if bound < max_length] + [max_length]
    counts = Counter(next(bound for bound in bounds if size <= bound) for size in sizes)
    return tuple((bound, counts[bound]) for bound in bounds if counts[bound])


def _unusual(record: Record) -> set[str]:
    """Return the kinds of unusual characters in a record."""
    pieces = record.pieces() if isinstance(record, Document) else iter([text_of_record(record)])
    seen = {character for piece in pieces for character in set(piece)} - set("\n\r\t")
    kinds = {UNUSUAL.get(unicodedata.category(character)) for character in seen if not character.isprintable()}
    return {kind for kind in (*kinds, _REPLACEMENT if "\ufffd" in seen else None) if kind is not None}


_STYLE = """
:root { color-scheme: light dark; --loss: #b7ebc6; --ink: #1b1f24; --paper: #fff; --line: #d0d7de; --bar: #57a773 }
@media (prefers-color-scheme: dark) {
  :root { --loss: #1f5131; --ink: #e6edf3; --paper: #0d1117; --line: #30363d; --bar: #3fb950 }
}
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 0 auto; padding: 1rem;
  max-width: 60rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.1rem; margin-top: 2rem }
h3 { font-size: .9rem; font-weight: 600; margin: 1rem 0 -.4rem }
table { border-collapse: collapse; width: 100%; max-width: 36rem }
td, th { padding: .15rem .75rem .15rem 0; text-align: right; white-space: nowrap }
td:last-child { width: 100%; text-align: left }
td { font-variant-numeric: tabular-nums }
.bar { display: inline-block; height: .8em; background: var(--bar); min-width: 2px }
.row { font: 14px/1.7 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere;
  border: 1px solid var(--line); border-radius: .4rem; padding: .75rem; margin: .75rem 0 }
.row span { border-radius: .2rem; box-shadow: inset 0 -1px var(--line) }
.loss { background: var(--loss) }
.warning { border-left: .3rem solid #d4a72c; padding-left: .6rem }
"""


def write_page(path: Path, files: Many[str], quality: Quality, note: str) -> None:
    """Write the page; it makes no network requests and needs no scripts.

    Raises:
        DiskError: The file cannot be written.
    """
    title = escape(printable(", ".join(files), one_line=True))
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>Data: {title}</title><style>{_STYLE}</style></head><body>",
        f"<h1>Data: {title}</h1>",
        *(f"<p>{escape(printable(line))}</p>" for line in [*quality.report.lines(), note, *quality.notes]),
        *(f'<p class="warning">{escape(printable(line))}</p>' for line in quality.warnings()),
        "<h2>Lengths</h2>",
        _bars(quality),
        "<h2>Rows</h2>",
        '<p>Tokens on a <span class="loss">colored background</span> contribute to the loss.</p>',
        *(_page_row(number, tokens) for number, tokens in enumerate(quality.examples, start=1)),
        "</body></html>",
    ]
    write_text(path, "\n".join(parts) + "\n")


def _bars(quality: Quality) -> str:
    most = max((count for _, count in quality.histogram), default=1)
    rows = [
        f"<tr><td>{size:,}</td><td>{count:,}</td>"
        f'<td><span class="bar" style="width: {100 * count / most:.1f}%"></span></td></tr>'
        for size, count in quality.histogram
    ]
    head = "<tr><th>up to (tokens)</th><th>sequences</th><th></th></tr>"
    return f"<table>{head}{''.join(rows)}</table>"


def _page_row(number: int, tokens: Many[Token]) -> str:
    spans = (
        f"<span{' class=loss' if token.is_trained else ''}>{escape(printable(token.text))}</span>" for token in tokens
    )
    return f'<h3>{row_title(number, tokens)}</h3><div class="row">{"".join(spans)}</div>'
