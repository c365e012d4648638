"""Counts of labeled rows: their lengths, their labels, and what was truncated or left out."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

from lorakit.durable import JsonObject
from lorakit.tables import format_count, format_percent

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
