"""Metrics of a model's answers to rows of prompt and answer: generated texts, and the likelihood of listed answers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from lorakit.data import Completion, Conversation, Record, Records
from lorakit.data.chat import is_plain_instruction
from lorakit.data.records import location
from lorakit.durable import JsonObject
from lorakit.errors import ConfigError, DataError, UsageError
from lorakit.generate import Sampling, context_tokens
from lorakit.session.coding import Coding
from lorakit.session.prompts import Answer, encode_prompts, end_ids
from lorakit.session.session import Session
from lorakit.session.tokenizers import SavedTokenizer
from lorakit.tables import format_count

EXACT, REGEX, CHOICE = "exact_match", "regex_match", "choice_accuracy"
"""Names of the metrics: fractions of the rows with a right answer."""

_UNLIMITED = 1 << 30


@dataclass(frozen=True)
class AnswerMetrics:
    """The metrics of answers; whitespace around answers does not matter.

    Attributes:
        is_exact: Whether generated answers are compared with those of the rows.
        regex: Regular expression that must occur in a generated answer, or None; if it has a group, the text of the
            first group must be that in the answer of the row.
        choices: Possible answers, the most likely of which must be that of the row; empty for none.
        is_normalized: Whether the log-likelihood of each choice is divided by its number of characters.
        max_new_tokens: Maximum length of a generated answer in tokens.

    Raises:
        ConfigError: The expression is not valid, or there is one choice, or a choice is empty or repeated.
    """

    is_exact: bool = False
    regex: str | None = None
    choices: tuple[str, ...] = ()
    is_normalized: bool = False
    max_new_tokens: int = 256

    def __post_init__(self) -> None:
        try:
            re.compile(self.regex or "")
        except re.error as cause:
            text = f"regex is {self.regex!r}, which is not a valid regular expression: {cause}."
            raise ConfigError(text, what=self.regex, field="regex") from None
        stripped = [choice.strip() for choice in self.choices]
        if self.choices and (len({*stripped}) < max(2, len(stripped)) or not all(stripped)):
            raise ConfigError.of("choices", self.choices, "at least 2 different answers that are not empty")

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the metrics that are measured."""
        wanted = {EXACT: self.is_exact, REGEX: self.regex is not None, CHOICE: bool(self.choices)}
        return tuple(name for name, is_wanted in wanted.items() if is_wanted)

    def check(self, coding: Coding) -> None:
        """Check that the task has answers, and the rows have answers that the metrics can be right about.

        Raises:
            UsageError: The task does not continue text.
            DataError: A row has no answer, or another one than the choices, or the expression occurs in no answer.
        """
        if not self.names:
            return
        task, matches = coding.task.task, 0
        if not task.generates:
            text = f"the task {task.name} does not continue text; omit the flags for {', '.join(self.names)}."
            raise UsageError(text, what=task.name, field="task")
        choices = [choice.strip() for choice in self.choices]
        for record in coding.records:
            expected = _answer(record).strip()
            if choices and expected not in choices:
                text = f"{location(record)}: the answer {expected!r} is not one of the choices ({', '.join(choices)})."
                raise DataError(text, what=expected, where=location(record), field="choices")
            matches += self.regex is not None and re.search(self.regex, expected) is not None
        if self.regex is not None and not matches:
            text = f"regex is {self.regex!r}, which occurs in none of the answers of the data."
            raise DataError(text, what=self.regex, field="regex")

    def means(self, rows: Sequence[JsonObject]) -> dict[str, float]:
        """Return the mean of each metric over results of `measure`; empty without rows."""
        return {name: sum(row[name] is True for row in rows) / len(rows) for name in self.names if rows}

    def measure(
        self, session: Session, coding: Coding, tokenizer: SavedTokenizer, adapter: str | None
    ) -> list[JsonObject]:
        """Return the results of each record: whether it is right by each metric, the generated answer, and the choice.

        Raises:
            DataError: A prompt is empty, or a row with a choice is longer than the model's limit.
            LorakitError: See `Session.stream` and `Session.measure`.
        """
        found: list[JsonObject] = [{} for _ in coding.records]
        if self.is_exact or self.regex is not None:
            texts = self._generated(session, coding, tokenizer, adapter)
            for one, record, text in zip(found, coding.records, texts, strict=True):
                one["answer"] = text
                one |= self._judged(text.strip(), _answer(record).strip())
        if self.choices:
            for one, record, likelihoods in zip(
                found, coding.records, self._likelihoods(session, coding, tokenizer, adapter), strict=True
            ):
                scores = {
                    choice: value / (len(choice.strip()) if self.is_normalized else 1)
                    for choice, value in zip(self.choices, likelihoods, strict=True)
                }
                best = max(scores, key=scores.__getitem__)
                one["log_likelihoods"] = dict(zip(self.choices, likelihoods, strict=True))
                one["choice"] = best
                one[CHOICE] = best.strip() == _answer(record).strip()
        return found

    def _judged(self, text: str, expected: str) -> JsonObject:
        results: JsonObject = {EXACT: text == expected} if self.is_exact else {}
        if self.regex is not None:
            match, wanted = re.search(self.regex, text), re.search(self.regex, expected)
            has_group = bool(re.compile(self.regex).groups)
            results[REGEX] = match is not None and (
                not has_group or (wanted is not None and match.group(1) == wanted.group(1))
            )
        return results

    def _generated(self, session: Session, coding: Coding, tokenizer: SavedTokenizer, adapter: str | None) -> list[str]:
        """Return the greedy answer to the prompt of each record, generated in batches of prompts of similar length."""
        rows = list[tuple[str, list[int]]]()
        for record in coding.records:
            prompt, form = _prompt(record, tokenizer)
            (ids,) = encode_prompts([prompt], tokenizer, form, None)
            if not ids:
                raise DataError(f"{location(record)}: the prompt is empty.", where=location(record))
            rows.append((form, ids))
        texts = [""] * len(rows)
        order = sorted(range(len(rows)), key=lambda at: (rows[at][0], len(rows[at][1])))
        for form in dict.fromkeys(form for form, _ in rows):
            alike = [at for at in order if rows[at][0] == form]
            ends = end_ids(session.model, tokenizer, form)
            for start in range(0, len(alike), coding.rows):
                batch = alike[start : start + coding.rows]
                answers = [Answer("", tokenizer, rows[at][1]) for at in batch]
                stream = session.stream(
                    [rows[at][1] for at in batch],
                    [adapter] * len(batch),
                    max_new_tokens=self.max_new_tokens,
                    sampling=Sampling(),
                    eos_ids=ends,
                )
                for token in stream:
                    answers[token.row].add(token)
                for at, answer in zip(batch, answers, strict=True):
                    texts[at] = answer.text
        return texts

    def _likelihoods(
        self, session: Session, coding: Coding, tokenizer: SavedTokenizer, adapter: str | None
    ) -> Iterator[Sequence[float]]:
        """Yield the log-likelihoods of the choices for each record: minus the loss of the record with this answer."""
        count = len(self.choices)
        candidates = Records(_with_answer(record, choice) for record in coding.records for choice in self.choices)
        limit = context_tokens(session.model)
        coded = replace(coding, records=candidates, length=limit or _UNLIMITED).coded(tokenizer)
        cut = max(coded.report.cut_rows, len(candidates) - len(coded.record_of))
        if cut:
            text = (
                f"{format_count(cut, 'row')} with one of the choices as the answer would be longer than the "
                f"{limit:,} tokens that the model supports; shorten the prompts or the choices."
            )
            raise DataError(text, what=cut, field="choices")
        losses = dict(zip(coded.record_of, session.measure(coded.batches(), adapter).row_losses, strict=True))
        for at in range(0, len(candidates), count):
            yield [-losses[at + choice] for choice in range(count)]


