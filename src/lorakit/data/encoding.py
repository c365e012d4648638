"""From records to token sequences with labels, with a count of all that was cut or left out.

Labels are -100 where the loss is not taken. The first label of a sequence is always -100, because no token comes
before it, so the labels that are not -100 are exactly the positions that a causal loss trains.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass

from lorakit.data.chat import conversation_tokens
from lorakit.data.records import (
    Completion,
    Conversation,
    Document,
    Record,
    Records,
    content_digest,
    is_empty,
    place,
)
from lorakit.data.report import DataReport
from lorakit.data.tokens import Tokenizer, beginning, token_ids
from lorakit.errors import ConfigError, DataError

IGNORED = -100
"""The label of a token that the loss is not taken on."""


@dataclass(frozen=True, slots=True)
class Sequence:
    """Tokens and labels of one row of a batch.

    Attributes:
        input_ids: Token ids, shape (length,), four bytes each.
        labels: The same ids where the loss is taken, -100 elsewhere; shape (length,); the first is -100.
    """

    input_ids: array[int]
    labels: array[int]

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def trained_tokens(self) -> int:
        """How many positions a causal loss trains."""
        return len(self.labels) - self.labels.count(IGNORED)


@dataclass(frozen=True, slots=True)
class Encoded:
    """What encoding gives.

    Attributes:
        sequences: In the order of the records.
        report: What became of the records.
    """

    sequences: list[Sequence]
    report: DataReport


@dataclass(frozen=True, slots=True)
class _Row:
    ids: list[int]
    trained: list[bool]
    ended: bool
    untrained_turns: int = 0


def encode(records: Iterable[Record], tokenizer: Tokenizer, max_length: int) -> Encoded:
    """Turn records into sequences of at most `max_length` tokens.

    - A document gets the tokenizer's beginning token, if it adds one, and an end-of-text token. It is cut into
      consecutive windows; each begins with the last token of the window before, as context, so that every token
      but the document's first is trained exactly once and none is lost.
    - Of prompt and completion the completion is trained, with an end-of-text token.
    - Of a conversation the assistant's turns are trained, as the chat template writes them, with what ends them.
    - Completions and conversations that are too long are cut from the right; rows without a trained token are
      left out; both are counted.

    Args:
        records: What `read_records` or `split` gives.
        tokenizer: Any transformers tokenizer.
        max_length: Longest sequence, in tokens; at least 2.

    Returns:
        The sequences and the counts.

    Raises:
        ConfigError: `max_length` is below 2.
        DataError: No token is left to train, or a conversation does not go through the chat template.
    """
    if max_length < 2:
        raise ConfigError(f"max_length is {max_length}; at least 2 tokens are needed, one to read and one to predict.")
    report = DataReport(max_length, notes=list(records.notes) if isinstance(records, Records) else [])
    sequences: list[Sequence] = []
    seen: set[str] = set()
    first = None
    for record in records:
        first = first or record
        _count_kind(report, record)
        digest = content_digest(record)
        report.duplicate_rows += digest in seen
        seen.add(digest)
        if is_empty(record):
            report.empty_rows += 1
        else:
            sequences += _sequences(record, tokenizer, report)
    report.sequences = len(sequences)
    report.tokens = sum(len(sequence) for sequence in sequences)
    report.trained_tokens = sum(sequence.trained_tokens for sequence in sequences)
    if tokenizer.eos_token_id is None and (report.documents or report.completions):
        report.notes.append("The tokenizer has no end-of-text token, so nothing marks where a text ends.")
    if not report.trained_tokens:
        raise DataError(_nothing_left(report, first))
    return Encoded(sequences, report)


def _nothing_left(report: DataReport, first: Record | None) -> str:
    if first is None:
        return "There are no rows of data; there is nothing to learn from."
    parts = [f"{report.empty_rows:,} empty"] if report.empty_rows else []
    parts += [f"{report.dropped_rows:,} without a trained token within {report.max_length_tokens:,} tokens"]
    return (
        f"No token is left to train in {report.rows:,} rows from {place(first)} on ({', '.join(parts)}). "
        "Look at the data, or raise --max-length."
    )


def _count_kind(report: DataReport, record: Record) -> None:
    if isinstance(record, Document):
        report.documents += 1
    elif isinstance(record, Completion):
        report.completions += 1
    else:
        report.conversations += 1


def _sequences(record: Record, tokenizer: Tokenizer, report: DataReport) -> list[Sequence]:
    row = _row(record, tokenizer)
    report.untrained_turns += row.untrained_turns
    if isinstance(record, Document):
        made = _windows(row, report.max_length_tokens)
        ended = row.ended
    else:
        made, ended = [_cut(row, report)], row.ended and len(row.ids) <= report.max_length_tokens
    if not any(sequence.trained_tokens for sequence in made):
        report.dropped_rows += 1
        return []
    report.ended_rows += ended
    return made


def _row(record: Record, tokenizer: Tokenizer) -> _Row:
    if isinstance(record, Conversation):
        turns = conversation_tokens(record, tokenizer)
        return _Row(turns.ids, turns.trained, turns.ended, turns.untrained_turns)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if isinstance(record, Document):
        prompt, said = beginning(tokenizer), token_ids(tokenizer, record.text)
    else:
        prompt, said = _completion(record, tokenizer)
    if said[-1:] != end:
        said = said + end
    return _Row(prompt + said, [False] * len(prompt) + [True] * len(said), bool(end))


def _completion(record: Completion, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Tokens of prompt and completion such that the prompt is what generation will see."""
    start = beginning(tokenizer)
    prompt = token_ids(tokenizer, record.prompt) if record.prompt else []
    both = token_ids(tokenizer, record.prompt + record.completion)
    if both[: len(prompt)] == prompt:
        return start + prompt, both[len(prompt) :]
    # a token lies across the border: the prompt keeps the tokens that it has when it stands alone
    return start + prompt, token_ids(tokenizer, record.completion)


def _windows(row: _Row, length: int) -> list[Sequence]:
    starts = range(0, max(1, len(row.ids) - 1), length - 1)
    return [_sequence(row.ids[at : at + length], row.trained[at : at + length]) for at in starts]


def _cut(row: _Row, report: DataReport) -> Sequence:
    length = report.max_length_tokens
    if len(row.ids) > length:
        report.cut_rows += 1
        report.cut_tokens += len(row.ids) - length
        report.cut_trained_tokens += sum(row.trained[length:])
    return _sequence(row.ids[:length], row.trained[:length])


def _sequence(ids: list[int], trained: list[bool]) -> Sequence:
    labels = array("i", (token if mark else IGNORED for token, mark in zip(ids, trained, strict=True)))
    if labels:
        labels[0] = IGNORED
    return Sequence(array("i", ids), labels)
