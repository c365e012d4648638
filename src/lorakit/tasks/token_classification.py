"""Token classification: a tag for each word, such as the entity that the word belongs to.

Only the first token of each word has a label; the loss is the cross entropy of the words' tags.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from lorakit.config import TaskType
from lorakit.data import AnyRecords, Batch, Record, Tagged, Tokenizer
from lorakit.data.encoding import IGNORED
from lorakit.data.loader import padded
from lorakit.durable import JsonObject
from lorakit.tasks.encoding import TAGGED, EncodedRows, encode_row, encode_rows
from lorakit.tasks.labels import tag_target
from lorakit.tasks.metrics import BASELINES, span_metrics
from lorakit.tasks.spans import SpanReader
from lorakit.tasks.target import Target
from lorakit.tasks.task import (
    EncodeOptions,
    Metrics,
    Objective,
    PredictContext,
    Task,
    finite,
    inputs_on,
    label_counts,
    objective,
    without_cache,
)


def encode(records: AnyRecords, tokenizer: Tokenizer, target: Target, options: EncodeOptions) -> EncodedRows:
    """Encode tagged words; see `encode_rows`."""
    return encode_rows(records, tokenizer, target, options, TAGGED)


def forward(model: nn.Module, batch: Batch, device: str | torch.device) -> Tensor:
    """Return the logits of a batch, shape (rows, length, tags), in float32."""
    return model(**inputs_on(batch, device), **without_cache(model)).logits.float()


def loss(logits: Tensor, batch: Batch) -> Tensor:
    """Return the summed loss over the words of a batch, a scalar."""
    labels = batch.labels.to(logits.device)
    return functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")


class TagMeter:
    """Collects the predicted and the true tags of an evaluation."""

    def __init__(self, target: Target) -> None:
        self._names, self._reader = target.names, SpanReader(target.names, target.scheme)
        self._guesses: list[list[str]] = []
        self._tags: list[list[str]] = []

    def add(self, batch: Batch, output: Tensor) -> None:
        """Add the logits of a batch, shape (rows, length, tags)."""
        for guesses, labels in zip(output.argmax(-1).tolist(), batch.labels.tolist(), strict=True):
            kept = [(guess, label) for guess, label in zip(guesses, labels, strict=True) if label != IGNORED]
            self._guesses.append([self._names[guess] for guess, _ in kept])
            self._tags.append([self._names[label] for _, label in kept])

    def merge(self, other: TagMeter) -> None:
        """Add everything that another meter has collected."""
        self._guesses += other._guesses
        self._tags += other._tags

    def result(self) -> Metrics:
        """Return the metrics over all batches; see `span_metrics`."""
        return span_metrics(self._guesses, self._tags, self._reader)


def predict(model: nn.Module, batch: Batch, records: Sequence[Record], context: PredictContext) -> list[JsonObject]:
    """Return the tag of each word (None without a token), and the spans that the tags form, if the scheme has spans."""
    names, found = context.target.names, list[JsonObject]()
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
        found.append({"tags": tags, **({"spans": spanned} if reader.has_spans else {})})
    return found


def _objective(target: Target) -> Objective:
    return objective(padded, forward, loss, partial(TagMeter, target), label_counts)


TOKEN_CLASSIFICATION = Task(
    name="token-classification",
    adapter_task=TaskType.TOKEN_CLS,
    loader="token-classification",
    formats=("token-classification",),
    unit="token",
    target=tag_target,
    encode=encode,
    encode_one=partial(encode_row, encoder=TAGGED),
    objective=_objective,
    predict=predict,
    summary=("f1", "accuracy", BASELINES["accuracy"]),
)
