"""Encoded rows of labeled data: their counts, and flat buffers, which the token cache maps into memory."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import accumulate

from lorakit.data import Report
from lorakit.data.encoding import Sequence
from lorakit.data.records import ReadOnAccess
from lorakit.data.token_cache import Buffers, Form
from lorakit.tables import format_count, format_percent

_RARE_ROWS, _MAJORITY, _SHOWN = 10, 0.9, 8


@dataclass(slots=True)
class RowReport(Report):
    """Counts of labeled rows and their tokens.

    Attributes:
        unit: What contributes to the loss: "token" or "row".
        cut_words: Number of tagged words without a token, because of truncation or because the tokenizer skips them.
        labels: Number of rows (for tags: of words) with each label, most frequent first; empty for scores and texts.
    """

    unit: str = "row"
    rows: int = 0
    cut_words: int = 0
    labels: dict[str, int] = field(default_factory=dict)

    def check_end(self) -> None:
        """Do nothing: these tasks do not learn where a text ends."""

    def lines(self) -> list[str]:
        """Return the counts as lines of text, as in `Report.lines`; the labels follow the totals."""
        total = (
            f"{format_count(self.sequences, 'row')} of at most {self.max_length_tokens:,} tokens; total: "
            f"{self.tokens:,} tokens"
            + (f"; {self.trained_tokens:,} contribute to the loss." if self.unit == "token" else ".")
        )
        return [total, *self._label_lines(), *self._row_lines(self._losses()), *self.notes]

    def _losses(self) -> list[str]:
        lines = []
        if self.cut_rows:
            done = "left out because of more than" if self.overlong == "drop" else "truncated to"
            lines.append(
                f"{format_count(self.cut_rows, 'row')} ({format_percent(self.cut_rows / max(1, self.rows), 1)}) {done} "
                f"{self.max_length_tokens:,} tokens; a larger --max-length keeps them whole."
            )
        if self.cut_words:
            lines.append(
                f"{format_count(self.cut_words, 'tagged word')} left out: truncated, or skipped by the tokenizer."
            )
        return lines

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


_IDS, _SCORES, _ENDS = "i", "d", "q"


class StoredRows(ReadOnAccess[Sequence]):
    """Rows in flat buffers; a `Sequence` is created when a row is read.

    Args:
        buffers: Flat values and the end of each row in them: `ids`, `labels`, `types` (no values if a row has none) and
            `others` with `ids_ends`, `labels_ends`, `types_ends` and `others_ends`. Each text in `others` has an end of
            its own, and `others_rows` is the number of these texts up to the end of each row.

    Raises:
        KeyError: A buffer is missing.
    """

    def __init__(self, buffers: Buffers) -> None:
        self.buffers: Buffers = {name: buffers[name] for name in _NAMES}

    @classmethod
    def of(cls, rows: Iterable[Sequence]) -> StoredRows:
        """Return rows as buffers, in the same order."""
        all_rows = list(rows)
        others = [ids for row in all_rows for ids in row.others]
        kind = _SCORES if any(row.labels.typecode == _SCORES for row in all_rows) else _IDS
        empty = array(_IDS)
        buffers = {
            **_flat("ids", [row.input_ids for row in all_rows]),
            **_flat("labels", [row.labels for row in all_rows], kind),
            **_flat("types", [empty if row.types is None else row.types for row in all_rows]),
            **_flat("others", others),
            "others_rows": _ends(len(row.others) for row in all_rows),
        }
        return cls({name: memoryview(values) for name, values in buffers.items()})

    def __len__(self) -> int:
        return len(self.buffers["ids_ends"])

    def _read(self, indexes: Iterable[int]) -> Iterator[Sequence]:
        for at in indexes:
            others = range(*self._span("others_rows", at))
            yield Sequence(
                self._part("ids", at),
                self._part("labels", at),
                tuple(self._part("others", number) for number in others),
                self._part("types", at) or None,
            )

    def _span(self, name: str, at: int) -> tuple[int, int]:
        ends = self.buffers[name]
        return (ends[at - 1] if at else 0), ends[at]

    def _part(self, name: str, at: int) -> array[int]:
        begin, end = self._span(f"{name}_ends", at)
        values = self.buffers[name]
        return array(values.format, values[begin:end].tobytes())


_NAMES = (
    *("ids", "ids_ends", "labels", "labels_ends", "types", "types_ends"),
    *("others", "others_ends", "others_rows"),
)


def _flat(name: str, parts: list[array[int]], kind: str = _IDS) -> dict[str, array[int]]:
    flat: array[int] = array(kind)
    for part in parts:
        flat.extend(part if part.typecode == kind else array(kind, part))
    return {name: flat, f"{name}_ends": _ends(map(len, parts))}


def _ends(sizes: Iterable[int]) -> array[int]:
    return array(_ENDS, accumulate(sizes))


ROWS = Form(lambda rows: StoredRows.of(rows).buffers, StoredRows, RowReport)
"""How the token cache stores the rows of these tasks."""
