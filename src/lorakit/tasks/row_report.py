"""Counts of labeled rows: their lengths, their labels, and what was truncated or left out."""

from __future__ import annotations

from dataclasses import dataclass, field

from lorakit.data import Report
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
