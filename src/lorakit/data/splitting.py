"""Hold out data for evaluation: rows or groups of rows, or the end of a single document.

Which rows are held out depends on their content and a seed, and not on their order. Rows with the same content always
end up in the same part, so no training text is also used for evaluation. The labels of the evaluation rows have the
proportions of all rows, as far as groups allow.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping
from collections.abc import Sequence as Many
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

from lorakit.data.records import KEY_BYTES, Document, Labeled, Record, Records, content_key, keys_of
from lorakit.data.stored import AnyRecords, StoredRecords
from lorakit.errors import ConfigError, DataError
from lorakit.tables import format_count, format_percent

DEFAULT_FRACTION = 0.05
"""Fraction of the rows to hold out by default, unless that is fewer than `LEAST_ROWS`."""

LEAST_ROWS = 20
"""Number of rows to hold out by default from at least `LARGEST_FRACTION` times as many."""

LARGEST_FRACTION = 0.2
"""Largest fraction to hold out by default."""

LEAST_CHARACTERS = 20_000
"""Number of characters to hold out by default of a single document, within the same fractions."""

SHORTEST_DOCUMENT = 1_000
"""Minimum length of a single document whose end is held out, in characters."""


Entry: TypeAlias = Mapping[Hashable, int]
"""Label -> number of distinct rows with this label in a unit."""


STRATIFIED = "stratified"
"""Name of the rule by which rows are held out, in `run.json`; a resumed run must repeat it."""


@dataclass(frozen=True, slots=True)
class Split:
    """Records for training and for evaluation, in input order, and the rule by which they were selected, or "".

    The note says how many records were held out, or why none were.
    """

    train: AnyRecords
    held_out: AnyRecords
    note: str
    rule: str = field(default="", kw_only=True)

    def training_records(self) -> Iterable[Record]:
        """Return all training records; those of a stream are read from their files."""
        return self.train

    def digests(self) -> dict[str, str]:
        """Return a dict from the path or name of each file to a SHA-256 of its content; records in memory have none."""
        stored = [part for part in (self.train, self.held_out) if isinstance(part, StoredRecords)]
        return {name: digest for part in stored for name, digest in part.digests().items()}


def check_rule(name: str | None) -> None:
    """Raise a DataError if rows are held out by another rule than that of a run, given its name in `run.json`."""
    if name not in (None, STRATIFIED):
        text = (
            f"the run holds out rows by the rule {name!r}, which this version of lorakit lacks; resume it with the "
            "version in its run.json, or start again with another --output-dir."
        )
        raise DataError(text, what=name, field="eval_fraction", allowed=(STRATIFIED,))


def split(records: Iterable[Record], fraction: float | None = None, seed: int = 0) -> Split:
    """Hold out rows for evaluation, or the end of a single document.

    At least one row is held out if there are two or more distinct ones, and every label that occurs more than once
    stays in the training data. `fraction`, in [0, 1), is that of the distinct records, or of the characters of a single
    document. None selects `DEFAULT_FRACTION`, or up to `LARGEST_FRACTION` of data that would otherwise give fewer than
    `LEAST_ROWS` rows (`LEAST_CHARACTERS` characters).

    Raises:
        ConfigError: The fraction is outside [0, 1).
    """
    if fraction is not None and not 0 <= fraction < 1:
        raise ConfigError.of("eval_fraction", fraction, f"in [0, 1), such as {DEFAULT_FRACTION}")
    everything = records if isinstance(records, AnyRecords) else Records(records)
    if fraction == 0:
        return Split(everything, Records(), "No data is held out for evaluation (eval_fraction is 0).")
    rows = _Rows.of(everything, str(seed))
    if len(rows.entries) < 2:
        return (
            _cut(everything, fraction)
            if rows.are_documents
            else _nothing(everything, f"the data is a single {rows.noun}")
        )
    is_held, strata = rows.held_out(fraction)
    if not is_held.any():
        return _nothing(everything, "each group has all rows of a label, which would not be trained")
    train = everything.some(np.flatnonzero(~is_held), everything.notes)
    held_out = everything.some(np.flatnonzero(is_held))
    verb = "is" if len(held_out) == 1 else "are"
    total = format_count(len(everything), rows.noun)
    if rows.has_groups:
        count = len(np.unique(rows.unit_of[is_held]))
        total += f" ({count:,} of {format_count(len(rows.entries), 'group')})"
    how = ", stratified by label" if strata > 1 else ""
    return Split(
        train,
        held_out,
        f"{len(held_out):,} of {total} {verb} held out for evaluation (seed {seed}{how}).",
        rule=STRATIFIED,
    )


def _nothing(everything: AnyRecords, reason: str) -> Split:
    note = f"No data is held out for evaluation: {reason}. Pass --eval-data to evaluate on other data."
    return Split(everything, Records(), note)


def few_rows(count: int, is_classified: bool, remedy: str) -> str:
    """Return a warning about what few evaluation rows can show, or "" if there are at least `LEAST_ROWS`.

    The standard error of the mean over n rows is s/√n, where s is the standard deviation of a row, and an interval of
    95% reaches 1.96 standard errors to each side. Of right and wrong answers, s is at most 1/2.
    """
    if count >= LEAST_ROWS or count < 1:
        return ""
    width = 1.96 / math.sqrt(count)
    shown = "1 row shows" if count == 1 else f"{count} rows show"
    what = f"an accuracy near 50% is known to ±{format_percent(min(width / 2, 0.5), 0)}"
    if not is_classified:
        what = f"the mean loss is known to ±{width:.1f} standard deviations of the loss of a row"
    return f"warning: {shown} little: {what} (95% interval). {remedy}"


@dataclass(frozen=True)
class _Rows:
    """The rows of a data set, and the units that must not be divided: rows of one content or of one group.

    Attributes:
        unit_of: Number of the unit of each record, shape (records,).
        entries: The labels of each unit, in the order in which units are held out, which the seed determines.
        noun: What a record is, for messages.
    """

    unit_of: np.ndarray[Any, Any]
    entries: list[Entry]
    noun: str
    are_documents: bool
    has_groups: bool

    @classmethod
    def of(cls, everything: AnyRecords, salt: str) -> _Rows:
        """Read the records once; units are numbered in the order of salted hashes of their content or group."""
        keys, labels, are_documents = bytearray(), list[Hashable](), len(everything) > 0
        for record in everything:
            keys += content_key(record, salt=salt)
            labels.append(record.label if isinstance(record, Labeled) else None)
            are_documents &= isinstance(record, Document)
        contents = keys_of(bytes(keys))
        groups = everything.group_keys() if isinstance(everything, StoredRecords) else None
        digests = contents if groups is None else _group_digests(contents, groups, salt)
        distinct, unit_of = np.unique(digests, return_inverse=True)
        noun = "document" if are_documents or not len(everything) else "row"
        if groups is not None:
            noun = "row" if len(distinct) > 1 else "group of rows with the same value or the same content"
        _, first = np.unique(contents, return_index=True)
        entries: list[Entry]
        if groups is None:
            one: dict[Hashable, Entry] = {label: {label: 1} for label in set(labels)}  # shared, to save memory
            entries = [one[labels[at]] for at in first.tolist()]
        else:
            counted: list[Counter[Hashable]] = [Counter() for _ in distinct]
            for at in first.tolist():
                counted[unit_of[at]][labels[at]] += 1
            entries = list(counted)
        return cls(unit_of, entries, noun, are_documents, groups is not None)

    def held_out(self, fraction: float | None) -> tuple[np.ndarray[Any, Any], int]:
        """Return whether each record is held out, shape (records,), and the number of strata."""
        sizes = Counter[Hashable]()
        for entry in self.entries:
            sizes.update(entry)
        rare = {label for label, size in sizes.items() if size == 1}  # one stratum, as for the values of scores
        entries = [entry if rare.isdisjoint(entry) else _pooled(entry, rare) for entry in self.entries]
        strata = Counter[Hashable]()
        for entry in entries:
            strata.update(entry)
        total = strata.total()
        count = min(total - 1, max(1, _count(total, fraction, LEAST_ROWS)))
        wanted = _apportioned(strata, count)
        return np.isin(self.unit_of, _closest(entries, wanted, strata)), len(strata)


_POOL = object()
"""Stratum of all labels that occur once."""


def _pooled(entry: Entry, rare: set[Hashable]) -> Entry:
    pooled = Counter[Hashable]()
    for label, count in entry.items():
        pooled[_POOL if label in rare else label] += count
    return pooled


def _count(total: int, fraction: float | None, least: int) -> int:
    """Return how much of a total to hold out; see `split`."""
    if fraction is not None:
        return round(fraction * total)
    return max(round(DEFAULT_FRACTION * total), min(least, int(LARGEST_FRACTION * total)))


def _apportioned(strata: Counter[Hashable], count: int) -> Counter[Hashable]:
    """Divide `count` rows among strata in proportion to their sizes, by largest remainders; one row of each stays."""
    total, wanted = strata.total(), Counter[Hashable]()
    quotas = {label: count * size / total for label, size in strata.items()}
    for label, size in strata.items():
        wanted[label] = min(int(quotas[label]), size - 1)
    while wanted.total() < min(count, total - len(strata)):
        free = (label for label, size in strata.items() if wanted[label] < size - 1)
        # of equal remainders, the first one in the order of the units, which the seed determines
        wanted[max(free, key=lambda label: quotas[label] - wanted[label])] += 1
    return wanted


_ATTEMPTS = 16
"""Number of orders of the units that are tried, because large groups rarely fit at once."""


def _closest(entries: Many[Entry], wanted: Counter[Hashable], strata: Counter[Hashable]) -> list[int]:
    """Return the units whose rows come closest to those wanted, unless each of them has all rows of a label."""
    best, least = list[int](), math.inf
    for attempt in range(_ATTEMPTS):
        first = attempt * len(entries) // _ATTEMPTS
        chosen, off = _fitting([*range(first, len(entries)), *range(first)], entries, wanted, strata)
        if chosen and off < least:
            best, least = chosen, off
        if not least:
            break
    if best:
        return best
    free = [unit for unit, entry in enumerate(entries) if _leaves_some(entry, strata, Counter())]
    return sorted(free, key=lambda unit: _change(entries[unit], wanted, Counter()))[:1]  # every unit is too large


def _leaves_some(entry: Entry, strata: Counter[Hashable], held_out: Counter[Hashable]) -> bool:
    """Return whether rows of each label are left to train on if a unit is held out in addition to other rows."""
    return all(held_out[label] + count < strata[label] for label, count in entry.items())


def _fitting(
    order: Iterable[int], entries: Many[Entry], wanted: Counter[Hashable], strata: Counter[Hashable]
) -> tuple[list[int], int]:
    """Return the units that, in order, bring the rows closer to those wanted, and the squared distance left."""
    held_out, off, chosen = Counter[Hashable](), sum(count * count for count in wanted.values()), list[int]()
    for unit in order:
        if not off:
            break
        change = _change(entries[unit], wanted, held_out)
        if change < 0 and _leaves_some(entries[unit], strata, held_out):
            held_out.update(entries[unit])
            off += change
            chosen.append(unit)
    return chosen, off


def _change(entry: Entry, wanted: Counter[Hashable], held_out: Counter[Hashable]) -> int:
    """Return by how much a unit changes the squared distance between the held-out rows and those wanted."""
    return sum(count * (count + 2 * (held_out[label] - wanted[label])) for label, count in entry.items())


def _group_digests(contents: np.ndarray[Any, Any], groups: np.ndarray[Any, Any], salt: str) -> np.ndarray[Any, Any]:
    """Return a salted digest per record, shape (records,), equal for records with equal groups or contents."""
    names, number_of = np.unique(groups, return_inverse=True)
    root = list(range(len(names)))

    def find(number: int) -> int:
        while root[number] != number:
            root[number] = number = root[root[number]]
        return number

    first = dict[bytes, int]()
    for content, number in zip(contents.tolist(), number_of.tolist(), strict=True):
        root[find(number)] = find(first.setdefault(content, number))
    digests = [hashlib.sha256(salt.encode() + name).digest()[:KEY_BYTES] for name in names.tolist()]
    least = dict[int, bytes]()
    for number, digest in enumerate(digests):
        least[find(number)] = min(digest, least.get(find(number), digest))
    return keys_of(b"".join(least[find(number)] for number in number_of.tolist()))


_BORDERS = (
    ("a blank line", re.compile(r"\n[^\S\n]*\n\s*")),
    ("a line break", re.compile(r"\n\s*")),
    ("the end of a sentence", re.compile(r"[.!?…。！？]['\")\]”’»」』]*\s+|[。！？][”’»」』]*")),
    ("a space", re.compile(r"\s+")),
)
"""Where a document may be cut, best first: after each match."""

_FARTHEST = 1 << 16
"""Maximum distance of a cut from the wanted position, in characters."""


def _cut(everything: AnyRecords, fraction: float | None) -> Split:
    """Hold out the end of a single document, which may occur several times."""
    document = everything[0] if len(everything) else None
    if not isinstance(document, Document):
        return _nothing(everything, "the data is a single document")
    size = sum(map(len, document.pieces()))
    count = _count(size, fraction, LEAST_CHARACTERS)
    at = _border(document, size - count, min(count // 2, _FARTHEST)) if size >= SHORTEST_DOCUMENT else None
    if at is None:
        return _nothing(
            everything, "the data is a single document, which has no place to cut, or fewer than 1,000 characters"
        )
    train, held_out = everything.cut(at, at / size)
    note = (
        f"The last {size - at:,} of {size:,} characters of the document are held out for evaluation; pass "
        "--eval-data to evaluate on other data."
    )
    return Split(train, held_out, note, rule=STRATIFIED)


def _border(document: Document, wanted: int, distance: int) -> int | None:
    """Return the best place to cut a document near a position, or None if there is no space within the distance."""
    begin, text, seen = wanted - distance, "", 0
    for piece in document.pieces():
        text += piece[max(0, begin - seen) : max(0, wanted + distance - seen)]
        seen += len(piece)
        if seen >= wanted + distance:
            break
    for _, border in _BORDERS:
        ends = [
            match.end()
            for match in border.finditer(text)
            if text[: match.start()].strip() and text[match.end() :].strip()
        ]
        if ends:
            return begin + min(ends, key=lambda end: abs(begin + end - wanted))
    return None
