"""Counts of the data and how they are printed.

Knows nothing about files or tokenizers; `encode` sets the counts.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

from lorakit.tables import format_count, format_percent


@dataclass(slots=True)
class DataReport:
    """What became of the data on its way to sequences; nothing is dropped or cut without a count here.

    Attributes:
        max_length_tokens: The longest sequence that was allowed.
        documents: Rows or files that are texts.
        completions: Rows of prompt and completion.
        conversations: Rows of messages.
        sequences: Sequences made.
        tokens: Tokens of all sequences, without padding.
        trained_tokens: Tokens that the loss is taken on.
        empty_rows: Rows without anything to train, left out.
        duplicate_rows: Rows that say the same as an earlier one; they are kept.
        cut_rows: Rows longer than `max_length_tokens`, cut from the right.
        cut_tokens: Tokens lost by those cuts.
        cut_trained_tokens: How many of them would have been trained.
        dropped_rows: Rows left without a trained token, left out.
        untrained_turns: Turns of the assistant that the chat template rewrites once others follow, or leaves out;
            they are context only.
        ended_rows: Rows that train an end: the end-of-text token, or what the template puts after a turn.
        notes: Further sentences.
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
        """All rows that came in: documents, completions and conversations, the empty ones among them."""
        return self.documents + self.completions + self.conversations

    @property
    def trained_share(self) -> float:
        """Share of the tokens that is trained, in [0, 1]."""
        return self.trained_tokens / self.tokens if self.tokens else 0.0

    def as_dict(self) -> dict[str, object]:
        """Return all counts and notes, for `run.json`."""
        return {"rows": self.rows, **asdict(self)}

    def lines(self) -> list[str]:
        """Return the counts as lines: totals first, then what was cut, left out or is unusual."""
        kinds = [
            format_count(self.documents, "document"),
            format_count(self.completions, "prompt with completion", "prompts with completions"),
            format_count(self.conversations, "conversation"),
        ]
        told = [kind for kind in kinds if not kind.startswith("0 ")] or [kinds[0]]
        lines = [
            f"{', '.join(told)}: {format_count(self.sequences, 'sequence')} of at most "
            f"{self.max_length_tokens:,} tokens, {self.tokens:,} tokens, {self.trained_tokens:,} with loss "
            f"({format_percent(self.trained_share, 1)})."
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
            one = self.duplicate_rows == 1
            lines.append(
                "1 duplicate row; it is kept." if one else f"{self.duplicate_rows:,} duplicate rows; they are kept."
            )
        if self.sequences and not self.ended_rows:
            lines.append("No row has loss on an end-of-text token, so the model will not learn where to stop.")
        return lines
