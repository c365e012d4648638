"""Measure a base alone and with each adapter on the same rows, and compare them (`lorakit eval`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeAlias

import numpy as np

from lorakit import hub
from lorakit.data import AnyRecords, Document, StoredRecords
from lorakit.differences import Difference, mean_difference, metric_difference
from lorakit.session.coding import Coded, EvalRows
from lorakit.session.measuring import Evaluation
from lorakit.session.session import Session
from lorakit.session.spec import SessionSpec
from lorakit.session.tokenizers import common_tokenizer, own_tokenizer
from lorakit.tasks import Meter, Task, agree_on_padding
from lorakit.tasks.metrics import BASELINES, LOSSES

BASE, ADAPTER = "base", "adapter"

Array: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"


@dataclass(frozen=True)
class Measured:
    """The evaluation of a base or of an adapter.

    Attributes:
        name: Name of the adapter, or "base".
        evaluation: The loss and the metrics.
        reference: Name of what it is compared with, or None.
        differences: "loss" or the name of a metric of the task -> its difference from the reference.
        unit: Noun for one of the documents of the differences.
    """

    name: str
    evaluation: Evaluation
    reference: str | None = None
    differences: Mapping[str, Difference] = field(default_factory=dict)
    unit: str = "row"


def compare(
    spec: SessionSpec,
    rows: EvalRows,
    reference: str = BASE,
    say: Callable[[str], None] = lambda _: None,
    detail: Callable[[str], None] = lambda _: None,
) -> list[Measured]:
    """Measure a base model's loss and metrics, alone and with each adapter, on the same data, and compare the adapters.

    An adapter that was saved with its own tokenizer (for example, because it adds tokens) is an exception: for this
    adapter, the same data is tokenized with the adapter's tokenizer. If the adapters' tokenizers differ from the base's
    only in the same chat template, the base is measured with it, as in training. A base without a head for the task, or
    whose chat template does not render the data, is not measured alone. The dtype "auto" is that of the machine.

    The differences from the evaluation named `reference` are paired by documents: rows of the data, or their groups;
    parts of the document if there is only one. There are none if it has other tokens.

    Returns:
        First the base, named "base", then each adapter, in the given order.

    Raises:
        ConfigError: The batch size is below 1, or the maximum length is below 2.
        AdapterFileError: An adapter does not match this base.
        LorakitError: The data or the model cannot be used; the error class and message say why.
    """
    hub.require(spec.source, tokenizer=True)
    tokenizer = common_tokenizer(spec.source, [files.folder for files in spec.files])
    owned = {name: own_tokenizer(files.folder, tokenizer) for name, files in spec.adapters.items()}
    coding = rows.coding(spec, tokenizer)
    tokenizers = [tokenizer, *(own for own in owned.values() if own is not None)]
    agree_on_padding(coding.task, spec.source, tokenizers)
    base, coded = coding.all_coded(tokenizer, owned, say, detail)
    spec = replace(spec, task=coding.task).on_machine(detail)
    evaluations = dict[str, Evaluation]()
    with Session(spec, tokenizer) as session:
        if base is not None and session.new_modules:
            say(f"The model has no weights for {', '.join(session.new_modules)}, so it is measured only with adapters.")
        elif base is not None:
            evaluations[BASE] = session.measure(base.batches())
        # embedding rows added for new tokens stay in the base and would change the losses of later adapters, so
        # adapters with smaller vocabularies go first
        for name, files in sorted(spec.adapters.items(), key=lambda item: item[1].vocabulary):
            session.load_adapter(ADAPTER, files)
            evaluations[name] = session.measure(coded[name].batches(), ADAPTER)
            session.unload_adapter(ADAPTER)
    shared = base if reference == BASE else coded.get(reference)
    measured = [Measured(BASE, evaluations[BASE])] if BASE in evaluations else []
    for name in spec.adapters:
        one = Measured(name, evaluations[name])
        if name != reference and reference in evaluations and coded[name] is shared:
            documents, unit = _documents(rows.records, coded[name])
            differences = _differences(coding.task.task, evaluations[name], evaluations[reference], documents)
            one = replace(one, reference=reference, differences=differences, unit=unit)
        measured.append(one)
    return measured


def _documents(records: AnyRecords, coded: Coded) -> tuple[Array, str]:
    """Return the number of the document of each row (rows,), and what a document is called."""
    record_of = np.asarray(coded.record_of)
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
    for name in [name for name in task.summary if name not in BASELINES.values()]:
        if one.meter is not None and other.meter is not None and {name} <= one.metrics.keys():
            values = [partial(_metric, meter, name) for meter in (one.meter, other.meter)]
            found[name] = metric_difference(values[0], values[1], documents, is_loss=name in LOSSES)
    return found


def _metric(meter: Meter, name: str, rows: Array) -> float:
    """Return a metric over rows with these positions (rows,), NaN if they do not define it."""
    value = meter.measure([meter.rows[at] for at in rows]).get(name, "")
    return float("nan") if isinstance(value, str) else value
