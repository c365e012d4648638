"""Rows to measure a model on or to predict: their task, their maximum length, and the batches made of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeAlias

import numpy as np

from lorakit import hub, plan
from lorakit.data import (
    AnyRecords,
    Batch,
    Document,
    Encoded,
    Record,
    Records,
    Report,
    Split,
    Tokenizer,
    few_rows,
    padding_id,
)
from lorakit.errors import DataError, UsageError
from lorakit.plan.job import ASSUMED_LENGTH
from lorakit.session.spec import SessionSpec
from lorakit.session.tokenizers import SavedTokenizer
from lorakit.tasks import (
    EncodeOptions,
    LabelOptions,
    TaskOnData,
    agree_on_padding,
    evaluation_batches,
    evaluation_order,
    named_as,
    on_model,
    task_for,
    task_to_measure,
)

Batches: TypeAlias = Callable[[], Iterable[Batch]]
"""Function that returns the batches of an evaluation."""


@dataclass(frozen=True)
class EvalRows:
    """Rows to measure a model on.

    Attributes:
        records: The rows.
        labels: How their labels are read.
        max_length: Maximum sequence length in tokens; None selects the length that follows the data, within the model's
            limit.
        batch_rows: Number of rows in a batch of the longest sequences; batches of shorter sequences have more rows.
    """

    records: AnyRecords
    labels: LabelOptions = field(default_factory=LabelOptions)
    max_length: int | None = None
    batch_rows: int = 8

    def coding(self, spec: SessionSpec, tokenizer: Tokenizer) -> Coding:
        """Return how the rows become batches; without adapters, the data and the model determine the task.

        Raises:
            LorakitError: No task fits the data and the model, or the labels or the length do not fit the task.
        """
        task = (
            task_for(None, Split(self.records, Records(), ""), spec.source, self.labels, spec.task)
            if spec.adapters
            else task_to_measure(self.records, spec.source, self.labels)
        )
        usual = partial(usual_length, self.records, tokenizer, task)
        length = max_length_for(hub.shape_of(spec.source), self.max_length, usual)
        return Coding(self.records, task, length, self.batch_rows)


@dataclass(frozen=True)
class Coded:
    """Rows as batches.

    Attributes:
        batches: Function that returns the batches.
        report: The counts of the data.
        record_of: Number of the record of each row of the batches, in their order.
    """

    batches: Batches
    report: Report
    record_of: tuple[int, ...]


@dataclass(frozen=True)
class Coding:
    """How records become batches: the task, the maximum length, and the rows per batch of the longest sequences."""

    records: AnyRecords
    task: TaskOnData
    length: int
    rows: int

    def all_coded(
        self,
        tokenizer: Tokenizer,
        owned: Mapping[str, SavedTokenizer | None],
        say: Callable[[str], None],
        detail: Callable[[str], None],
    ) -> tuple[Coded | None, dict[str, Coded]]:
        """Return the rows of the base, or None if its tokenizer cannot render the data, and those of each adapter.

        `owned` has the tokenizer of each adapter, or None; `say` gets messages, and `detail` the row and token counts.

        Raises:
            DataError: An adapter's tokenizer, or the base's if it is used, cannot render the data.
        """
        by_tokenizer = {name: self.coded(own) for name, own in owned.items() if own is not None}
        try:
            base = self.coded(tokenizer)
        except DataError as cause:
            if not by_tokenizer or len(by_tokenizer) < len(owned):
                raise
            base = None
            say(f"The base is not measured, because only the adapter's tokenizer renders the data. {cause}")
        report = (base or next(iter(by_tokenizer.values()))).report
        total, *losses = report.lines()
        detail(f"data: {total}")
        few = few_rows(report.sequences, self.task.target.kind == "class", "Measure more rows.")
        for line in [*losses, *filter(None, [few])]:
            say(line)
        for name in by_tokenizer if base is not None else ():
            own = f"{name}: the adapter has its own tokenizer"
            say(f"{own}, so its loss is measured over different tokens than the base's.")
        return base, {**({} if base is None else dict.fromkeys(owned, base)), **by_tokenizer}

    def coded(self, tokenizer: Tokenizer) -> Coded:
        """Encode the rows, and return them as batches."""
        encoded = self.task.task.encode(self.records, tokenizer, self.task.target, EncodeOptions(self.length))
        task, pad = self.task, padding_id(tokenizer)
        collate, sequences = task.objective.collate, encoded.sequences
        batches = partial(evaluation_batches, task.task, collate, sequences, self.rows, pad)
        record_of = tuple(encoded.record_of[at] for at in evaluation_order(task.task, sequences))
        return Coded(batches, encoded.report, record_of)


SHORTEST_LENGTH = 16
"""Shortest maximum length that follows the data, in tokens."""

PERCENTILE = 99
"""Percentile of the lengths of rows that becomes the maximum length."""

SAMPLED_ROWS = 500
"""Number of rows whose lengths are measured, at equal distances, if there are more."""

_WHOLE = 1 << 30


def usual_length(records: AnyRecords, tokenizer: Tokenizer, task: TaskOnData) -> int:
    """Return the percentile `PERCENTILE` of the lengths of rows in tokens; documents, which are split, have no length.

    The result is at least `SHORTEST_LENGTH`, and with documents at least `ASSUMED_LENGTH`.

    Raises:
        DataError: A row cannot be encoded.
    """
    least, options, sizes = SHORTEST_LENGTH, EncodeOptions(_WHOLE, is_labeled=False), list[int]()
    for at in range(0, len(records), max(1, -(-len(records) // SAMPLED_ROWS))):
        record = records[at]
        if isinstance(record, Document):
            least = ASSUMED_LENGTH
        else:
            sizes += [len(row) for row in task.task.encode_one(record, tokenizer, task.target, options)]
    return max(least, percentile(sizes) if sizes else ASSUMED_LENGTH)


def percentile(sizes: Sequence[int]) -> int:
    """Return the smallest of the lengths that at least `PERCENTILE` percent of them do not exceed."""
    return int(np.percentile(np.asarray(sizes), PERCENTILE, method="inverted_cdf"))


def max_length_for(shape: plan.ModelShape, wanted: int | None, usual: Callable[[], int]) -> int:
    """Return the given maximum sequence length, or else the usual one, reduced to the model's limit.

    Raises:
        UsageError: The given length exceeds the model's limit.
    """
    if wanted is None:
        by_data = usual()
        return min(by_data, shape.positions or by_data)
    if 0 < shape.positions < wanted:
        text = (
            f"max_length is {wanted:,}, but {shape.name} supports at most {shape.positions:,} tokens; "
            f"pass --max-length {shape.positions} or less."
        )
        raise UsageError(text, what=wanted, field="max_length", allowed=(str(shape.positions),))
    return wanted


def to_predict(spec: SessionSpec, tag_scheme: str = "auto") -> SessionSpec:
    """Return a session's spec with everything that its task needs to predict rows.

    The tag scheme "auto" is that of the adapter or the model.

    Raises:
        UsageError: The task generates text, or the model has no head for it.
        LorakitError: The files of the model or the adapter do not fit the task.
    """
    spec.check_predicts()
    hub.require(spec.source, tokenizer=True)
    named = named_as(spec.task, hub.ModelFacts.of(spec.source))
    labeled = replace(named, target=named.target.with_options(LabelOptions(tag_scheme=tag_scheme)))
    return replace(spec, task=on_model(labeled, spec.source))


@dataclass(frozen=True)
class RowsToPredict:
    """Encoded rows, each with the record that it was made from, and the tokenizer that encoded them."""

    rows: Encoded
    batch_rows: int
    tokenizer: SavedTokenizer

    @classmethod
    def of(
        cls,
        spec: SessionSpec,
        records: AnyRecords,
        max_length: int | None,
        batch_rows: int,
        tokenizer: SavedTokenizer | None = None,
    ) -> RowsToPredict:
        """Encode rows for the result of `to_predict`; `max_length` is `ASSUMED_LENGTH` tokens if it is None.

        Raises:
            LorakitError: The rows cannot be encoded.
        """
        length = max_length_for(hub.shape_of(spec.source), max_length, lambda: ASSUMED_LENGTH)
        tokenizer = tokenizer or spec.tokenizer
        agree_on_padding(spec.task, spec.source, [tokenizer])
        options = EncodeOptions(length, is_labeled=False)
        encoded = spec.task.task.encode(records, tokenizer, spec.task.target, options)
        return cls(encoded, batch_rows, tokenizer)

    @property
    def notes(self) -> list[str]:
        """Messages, for example about truncated or empty rows."""
        return self.rows.report.lines()[1:]

    def batches(self, spec: SessionSpec) -> Iterator[tuple[Batch, Sequence[Record]]]:
        """Yield batches with the records of their rows, in order."""
        collate, pad = spec.task.objective.collate, padding_id(self.tokenizer)
        for at in range(0, len(self.rows.sequences), self.batch_rows):
            end = at + self.batch_rows
            yield collate(list(self.rows.sequences[at:end]), pad, 0.0), self.rows.records[at:end]
