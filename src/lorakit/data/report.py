"""Counts of the rows and tokens in the data, which `encode` sets, and lines of text that describe them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field

from lorakit.durable import JsonObject
from lorakit.errors import DataError
from lorakit.tables import format_count, format_percent


@dataclass(slots=True)
class Report(ABC):
    """Counts of rows and tokens that every task has, including what was left out or truncated.

    Attributes:
        max_length_tokens: Maximum length of a sequence or a text in tokens.
        tokens: Number of tokens in all sequences, excluding padding.
        trained_tokens: Number of targets that contribute to the loss: tokens, or rows.
        duplicate_rows: Number of rows with the same content as an earlier row; they are kept.
        overlong: What was done with rows that are longer than `max_length_tokens`; there are `cut_rows` of them.
        inactive_sequences: Number of sequences in which the adapter acts on no token that contributes to the loss,
            because its invocation tokens do not precede such a token.
        shape: Name of the shape of all rows, such as "alpaca", or None if it is unknown or differs between files.
        columns: Required field -> column, or an empty dict.
        notes: Other messages for the user.
    """

    max_length_tokens: int
    sequences: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    empty_rows: int = 0
    duplicate_rows: int = 0
    overlong: str = "truncate"
    cut_rows: int = 0
    inactive_sequences: int = 0
    shape: str | None = None
    columns: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def prompt_format(self) -> str | None:
        """Format of the prompts, or None if rows differ or the task has no prompts."""
        return None

    @abstractmethod
    def check_end(self) -> None:
        """Check that the model can learn where to stop, if the task generates text."""

    @abstractmethod
    def lines(self) -> list[str]:
        """Return the counts as lines of text: the totals, then what was left out or truncated, then the notes."""

    def as_dict(self) -> JsonObject:
        """Return all counts and notes as plain JSON values."""
        return asdict(self)

    def _row_lines(self, task_lines: Iterable[str]) -> list[str]:
        """Return lines about rows: those left out because they are empty, the task's own lines, and duplicates."""
        empty = [f"{format_count(self.empty_rows, 'row')} left out: empty."] if self.empty_rows else []
        twice = [f"{format_count(self.duplicate_rows, 'duplicate row')} kept."] if self.duplicate_rows else []
        return [*empty, *task_lines, *twice, *self._inactive_lines()]

    def _inactive_lines(self) -> list[str]:
        """Return a line if the adapter would not learn from some sequences."""
        if not self.inactive_sequences:
            return []
        count = f"{self.inactive_sequences:,} of {format_count(self.sequences, 'sequence')}"
        if self.inactive_sequences == self.sequences:
            count, verb = "any sequence", "the training changes nothing"
        else:
            verb = "nothing is learned from them"
        return [
            f"warning: the adapter does not act in {count}, because its invocation tokens do not precede a token that "
            f"contributes to the loss; {verb}."
        ]


@dataclass(slots=True)
class DataReport(Report):
    """Counts of the rows and tokens of text that a model learns to continue.

    Attributes:
        documents: Number of text files, plus the number of rows with a `text` field.
        instructions: Number of conversations rendered as a prompt and a completion, without a chat template.
        cut_answers: Number of truncated rows in which a token that would have contributed to the loss was removed.
        cut_tokens: Number of tokens removed by truncation.
        cut_trained_tokens: Number of removed tokens that would have contributed to the loss.
        dropped_rows: Number of rows left out because none of their tokens contributes to the loss.
        untrained_turns: Number of assistant turns excluded from the loss because the chat template omits them, or
            rewrites them when other turns follow.
        untrained_reason: Why the first of these turns was excluded, or "".
        prompt: Text with which the template begins answers in generation but not in the data, or "".
        joined_turns: Number of assistant turns whose first token also contains the end of the generation prompt.
        ended_rows: Number of rows in which an end marker contributes to the loss: the end-of-text token, or the
            template's end-of-turn marker; and of documents whose end is in another part.
    """

    documents: int = 0
    completions: int = 0
    conversations: int = 0
    instructions: int = 0
    cut_answers: int = 0
    cut_tokens: int = 0
    cut_trained_tokens: int = 0
    dropped_rows: int = 0
    untrained_turns: int = 0
    untrained_reason: str = ""
    prompt: str = ""
    joined_turns: int = 0
    ended_rows: int = 0

    @property
    def rows(self) -> int:
        """The number of input rows: documents, completions and conversations, including empty ones."""
        return self.documents + self.completions + self.conversations

    @property
    def prompt_format(self) -> str | None:
        """Format of the prompts: "chat", "instruction" or "text"; None if rows differ."""
        counts = {
            "chat": self.conversations - self.instructions,
            "instruction": self.instructions,
            "text": self.documents + self.completions,
        }
        used = [name for name, count in counts.items() if count]
        return used[0] if len(used) == 1 else None

    @property
    def trained_fraction(self) -> float:
        """The fraction of tokens that contribute to the loss, in [0, 1]."""
        return self.trained_tokens / self.tokens if self.tokens else 0.0

    def check_end(self) -> None:
        """Raise a DataError if no end marker contributes to the loss, from which a model learns where to stop."""
        if self.sequences and not self.ended_rows:
            raise DataError(
                "No end marker contributes to the loss, so the model would not learn where to stop. Use a tokenizer "
                "with an end-of-text token, a chat template that ends assistant turns, or a larger --max-length if "
                "every row is truncated; --allow-missing-end overrides this check.",
                field="allow_missing_end",
            )

    def as_dict(self) -> JsonObject:
        """Return all counts and notes as plain JSON values."""
        return {"rows": self.rows, **asdict(self)}

    def lines(self) -> list[str]:
        """Return the counts as lines of text, as in `Report.lines`."""
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
        lines += self._row_lines(self._losses())
        if self.sequences and not self.ended_rows:
            lines.append("No end marker contributes to the loss, so the model will not learn where to stop.")
        return [*lines, *self.notes]

    def _cut(self) -> str:
        return f"{format_count(self.cut_rows, 'row')} ({format_percent(self.cut_rows / max(1, self.rows), 1)})"

    def _losses(self) -> list[str]:
        lines = []
        dropped = self.dropped_rows - (self.cut_rows if self.overlong == "drop" else 0)
        if dropped:
            lines.append(f"{format_count(dropped, 'row')} left out: nothing to train on within the maximum length.")
        if self.cut_rows and self.overlong == "truncate":
            lines.append(
                f"{self._cut()} truncated to {self.max_length_tokens:,} tokens: "
                f"{self.cut_tokens:,} tokens removed ({self.cut_trained_tokens:,} would have contributed "
                f"to the loss, in {format_count(self.cut_answers, 'row')}); a larger --max-length keeps them."
            )
        elif self.cut_rows:
            done = "left out" if self.overlong == "drop" else "split"
            lines.append(f"{self._cut()} {done} because of more than {self.max_length_tokens:,} tokens.")
        if self.untrained_turns:
            lines.append(
                f"{format_count(self.untrained_turns, 'assistant turn')} excluded from the loss: "
                f"{self.untrained_reason}; to train on every turn, use one row per answer."
            )
        if self.prompt:
            lines.append(
                f"In generation, the chat template begins answers with {self.prompt!r}, but answers in the data do not "
                "begin with this text. Set the template's options (chat_template_kwargs) so that both agree."
            )
        if self.joined_turns:
            lines.append(
                f"{format_count(self.joined_turns, 'answer')}: the first token also contains the end of the generation "
                "prompt, such as a line feed, so generation cannot begin with it. Remove white space before answers."
            )
        return lines
