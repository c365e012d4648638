"""The interface of a task: how records become batches, what the loss is, and how predictions are scored."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as Many
from dataclasses import dataclass, field, fields
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from lorakit.config import TaskType
from lorakit.data import (
    AnyRecords,
    Batch,
    Encoded,
    Loader,
    Overlong,
    Record,
    Split,
    TokenCache,
    Tokenizer,
    by_length,
    order_by_length,
)
from lorakit.data.encoding import IGNORED, Sequence
from lorakit.data.loader import Collate
from lorakit.durable import JsonObject
from lorakit.errors import NonFiniteError
from lorakit.hub import WITH_NEW_HEADS, ModelSource
from lorakit.speed import Acceleration
from lorakit.tasks.metrics import Score
from lorakit.tasks.target import LabelOptions, Target

Metrics: TypeAlias = Mapping[str, Score]
"""Name of a metric -> value, or the reason why it has none."""


@dataclass(frozen=True)
class EncodeOptions:
    """Options for the encoding of rows.

    Attributes:
        max_length: Maximum length of a text in tokens.
        overlong: What happens to longer rows; see `lorakit.data.encode`.
        watch: Function that is called repeatedly with the number of bytes read so far, or None.
        cache: Where the tokens are kept for later runs, or None.
        visit: Function that is called with each record and its content key, or None.
        is_labeled: Whether rows must have labels; rows to predict do not have them.
        prompt: Text that is put before each text of a pair.
        shown: Number of sequences of a record to encode with the text of their tokens; None for all, without text.
    """

    max_length: int
    overlong: Overlong = "truncate"
    watch: Callable[[int], None] | None = None
    cache: TokenCache | None = None
    visit: Callable[[Record, bytes], None] | None = None
    is_labeled: bool = True
    prompt: str = ""
    shown: int | None = None

    def inputs(self) -> JsonObject:
        """Return the options that the tokens depend on, for the key of the token cache."""
        others = ("watch", "cache", "visit", "is_labeled", "shown")
        return {one.name: getattr(self, one.name) for one in fields(self) if one.name not in others}


@dataclass
class Meter:
    """Collects predictions of an evaluation and computes metrics; meters of several processes are merged.

    Attributes:
        read: Function of a batch and the model's output for it, shape (rows, ...) or (texts per row, rows, width), that
            returns what the metrics need of each row.
        measure: Function that returns the metrics over what was read of some rows.
        rows: What was read of all rows so far.
    """

    read: Callable[[Batch, Tensor], Many[Any]]
    measure: Callable[[Many[Any]], Metrics]
    rows: list[Any] = field(default_factory=list)

    def add(self, batch: Batch, output: Tensor) -> None:
        """Add the output of the model for a batch, of any shape that `read` takes."""
        self.rows += self.read(batch, output)

    def merge(self, other: Meter) -> None:
        """Add everything that another meter of the same kind has collected."""
        self.rows += other.rows

    def result(self) -> Metrics:
        """Return the metrics over all rows."""
        return self.measure(self.rows)


LossSum: TypeAlias = Callable[[nn.Module, Batch, "str | torch.device", "Acceleration | None"], Tensor]
"""Function that runs a model on a batch and returns the loss, summed over the batch's targets."""


@dataclass(frozen=True)
class Objective:
    """Loss and metrics of a run.

    Attributes:
        loss_sum: Function that runs the model and returns the summed loss.
        forward: Function that runs the model on a batch and returns what `loss` and the meter read; None if `loss_sum`
            computes the loss without it.
        loss: Function that returns the summed loss of a batch, given what `forward` returned.
        meter: Function that creates a meter, or None if only the loss is measured.
        row_losses: Function that runs the model on a batch without gradients, and returns the summed loss of each row
            (rows,), or None if rows are measured one at a time. Raises NotYetSupported if it cannot do so for a model.
        counts: Function that returns the number of targets of each row of a batch (rows,); None if the loss compares
            the rows of a batch, so that a row has no loss of its own.
        label_losses: Function that runs the model on a batch without gradients, and returns the loss of each target
            (targets,), in the order of the rows; None if `loss` is applied to the output of each row.
    """

    collate: Collate
    loss_sum: LossSum
    forward: Callable[[nn.Module, Batch, str | torch.device], Tensor] | None = None
    loss: Callable[[Tensor, Batch], Tensor] | None = None
    meter: Callable[[], Meter] | None = None
    row_losses: Callable[[nn.Module, Batch, str | torch.device], Tensor] | None = None
    counts: Callable[[Batch], Tensor] | None = None
    label_losses: LossSum | None = None


