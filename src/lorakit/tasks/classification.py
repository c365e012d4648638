"""Classification of texts and pairs of texts (one class, several classes, or a number for each row), and of words.

The loss of a row is the cross entropy of its class; for several classes, the mean of the binary cross entropies; for a
number, the squared error; that of a word, whose first token has its tag as the label, is the cross entropy of the tag.
All equal the losses of transformers' `ForSequenceClassification` and `ForTokenClassification` models.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from lorakit.config import TaskType
from lorakit.data import Batch, Record, Tagged
from lorakit.data.encoding import IGNORED
from lorakit.data.encoding import Sequence as Row
from lorakit.data.loader import padded, padded_ids
from lorakit.durable import JsonObject
from lorakit.tasks.encoding import LABELED, TAGGED, encode_row, encode_rows
from lorakit.tasks.labels import class_target, tag_target
from lorakit.tasks.metrics import (
    BASELINES,
    Array,
    SpanReader,
    class_metrics,
    classes_metrics,
    score_metrics,
    span_metrics,
)
from lorakit.tasks.target import Target
from lorakit.tasks.task import (
    Meter,
    Metrics,
    Objective,
    PredictContext,
    Task,
    finite,
    inputs_on,
    label_counts,
    objective,
    one_per_row,
    without_cache,
)

THRESHOLD = 0.5
"""Probability from which a class is predicted, if several classes may apply."""


def collate(rows: list[Row], pad_id: int, epoch: float, target: Target) -> Batch:
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


def _labels(rows: list[Row], target: Target) -> Tensor:
    if target.kind == "classes":
        labels = torch.zeros(len(rows), len(target.names))
        for number, row in enumerate(rows):
            labels[number, list(row.labels)] = 1
        return labels
    if target.kind == "score":
        return torch.tensor([row.labels[0] if row.labels else float("nan") for row in rows])
    return torch.tensor([row.labels[0] if row.labels else IGNORED for row in rows])


def forward(model: nn.Module, batch: Batch, device: str | torch.device) -> Tensor:
    """Return the logits of a batch, shape (rows, classes) or (rows, length, tags), in float32."""
    return model(**inputs_on(batch, device), **without_cache(model)).logits.float()


def loss(logits: Tensor, batch: Batch, target: Target) -> Tensor:
    """Return the summed loss of a batch of rows or words, a scalar."""
    labels = batch.labels.to(logits.device)
    if target.kind == "score":
        return functional.mse_loss(logits.squeeze(-1), labels.to(logits.dtype), reduction="sum")
    if target.kind == "classes":
        return functional.binary_cross_entropy_with_logits(logits, labels, reduction="sum") / len(target.names)
    return functional.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORED, reduction="sum")


def _guesses(batch: Batch, logits: Tensor, target: Target) -> list[tuple[Array, Array]]:
    return list(zip(predictions(logits, target).cpu().numpy(), batch.labels.cpu().numpy(), strict=True))


def _row_metrics(rows: Sequence[tuple[Array, Array]], target: Target) -> Metrics:
    guesses, labels = (np.stack(part) for part in zip(*rows, strict=True))
    if target.kind == "score":
        return score_metrics(guesses, labels)
    return (classes_metrics if target.kind == "classes" else class_metrics)(guesses, labels, target.names)


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
    rows = list[JsonObject]()
    for guess, row in zip(predictions(logits, target).tolist(), probabilities, strict=True):
        scores = {name: round(value, 6) for name, value in zip(target.names, row, strict=True)}
        if several:
            labels = [name for name, applies in zip(target.names, guess, strict=True) if applies]
            rows.append({"labels": labels, "scores": scores})
        else:
            rows.append({"label": target.names[guess], "scores": scores})
    return rows


def _tags(batch: Batch, logits: Tensor, target: Target) -> list[tuple[list[str], list[str]]]:
    """Return the predicted and the true tags of each row, given logits (rows, length, tags)."""
    rows = []
    for guesses, labels in zip(logits.argmax(-1).tolist(), batch.labels.tolist(), strict=True):
        kept = [(guess, label) for guess, label in zip(guesses, labels, strict=True) if label != IGNORED]
        rows.append(([target.names[guess] for guess, _ in kept], [target.names[label] for _, label in kept]))
    return rows


def _word_metrics(rows: Sequence[tuple[list[str], list[str]]], target: Target) -> Metrics:
    reader = SpanReader(target.names, target.scheme)
    return span_metrics([guesses for guesses, _ in rows], [tags for _, tags in rows], reader)


def predict_tags(
    model: nn.Module, batch: Batch, records: Sequence[Record], context: PredictContext
) -> list[JsonObject]:
    """Return the tag of each word (None without a token), and the spans that the tags form, if the scheme has spans."""
    names, rows = context.target.names, list[JsonObject]()
    reader = SpanReader(names, context.target.scheme)
    guesses = finite(forward(model, batch, context.device)).argmax(-1).tolist()
    for record, row, words_of in zip(records, guesses, batch.labels.tolist(), strict=True):
        words = record.words if isinstance(record, Tagged) else ()
        tags: list[str | None] = [None] * len(words)
        for guess, word in zip(row, words_of, strict=True):
            if word != IGNORED:
                tags[word] = names[guess]
        spanned = [
            {"type": span.kind, "text": " ".join(words[span.begin : span.end]), "begin": span.begin, "end": span.end}
            for span in reader.spans(tags)
        ]
        rows.append({"tags": tags, **({"spans": spanned} if reader.has_spans else {})})
    return rows


def _objective_of_rows(target: Target) -> Objective:
    meter = partial(Meter, partial(_guesses, target=target), partial(_row_metrics, target=target))
    return objective(partial(collate, target=target), forward, partial(loss, target=target), meter, one_per_row)


def _objective_of_words(target: Target) -> Objective:
    meter = partial(Meter, partial(_tags, target=target), partial(_word_metrics, target=target))
    return objective(padded, forward, partial(loss, target=target), meter, label_counts)


CLASSIFICATION = Task(
    name="classification",
    adapter_task=TaskType.SEQ_CLS,
    loader="classification",
    formats=("classification", "text-pair"),
    unit="row",
    target=class_target,
    encode=partial(encode_rows, encoder=LABELED),
    encode_one=partial(encode_row, encoder=LABELED),
    objective=_objective_of_rows,
    predict=predict,
    summary=("accuracy", BASELINES["accuracy"], "f1_macro", "mse", "spearman"),
)

TOKEN_CLASSIFICATION = Task(
    name="token-classification",
    adapter_task=TaskType.TOKEN_CLS,
    loader="token-classification",
    formats=("token-classification",),
    unit="token",
    target=tag_target,
    encode=partial(encode_rows, encoder=TAGGED),
    encode_one=partial(encode_row, encoder=TAGGED),
    objective=_objective_of_words,
    predict=predict_tags,
    summary=("f1", "accuracy", BASELINES["accuracy"]),
)
