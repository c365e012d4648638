"""Counts of what became of the data, and the sentences that say it.

Knows nothing of files or tokenizers; `encode` fills the counts in.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field


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
        """All counts and notes, for `run.json`."""
        return {"rows": self.rows, **asdict(self)}

    def lines(self) -> list[str]:
        """The counts as sentences to print: the totals first, then whatever was cut, dropped or is odd."""
        kinds = (
            (self.documents, "document", None),
            (self.completions, "prompt with completion", "prompts with completions"),
            (self.conversations, "conversation", None),
        )
        told = [_count(*kind) for kind in kinds if kind[0]] or [_count(*kinds[0])]
        lines = [
            f"{', '.join(told)}: {_count(self.sequences, 'sequence')} of at most {self.max_length_tokens:,} tokens, "
            f"{self.tokens:,} tokens, {self.trained_tokens:,} of them trained ({self.trained_share:.1%})."
        ]
        return [*lines, *self._losses(), *self.notes]

    def _losses(self) -> list[str]:
        lines = []
        if self.empty_rows:
            lines.append(f"{_count(self.empty_rows, 'row')} left out: nothing in them to train.")
        if self.dropped_rows:
            lines.append(f"{_count(self.dropped_rows, 'row')} left out: no trained token within the length.")
        if self.cut_rows:
            lines.append(
                f"{_count(self.cut_rows, 'row')} cut to {self.max_length_tokens:,} tokens: {self.cut_tokens:,} tokens "
                f"lost, {self.cut_trained_tokens:,} of them to be trained; a larger --max-length keeps them."
            )
        if self.untrained_turns:
            lines.append(
                f"{_count(self.untrained_turns, 'assistant turn')} not trained: the chat template writes them "
                "differently once the conversation goes on; one row per answer trains them all."
            )
        if self.duplicate_rows:
            one = self.duplicate_rows == 1
            lines.append(
                "1 row repeats an earlier one; it is kept."
                if one
                else f"{self.duplicate_rows:,} rows repeat earlier ones; they are kept."
            )
        if self.sequences and not self.ended_rows:
            lines.append("No row trains an end of text, so the model will not learn where to stop.")
        return lines


def _count(number: int, singular: str, plural: str | None = None) -> str:
    return f"{number:,} {singular if number == 1 else plural or singular + 's'}"
