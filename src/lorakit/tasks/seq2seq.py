"""Sequence to sequence: a target text for each source text, with encoder-decoder models such as T5."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from lorakit.config import TaskType
from lorakit.data import AnyRecords, Batch, Encoded, Record, Tokenizer
from lorakit.data.encoding import IGNORED
from lorakit.data.encoding import Sequence as Row
from lorakit.data.loader import padded_ids
from lorakit.durable import JsonObject
from lorakit.tasks.encoding import TRANSLATIONS, encode_row, encode_rows
from lorakit.tasks.labels import no_target
from lorakit.tasks.target import Target
from lorakit.tasks.task import (
    EncodeOptions,
    Meter,
    Metrics,
    Objective,
    PredictContext,
    Task,
    inputs_on,
    label_counts,
    objective,
)


def encode(records: AnyRecords, tokenizer: Tokenizer, target: Target, options: EncodeOptions) -> Encoded:
    """Encode sources and targets; see `encode_rows`."""
    note = _language_note(tokenizer) if options.is_labeled else ""
    return encode_rows(records, tokenizer, replace(target, note=note), options, TRANSLATIONS)


def _language_note(tokenizer: Tokenizer) -> str:
    """Return a message if a tokenizer that marks each text with its language gives targets that of the sources."""
    source, target = (getattr(tokenizer, name, None) for name in ("src_lang", "tgt_lang"))
    if source is None or target not in (None, source):
        return ""
    return (
        f"The tokenizer marks targets with the language of the sources, {source}; for another language, set "
        '"src_lang" and "tgt_lang" in tokenizer_config.json.'
    )


def collate(rows: list[Row], pad_id: int, epoch: float) -> Batch:
    """Combine sequences into a padded batch; its labels have shape (rows, target length), -100 for padding."""
    ids, mask = padded_ids([row.input_ids for row in rows], pad_id)
    targets = [torch.tensor(list(row.labels), dtype=torch.long) for row in rows]
    labels = pad_sequence(targets, batch_first=True, padding_value=IGNORED)
    trained = sum(len(target) for target in targets)
    return Batch(ids, mask, labels, epoch, sum(len(row.input_ids) for row in rows) + trained, trained)


def forward(model: nn.Module, batch: Batch, device: str | torch.device) -> Tensor:
    """Return the logits of a batch, shape (rows, target length, vocabulary)."""
    prepare: Any = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    labels = batch.labels.to(device, copy=True)  # FSMT replaces -100 in place
    # models without the method, such as M2M100, shift the labels themselves, and compute a loss that is not used
    targets = {"labels": labels} if prepare is None else {"decoder_input_ids": prepare(labels=labels)}
    return model(**inputs_on(batch, device), **targets, use_cache=False).logits


def loss(logits: Tensor, batch: Batch) -> Tensor:
    """Return the summed loss over the target tokens of a batch, a scalar."""
    labels = batch.labels.to(logits.device).flatten()
    kept = labels != IGNORED
    return functional.cross_entropy(logits.flatten(0, 1)[kept].float(), labels[kept], reduction="sum")


def _right_tokens(batch: Batch, logits: Tensor) -> list[tuple[int, int]]:
    """Return how many target tokens of each row the model predicts, given those before them, and how many there are.

    The logits have shape (rows, target length, vocabulary).
    """
    labels = batch.labels.to(logits.device)
    kept = labels != IGNORED
    right = (logits.argmax(-1) == labels) & kept
    return list(zip(right.sum(1).tolist(), kept.sum(1).tolist(), strict=True))


def _token_accuracy(rows: Sequence[tuple[int, int]]) -> Metrics:
    right, total = (sum(part) for part in zip(*rows, strict=True))
    return {"token_accuracy": right / max(1, total)}


def predict(model: nn.Module, batch: Batch, records: Sequence[Record], context: PredictContext) -> list[JsonObject]:
    """Return the text that the model generates for each row, always choosing the most likely token."""
    generator: Any = model
    ids = generator.generate(
        **inputs_on(batch, context.device), max_new_tokens=context.max_new_tokens, do_sample=False, num_beams=1
    )
    decode: Any = context.tokenizer
    return [{"text": text} for text in decode.batch_decode(ids, skip_special_tokens=True)]


def _objective(target: Target) -> Objective:
    return objective(collate, forward, loss, partial(Meter, _right_tokens, _token_accuracy), label_counts)


SEQ2SEQ = Task(
    name="seq2seq",
    adapter_task=TaskType.SEQ_2_SEQ_LM,
    loader="seq2seq",
    formats=("source-target", "prompt-completion", "alpaca", "question-answer"),
    unit="token",
    target=no_target,
    encode=encode,
    encode_one=partial(encode_row, encoder=TRANSLATIONS),
    objective=_objective,
    predict=predict,
    summary=("token_accuracy",),
)