def _answer(record: Record) -> str:
    """Return the answer of a row; a DataError if it has none."""
    if isinstance(record, Completion) and record.completion.strip():
        return record.completion
    if isinstance(record, Conversation) and record.messages[-1].role == "assistant" and record.messages[-1].content:
        return record.messages[-1].content
    text = (
        f"{location(record)}: the row has no answer to compare with; pass rows with prompt and completion, or "
        "conversations whose last message is the assistant's text."
    )
    raise DataError(text, where=location(record), field="data")


def _prompt(record: Record, tokenizer: SavedTokenizer) -> tuple[str | Conversation, str]:
    """Return what precedes a row's answer, and its format: see `lorakit.session.prompts.prompt_format`."""
    if isinstance(record, Conversation) and not is_plain_instruction(record, tokenizer):
        return replace(record, messages=record.messages[:-1]), "chat"
    assert isinstance(record, Completion | Conversation)  # as `check` found
    completion = record.as_completion() if isinstance(record, Conversation) else record
    return completion.prompt, "text"


def _with_answer(record: Record, answer: str) -> Record:
    """Return a row with another answer, within the whitespace around its own."""
    own = _answer(record)
    start, end = own[: len(own) - len(own.lstrip())], own[len(own.rstrip()) :]
    given = f"{start}{answer.strip()}{end}"
    if isinstance(record, Completion):
        return replace(record, completion=given)
    assert isinstance(record, Conversation)
    before = (message.untrained() for message in record.messages[:-1])
    return replace(record, messages=(*before, replace(record.messages[-1], content=given, is_trained=True)))