def objective(
    collate: Collate,
    forward: Callable[[nn.Module, Batch, str | torch.device], Tensor],
    loss: Callable[[Tensor, Batch], Tensor],
    meter: Callable[[], Meter],
    counts: Callable[[Batch], Tensor] | None = None,
) -> Objective:
    """Return an objective whose loss is a function of the model's output."""

    def loss_sum(
        model: nn.Module, batch: Batch, device: str | torch.device, acceleration: Acceleration | None = None
    ) -> Tensor:
        return loss(forward(model, batch, device), batch)

    return Objective(collate, loss_sum, forward, loss, meter, counts=counts)


def label_counts(batch: Batch) -> Tensor:
    """Return the number of labels of each row (rows,) that contribute to the loss."""
    return (batch.labels != IGNORED).sum(1)


def one_per_row(batch: Batch) -> Tensor:
    """Return 1 for each row (rows,), whose label is one target."""
    return torch.ones(len(batch.input_ids), dtype=torch.long)


def evaluation_batches(
    task: Task, collate: Collate, sequences: Many[Sequence], rows: int, pad_id: int
) -> Iterable[Batch]:
    """Return the batches of an evaluation; those of short rows have more, unless the loss compares a batch's rows."""
    if task.needs_batch:
        return Loader(sequences, rows, 0, shuffle=False, epochs=1, pad_id=pad_id, collate=collate)
    return by_length(sequences, rows, pad_id, collate)


def evaluation_order(task: Task, sequences: Many[Sequence]) -> Many[int]:
    """Return the positions of the sequences in the order in which `evaluation_batches` has them."""
    return range(len(sequences)) if task.needs_batch else order_by_length(sequences)


def inputs_on(batch: Batch, device: str | torch.device) -> dict[str, Tensor]:
    """Return the model's inputs for a batch, on a device."""
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, **batch.extra}
    return {name: value.to(device) for name, value in inputs.items()}


def finite(output: Tensor) -> Tensor:
    """Return a model's output, of any shape, for rows to predict; a NonFiniteError for NaN or infinite values."""
    if not output.isfinite().all():
        raise NonFiniteError("the base or the adapter produces non-finite values.", what="predictions")
    return output


def without_cache(model: nn.Module) -> dict[str, bool]:
    """Return the argument that keeps a decoder from storing keys and values, which training does not read."""
    return {"use_cache": False} if hasattr(getattr(model, "config", None), "use_cache") else {}


@dataclass(frozen=True)
class PredictContext:
    """Inputs of a prediction besides the model and the rows; `max_new_tokens` limits a generated text."""

    device: torch.device
    target: Target
    tokenizer: Tokenizer
    max_new_tokens: int = 256


Predict: TypeAlias = "Callable[[nn.Module, Batch, Many[Record], PredictContext], list[JsonObject]]"
"""Function that returns a prediction for each row of a batch as JSON values, given the rows' records."""


@dataclass(frozen=True)
class Task:
    """A task that a model can be trained for.

    Attributes:
        name: Name of the task, a value of `--task`.
        adapter_task: `task_type` in the adapter's config.
        loader: Key of `lorakit.hub.TASKS`: the transformers class that loads the model.
        formats: Names of the data shapes that the task supports.
        unit: What contributes to the loss: "token" or "row".
        target: Function that reads from the data what is predicted; raises DataError if the labels cannot be used.
        encode: Function that encodes records; raises DataError if nothing is left to train on.
        encode_one: Function that encodes a record of a stream in the same way, and counts nothing.
        objective: Function that returns the loss and the metrics for a target.
        predict: Function that predicts rows, or None if the task generates text (`lorakit generate`).
        inputs: Names of the data shapes that `predict` supports; empty if they are those in `formats`.
        summary: Names of the metrics that a result shows, most important first.
        generates: Whether the model continues text, so that chat templates and new tokens apply.
        needs_batch: Whether the loss compares the rows of a batch.
        on_model: Function that adds to a target what the model's files say; raises LorakitError if they do not fit.
    """

    name: str
    adapter_task: TaskType
    loader: str
    formats: tuple[str, ...]
    unit: str
    target: Callable[[Split, LabelOptions], Target]
    encode: Callable[[AnyRecords, Tokenizer, Target, EncodeOptions], Encoded]
    encode_one: Callable[[Record, Tokenizer, Target, EncodeOptions], Many[Sequence]]
    objective: Callable[[Target], Objective]
    predict: Predict | None = None
    inputs: tuple[str, ...] = ()
    summary: tuple[str, ...] = ()
    generates: bool = False
    needs_batch: bool = False
    on_model: Callable[[Target, ModelSource], Target] = lambda target, source: target

    @property
    def has_head(self) -> bool:
        """Whether the model has an output for each class or tag, or one for a score."""
        return self.loader in WITH_NEW_HEADS
