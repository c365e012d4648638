"""Counts of the data, and their text.

This module does not depend on files or tokenizers; `encode` sets the counts.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

from lorakit.durable import JsonObject
from lorakit.tables import format_count, format_percent


@dataclass(slots=True)
class DataReport:
    """Counts of rows and tokens; everything dropped or truncated is counted here.

    Attributes:
        max_length_tokens: Maximum sequence length.
        documents: Rows or files with a text.
        completions: Rows with prompt and completion.
        conversations: Rows with messages.
        sequences: Number of sequences.
        tokens: Tokens of all sequences, without padding.
        trained_tokens: Tokens with loss.
        empty_rows: Rows left out because they have nothing to train on.
        duplicate_rows: Rows with the content of an earlier one; they are kept.
        cut_rows: Rows longer than `max_length_tokens`, truncated on the right.
        cut_tokens: Tokens lost by truncation.
        cut_trained_tokens: Number of lost tokens that would have had loss.
        dropped_rows: Rows left out because no token has loss.
        untrained_turns: Assistant turns that the chat template omits, or rewrites when others follow; they are
            context only.
        ended_rows: Rows with loss on an end: the end-of-text token, or the template's end of a turn.
        notes: Further messages.
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
        """The fraction of tokens with loss, in [0, 1]."""
        return self.trained_tokens / self.tokens if self.tokens else 0.0

    def as_dict(self) -> JsonObject:
        """Return all counts and notes, for `run.json`."""
        return {"rows": self.rows, **asdict(self)}

    def lines(self) -> list[str]:
        """Return the counts as lines: totals first, then what was cut, left out or is unusual."""
        kinds = [
            format_count(self.documents, "document"),
            format_count(self.completions, "prompt with completion", "prompts with completions"),
            format_count(self.conversations, "conversation"),
        ]
        shown = [kind for kind in kinds if not kind.startswith("0 ")] or [kinds[0]]
        lines = [
            f"{', '.join(shown)}: {format_count(self.sequences, 'sequence')} of at most "
            f"{self.max_length_tokens:,} tokens, {self.tokens:,} tokens, {self.trained_tokens:,} with loss "
            f"({format_percent(self.trained_fraction, 1)})."
        ]
        return [*lines, *self._losses(), *self.notes]

    def _losses(self) -> list[str]:
        lines = []
        if self.empty_rows:
            lines.append(f"{format_count(self.empty_rows, 'row')} left out: empty.")
        if self.dropped_rows:
            lines.append(f"{format_count(self.dropped_rows, 'row')} left out: no loss within the maximum length.")
        if self.cut_rows:
            lines.append(
                f"{format_count(self.cut_rows, 'row')} cut to {self.max_length_tokens:,} tokens: {self.cut_tokens:,} "
                f"tokens cut, {self.cut_trained_tokens:,} of them with loss; a larger --max-length keeps them."
            )
        if self.untrained_turns:
            lines.append(
                f"{format_count(self.untrained_turns, 'assistant turn')} without loss: the chat template changes them "
                "when further turns follow; one row per answer trains all of them."
            )
        if self.duplicate_rows:
            lines.append(f"{format_count(self.duplicate_rows, 'duplicate row')} kept.")
        if self.sequences and not self.ended_rows:
            lines.append("No row has loss on an end-of-text token, so the model will not learn where to stop.")
        return lines
