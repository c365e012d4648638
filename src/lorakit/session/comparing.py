"""Measure a base alone and with each adapter on the same rows, and compare them (`lorakit eval`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from lorakit import hub
from lorakit.data import AnyRecords, Document, StoredRecords
from lorakit.differences import Difference, mean_difference, metric_differences
from lorakit.durable import JsonObject
from lorakit.errors import UsageError
from lorakit.session.answers import AnswerMetrics
from lorakit.session.coding import Coded, EvalRows
from lorakit.session.measuring import Evaluation
from lorakit.session.session import Session
from lorakit.session.spec import SessionSpec
from lorakit.session.tokenizers import common_tokenizer, own_tokenizer
from lorakit.tasks import Meter, Task, agree_on_padding
from lorakit.tasks.metrics import BASELINES, LOSSES

BASE, ADAPTER = "base", "adapter"

GENERAL_TEXT = Path(__file__).with_name("general_text.jsonl")
"""Text outside most tasks: beginnings of topics of the documentation of Python 3.11, under its license PSF-2.0."""

Array: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"


@dataclass(frozen=True)
class Measured:
    """The evaluation of a base or of an adapter.

    Attributes:
        name: Name of the adapter, or "base".
        evaluation: The loss and the metrics.
        task: The task.
        coded: The rows as they were evaluated.
        answers: The results of each record's answer, see `AnswerMetrics.measure`; empty without metrics of answers.
        answer_metrics: Name of a metric of answers -> fraction of the records whose answer is right.
        reference: Name of what it is compared with, or None.
        differences: "loss" or the name of a metric -> its difference from the reference.
        unit: Noun for one of the documents of the differences.
    """

    name: str
    evaluation: Evaluation
    task: Task = field(repr=False)
    coded: Coded = field(repr=False)
    answers: Sequence[JsonObject] = field(default=(), repr=False)
    answer_metrics: Mapping[str, float] = field(default_factory=dict)
    reference: str | None = None
    differences: Mapping[str, Difference] = field(default_factory=dict)
    unit: str = "row"

    def rows(self, records: AnyRecords) -> Iterator[JsonObject]:
        """Yield the results of each row that was evaluated, or has an answer, in the order of the records.

        Raises:
            UsageError: The loss of the task compares rows, so a row has no result of its own.
        """
        evaluation, record_of = self.evaluation, np.asarray(self.coded.record_of, np.int64)
        if len(evaluation.row_losses) != len(record_of):
            text = f"the loss of the task {self.task.name} compares rows, so there are no results of single rows."
            raise UsageError(text, what=self.task.name, field="output_file")
        without = [at for at in range(len(self.answers)) if at not in {*record_of.tolist()}]
        places = [(int(record_of[at]), at) for at in np.argsort(record_of, kind="stable")]
        documents = _documents(records, np.concatenate([record_of, np.asarray(without, np.int64)]))[0]
        places += [(number, len(record_of) + at) for at, number in enumerate(without)]
        for number, at in sorted(places, key=lambda place: place[0]):
            record = records[number]
            row: JsonObject = {"name": self.name, "source": record.source, "line": record.line}
            row |= {"document": int(documents[at]), "tokens": 0, "loss_sum": 0.0}
            if at < len(record_of):
                row |= {"tokens": evaluation.row_counts[at], "loss_sum": evaluation.row_losses[at]}
                row |= {name: value for name, value in self._metrics_of(at).items() if value == value}
            yield {**row, **(self.answers[number] if self.answers else {})}

    def _metrics_of(self, at: int) -> dict[str, float]:
        meter, names = self.evaluation.meter, _metric_names(self.task)
        return {} if meter is None else dict(zip(names, _metrics(meter, names, np.array([at])), strict=True))


def compare(
    spec: SessionSpec,
    data: Sequence[EvalRows],
    reference: str = BASE,
    say: Callable[[str], None] = lambda _: None,
    detail: Callable[[str], None] = lambda _: None,
    metrics: AnswerMetrics = AnswerMetrics(),  # noqa: B008 - frozen, so it can be shared
) -> list[list[Measured]]:
    """Measure a base model's loss and metrics, alone and with each adapter, on the same data, and compare the adapters.

    An adapter that was saved with its own tokenizer (for example, because it adds tokens) is an exception: for this
    adapter, the same data is tokenized with the adapter's tokenizer. If the adapters' tokenizers differ from the base's
    only in the same chat template, the base is measured with it, as in training. A base without a head for the task, or
    whose chat template does not render the data, is not measured alone. The dtype "auto" is that of the machine.

    The differences from the evaluation named `reference` are paired by documents: rows of the data, or their groups;
    parts of the document if there is only one. There are none if it has other tokens, except those of answers.

    Args:
        spec: The base and the adapters.
        data: Rows of the same task, each of which is measured on its own.
        reference: "base" or the name of an adapter.
        say: Receives messages.
        detail: Receives the row and token counts.
        metrics: Metrics of answers to the first data.

    Returns:
        For each of the data: first the base, named "base", then each adapter, in the given order.

    Raises:
        ConfigError: The batch size is below 1, or the maximum length is below 2.
        AdapterFileError: An adapter does not match this base.
        LorakitError: The data or the model cannot be used; the error class and message say why.
    """
    hub.require(spec.source, tokenizer=True)
    tokenizer = common_tokenizer(spec.source, [files.folder for files in spec.files])
    owned = {name: own_tokenizer(files.folder, tokenizer) for name, files in spec.adapters.items()}
    codings = [rows.coding(spec, tokenizer) for rows in data]
    task = codings[0].task
    metrics.check(codings[0])
    tokenizers = [tokenizer, *(own for own in owned.values() if own is not None)]
    agree_on_padding(task, spec.source, tokenizers)
    coded = [coding.all_coded(tokenizer, owned, say, detail) for coding in codings]
    spec = replace(spec, task=task).on_machine(detail)
    found = [dict[str, Measured]() for _ in data]
    with Session(spec, tokenizer) as session:

        def measure(name: str, adapter: str | None) -> None:
            for number, (base, by_name) in enumerate(coded):
                one = base if adapter is None else by_name[name]
                if one is not None:
                    evaluation, answers = session.measure(one.batches(), adapter), list[JsonObject]()
                    if metrics.names and not number:
                        answers = metrics.measure(session, codings[0], owned.get(name) or tokenizer, adapter)
                    found[number][name] = Measured(name, evaluation, task.task, one, answers, metrics.means(answers))

        if session.new_modules:
            say(f"The model has no weights for {', '.join(session.new_modules)}, so it is measured only with adapters.")
        else:
            measure(BASE, None)
        # embedding rows added for new tokens stay in the base and would change the losses of later adapters, so
        # adapters with smaller vocabularies go first
        for name, files in sorted(spec.adapters.items(), key=lambda item: item[1].vocabulary):
            session.load_adapter(ADAPTER, files)
            measure(name, ADAPTER)
            session.unload_adapter(ADAPTER)
    names = [BASE, *spec.adapters]
    return [
        [_compared(place[name], place.get(reference), rows.records) for name in names if name in place]
        for place, rows in zip(found, data, strict=True)
    ]


def _compared(one: Measured, other: Measured | None, records: AnyRecords) -> Measured:
    """Return a measurement with its differences from another one."""
    if other is None or one is other or one.name == BASE:
        return one
    differences = dict[str, Difference]()
    documents, unit = _documents(records, np.asarray(one.coded.record_of))
    if one.coded is other.coded:
        differences |= _differences(one.task, one.evaluation, other.evaluation, documents)
    if one.answers:
        documents, unit = _documents(records, np.arange(len(records)))
        for name in one.answer_metrics:
            right, before = (
                np.bincount(documents, [row[name] is True for row in each.answers]) for each in (one, other)
            )
            differences[name] = mean_difference(right, before, np.bincount(documents), is_loss=False)
    return replace(one, reference=other.name, differences=differences, unit=unit) if differences else one


def _documents(records: AnyRecords, record_of: Array) -> tuple[Array, str]:
    """Return the number of the document of each row (rows,), and what a document is called."""
    groups = records.group_keys() if isinstance(records, StoredRecords) else None
    if groups is not None:
        return np.unique(groups, return_inverse=True)[1][record_of], "group"
    if not isinstance(records[0], Document):
        return record_of, "row"
    if len(np.unique(record_of)) > 1:
        return record_of, "document"
    return np.arange(len(record_of)), "part"


def _differences(task: Task, one: Evaluation, other: Evaluation, documents: Array) -> dict[str, Difference]:
    found = dict[str, Difference]()
    if len(one.row_losses) == len(documents):  # otherwise the losses are those of batches
        place = np.unique(documents, return_inverse=True)[1]
        sums, reference, counts = (
            np.bincount(place, part) for part in (one.row_losses, other.row_losses, one.row_counts)
        )
        found["loss"] = mean_difference(sums, reference, counts)
    names = [name for name in _metric_names(task) if name in one.metrics]
    if names and one.meter is not None and other.meter is not None:
        values = [partial(_metrics, meter, names) for meter in (one.meter, other.meter)]
        differences = metric_differences(values[0], values[1], documents, [name in LOSSES for name in names])
        found |= zip(names, differences, strict=True)
    return found


def _metric_names(task: Task) -> list[str]:
    return [name for name in task.summary if name not in BASELINES.values()]


def _metrics(meter: Meter, names: Sequence[str], rows: Array) -> list[float]:
    """Return metrics over rows with these positions (rows,), NaN if they do not define one."""
    found = meter.measure([meter.rows[at] for at in rows])
    values = [found.get(name, "") for name in names]
    return [float("nan") if isinstance(value, str) else value for value in values]
