"""Classification of texts and pairs of texts: one class, several classes, or a number for each row.

The loss of a row is the cross entropy of its class; for several classes, the mean of the binary cross entropies; for a
number, the squared error. All three equal the losses of transformers' `ForSequenceClassification` models.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from lorakit.config import TaskType
from lorakit.data import AnyRecords, Batch, Record, Tokenizer
from lorakit.data.encoding import IGNORED
from lorakit.data.encoding import Sequence as Encoded
from lorakit.data.loader import padded_ids
from lorakit.durable import JsonObject
from lorakit.tasks.encoding import LABELED, EncodedRows, encode_row, encode_rows
from lorakit.tasks.labels import class_target
from lorakit.tasks.metrics import BASELINES, class_metrics, classes_metrics, score_metrics
from lorakit.tasks.target import Target
from lorakit.tasks.task import (
    EncodeOptions,
    Metrics,
    Objective,
    PredictContext,
    Task,
    finite,
    inputs_on,
    objective,
    one_per_row,
    without_cache,
)

THRESHOLD = 0.5
"""Probability from which a class is predicted, if several classes may apply."""


def encode(records: AnyRecords, tokenizer: Tokenizer, target: Target, options: EncodeOptions) -> EncodedRows:
    """Encode labeled texts; see `encode_rows`."""
    return encode_rows(records, tokenizer, target, options, LABELED)


def collate(rows: list[Encoded], pad_id: int, epoch: float, target: Target) -> Batch:
    """Combine sequences into a padded batch with labels (rows,), or (rows, classes) if several classes may apply."""
    ids, mask = padded_ids([row.input_ids for row in rows], pad_id)
    extra = {}
    if any(row.types is not None for row in rows):
        types = [row.types if row.types is not None else row.input_ids[:0] for row in rows]
        extra["token_type_ids"] = torch.zeros_like(ids)
        for number, row_types in enumerate(types):
            extra["token_type_ids"][number, : len(row_types)] = torch.tensor(list(row_types), dtype=ids.dtype)
    tokens = sum(len(row.input_ids) for row in rows)
    return Batch(ids, mask, _labels(rows, target), epoch, tokens, len(rows), extra)


def _labels(rows: list[Encoded], target: Target) -> Tensor:
    if target.kind == "classes":
        labels = torch.zeros(len(rows), len(target.names))
        for number, row in enumerate(rows):
            labels[number, list(row.labels)] = 1
        return labels
    if target.kind == "score":
        return torch.tensor([row.labels[0] if row.labels else float("nan") for row in rows])
    return torch.tensor([row.labels[0] if row.labels else IGNORED for row in rows])


def forward(model: nn.Module, batch: Batch, device: str | torch.device) -> Tensor:
    """Return the logits of a batch, shape (rows, classes), in float32."""
    return model(**inputs_on(batch, device), **without_cache(model)).logits.float()


def loss(logits: Tensor, batch: Batch, target: Target) -> Tensor:
    """Return the summed loss of a batch, a scalar."""
    labels = batch.labels.to(logits.device)
    if target.kind == "score":
        return functional.mse_loss(logits.squeeze(-1), labels.to(logits.dtype), reduction="sum")
    if target.kind == "classes":
        return functional.binary_cross_entropy_with_logits(logits, labels, reduction="sum") / len(target.names)
    return functional.cross_entropy(logits, labels, reduction="sum")


class ClassMeter:
    """Collects the predicted and the true labels of an evaluation."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._guesses: list[np.ndarray] = []
        self._labels: list[np.ndarray] = []

    def add(self, batch: Batch, output: Tensor) -> None:
        """Add the logits of a batch, shape (rows, classes)."""
        self._guesses.append(predictions(output, self._target).cpu().numpy())
        self._labels.append(batch.labels.cpu().numpy())

    def merge(self, other: ClassMeter) -> None:
        """Add everything that another meter has collected."""
        self._guesses += other._guesses
        self._labels += other._labels

    def result(self) -> Metrics:
        """Return the metrics over all batches; see `lorakit.tasks.metrics`."""
        guesses, labels = np.concatenate(self._guesses), np.concatenate(self._labels)
        if self._target.kind == "score":
            return score_metrics(guesses, labels)
        measure = classes_metrics if self._target.kind == "classes" else class_metrics
        return measure(guesses, labels, self._target.names)


def predictions(logits: Tensor, target: Target) -> Tensor:
    """Return the class or number of each row (rows,), or whether each class applies, as logits (rows, classes)."""
    if target.kind == "score":
        return logits.squeeze(-1)
    return logits.sigmoid() >= THRESHOLD if target.kind == "classes" else logits.argmax(-1)


def predict(model: nn.Module, batch: Batch, records: Sequence[Record], context: PredictContext) -> list[JsonObject]:
    """Return the label of each row, with the probability of each class, or the predicted number as `score`."""
    target = context.target
    logits = finite(forward(model, batch, context.device).cpu())
    if target.kind == "score":
        return [{"score": score} for score in logits.squeeze(-1).tolist()]
    several = target.kind == "classes"
    probabilities = (logits.sigmoid() if several else logits.softmax(-1)).tolist()
    found = list[JsonObject]()
    for guess, row in zip(predictions(logits, target).tolist(), probabilities, strict=True):
        scores = {name: round(value, 6) for name, value in zip(target.names, row, strict=True)}
        if several:
            labels = [name for name, applies in zip(target.names, guess, strict=True) if applies]
            found.append({"labels": labels, "scores": scores})
        else:
            found.append({"label": target.names[guess], "scores": scores})
    return found


def _objective(target: Target) -> Objective:
    return objective(
        partial(collate, target=target), forward, partial(loss, target=target), partial(ClassMeter, target), one_per_row
    )


CLASSIFICATION = Task(
    name="classification",
    adapter_task=TaskType.SEQ_CLS,
    loader="classification",
    formats=("classification", "text-pair"),
    unit="row",
    target=class_target,
    encode=encode,
    encode_one=partial(encode_row, encoder=LABELED),
    objective=_objective,
    predict=predict,
    summary=("accuracy", BASELINES["accuracy"], "f1_macro", "mse", "spearman"),
)
