"""Counts of the rows and tokens in the data, and lines of text that describe them.

This module does not depend on files or tokenizers; `encode` sets the counts.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

from lorakit.durable import JsonObject
from lorakit.tables import format_count, format_percent


@dataclass(slots=True)
class DataReport:
    """Counts of rows and tokens, including everything that was left out or truncated.

    Attributes:
        max_length_tokens: Maximum sequence length in tokens.
        documents: Number of text files, plus the number of rows with a `text` field.
        completions: Number of rows with a prompt and a completion.
        conversations: Number of rows with messages.
        sequences: Number of sequences.
        tokens: Number of tokens in all sequences, excluding padding.
        trained_tokens: Number of tokens that contribute to the loss.
        empty_rows: Number of rows left out because they contain nothing to train on.
        duplicate_rows: Number of rows with the same content as an earlier row; they are kept.
        cut_rows: Number of rows truncated on the right because they are longer than `max_length_tokens`.
        cut_tokens: Number of tokens removed by truncation.
        cut_trained_tokens: Number of removed tokens that would have contributed to the loss.
        dropped_rows: Number of rows left out because none of their tokens contributes to the loss.
        untrained_turns: Number of assistant turns excluded from the loss because the chat template omits them, or
            rewrites them when other turns follow.
        ended_rows: Number of rows in which an end marker contributes to the loss: the end-of-text token, or the
            template's end-of-turn marker.
        notes: Other messages for the user.
    """

    max_length_tokens: int
    documents: int = 0
    completions: int = 0
    conversations: int = 0
    sequences: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    empty_rows: int = 0
    duplicate_rows: int = 0
    cut_rows: int = 0
    cut_tokens: int = 0
    cut_trained_tokens: int = 0
    dropped_rows: int = 0
    untrained_turns: int = 0
    ended_rows: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def rows(self) -> int:
        """The number of input rows: documents, completions and conversations, including empty ones."""
        return self.documents + self.completions + self.conversations

    @property
    def trained_fraction(self) -> float:
        """The fraction of tokens that contribute to the loss, in [0, 1]."""
        return self.trained_tokens / self.tokens if self.tokens else 0.0

    def as_dict(self) -> JsonObject:
        """Return all counts and notes as plain JSON values."""
        return {"rows": self.rows, **asdict(self)}

    def lines(self) -> list[str]:
        """Return the counts as lines of text: the totals, then the rows left out or truncated, then the notes."""
        kinds = [
            format_count(self.documents, "document"),
            format_count(self.completions, "prompt with completion", "prompts with completions"),
            format_count(self.conversations, "conversation"),
        ]
        shown = [kind for kind in kinds if not kind.startswith("0 ")] or [kinds[0]]
        lines = [
            f"{', '.join(shown)}: {format_count(self.sequences, 'sequence')} of at most "
            f"{self.max_length_tokens:,} tokens; total: {self.tokens:,} tokens; {self.trained_tokens:,} contribute "
            f"to the loss ({format_percent(self.trained_fraction, 1)})."
        ]
        return [*lines, *self._losses(), *self.notes]

    def _losses(self) -> list[str]:
        lines = []
        if self.empty_rows:
            lines.append(f"{format_count(self.empty_rows, 'row')} left out: empty.")
        if self.dropped_rows:
            lines.append(
                f"{format_count(self.dropped_rows, 'row')} left out: nothing to train on within the maximum length."
            )
        if self.cut_rows:
            lines.append(
                f"{format_count(self.cut_rows, 'row')} truncated to {self.max_length_tokens:,} tokens: "
                f"{self.cut_tokens:,} tokens removed ({self.cut_trained_tokens:,} would have contributed "
                "to the loss); a larger --max-length keeps them."
            )
        if self.untrained_turns:
            lines.append(
                f"{format_count(self.untrained_turns, 'assistant turn')} excluded from the loss: the chat template "
                "changes assistant turns when other turns follow; to train on every turn, use one row per answer."
            )
        if self.duplicate_rows:
            lines.append(f"{format_count(self.duplicate_rows, 'duplicate row')} kept.")
        if self.sequences and not self.ended_rows:
            lines.append("No end marker contributes to the loss, so the model will not learn where to stop.")
        return lines
