"""Causal language modeling: predict each token from the tokens before it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence as Many
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lorakit.config import TaskType
from lorakit.data import AnyRecords, Batch, Encoded, Record, Tokenizer, encode_record
from lorakit.data import encode as encode_text
from lorakit.data.encoding import IGNORED, Sequence, shown_rows
from lorakit.data.loader import padded
from lorakit.data.token_cache import TEXT
from lorakit.data.tokens import beginning
from lorakit.errors import NotYetSupported
from lorakit.identity.identities import is_plain_linear
from lorakit.speed import Acceleration, pack_rows
from lorakit.speed.loss import Head, head_for, output_head, shifted
from lorakit.tasks.labels import no_target
from lorakit.tasks.target import Target
from lorakit.tasks.task import EncodeOptions, Objective, Task


def encode(records: AnyRecords, tokenizer: Tokenizer, target: Target, options: EncodeOptions) -> Encoded:
    """Encode documents, completions and conversations; see `lorakit.data.encode`."""
    length, overlong = options.max_length, options.overlong

    def make() -> Encoded:
        return encode_text(records, tokenizer, length, options.watch, overlong=overlong, visit=options.visit)

    if options.cache is None or options.visit is not None:
        return make()
    return options.cache.fetch(records, [length, overlong, beginning(tokenizer)], make, TEXT)


def encode_one(record: Record, tokenizer: Tokenizer, target: Target, options: EncodeOptions) -> Many[Sequence]:
    """Encode one record; see `lorakit.data.encode_record`."""
    if options.shown is not None:
        rows = shown_rows(record, tokenizer, options.max_length, options.overlong)
        return list(itertools.islice(rows, options.shown))
    return encode_record(record, tokenizer, options.max_length, options.overlong)


def loss_sum(
    model: nn.Module, batch: Batch, device: str | torch.device, acceleration: Acceleration | None = None
) -> Tensor:
    """Return the next-token cross entropy, summed over the tokens in a batch that contribute to the loss.

    Each label other than -100 is compared with the logits (rows, length, vocabulary) at the previous position. The
    result is a float32 scalar (float64 for a float64 model). The mean loss of a step is the total of these scalars over
    the step's batches, divided by the number of tokens in the step that contribute to the loss.
    """
    inputs, labels = _inputs(batch, device, acceleration)
    if acceleration is not None and acceleration.head is not None and acceleration.head.applies():
        return acceleration.head.loss_sum(model, labels, **inputs)
    return functional.cross_entropy(*_logits(model, inputs, labels.to(device)), reduction="sum")


def label_losses(
    model: nn.Module, batch: Batch, device: str | torch.device, acceleration: Acceleration | None = None
) -> Tensor:
    """Return the next-token cross entropy of each token with loss (tokens,), in float32 or wider, in row order."""
    inputs, labels = _inputs(batch, device, acceleration)
    if acceleration is not None and acceleration.head is not None and acceleration.head.applies():
        return acceleration.head.label_losses(model, labels, **inputs)
    return functional.cross_entropy(*_logits(model, inputs, labels.to(device)), reduction="none")


def row_losses(model: nn.Module, batch: Batch, device: str | torch.device) -> Tensor:
    """Return the next-token cross entropy of each row (rows,), summed over its tokens with loss, in float32 or wider.

    Up to rounding, this is `loss_sum` of each row alone, without the logits of the whole batch: the head gets only the
    last position of each row, and its input, the hidden states, is multiplied by its weight row by row. This requires
    that the logits are the output of the head, possibly scaled or soft-capped, which is checked with the logits of the
    last positions. Rows are padded on the right.

    Raises:
        NotYetSupported: The logits are not a function of the output of a frozen linear head.
    """
    head = output_head(model)
    if head is None or not is_plain_linear(head):
        raise _unsupported("its head is not a plain linear module")
    hidden, outputs = list[Tensor](), list[Tensor]()

    def shorten(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if not args or args[0].shape[:-1] != batch.input_ids.shape:
            return args
        hidden.append(args[0])
        return (args[0][:, -1:].contiguous(), *args[1:])  # strides between the rows would copy the weight for each row

    def keep(_: nn.Module, args: object, output: Tensor) -> None:
        outputs.append(output)

    handles = [head.register_forward_pre_hook(shorten), head.register_forward_hook(keep)]
    try:
        inputs, _ = _inputs(batch, device, None)
        output = model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    is_known = len(outputs) == len(hidden) == 1
    known = head_for(head, outputs[0] if is_known else None, getattr(output, "logits", None), model)
    if not isinstance(known, Head):
        raise _unsupported(known)
    targets = shifted(batch.labels, IGNORED)
    return torch.stack([known.loss(row, wanted, 1.0, IGNORED) for row, wanted in zip(hidden[0], targets, strict=True)])


def _unsupported(reason: str) -> NotYetSupported:
    return NotYetSupported(f"the losses of rows are computed one row at a time: {reason}.", what=reason, field="batch")


def _inputs(
    batch: Batch, device: str | torch.device, acceleration: Acceleration | None
) -> tuple[dict[str, Any], Tensor]:
    """Return the model's arguments and the labels (rows, length), packed into one row if the acceleration allows it."""
    inputs: dict[str, Any] = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    labels = batch.labels
    if acceleration is not None and acceleration.packs and batch.tokens < batch.input_ids.numel():
        inputs, labels = pack_rows(batch.input_ids, batch.attention_mask, labels)
    for name, value in inputs.items():  # sequence boundaries stay on the CPU, where reading them does not stall the GPU
        if isinstance(value, Tensor) and not name.startswith("cu_seq_lens"):
            inputs[name] = value.to(device)
    return {**inputs, "use_cache": False}, labels


def _logits(model: nn.Module, inputs: dict[str, Any], labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logits (tokens, vocabulary) that predict labels, in float32 or wider, and these labels (tokens,)."""
    output = model(**inputs)
    targets = labels[:, 1:].reshape(-1)
    logits = output.logits[:, :-1].reshape(targets.numel(), -1)  # (rows * (length - 1), vocabulary)
    kept = targets != IGNORED
    if not bool(kept.all()):  # copy only the needed logits to float32, because the copy is the largest tensor
        logits, targets = logits[kept], targets[kept]
    if logits.dtype != torch.float64:
        logits = logits.float()
    return logits, targets


def target_counts(batch: Batch) -> Tensor:
    """Return the number of tokens of each row (rows,) that contribute to the loss; none precedes the first one."""
    return (batch.labels[:, 1:] != IGNORED).sum(1)


def _objective(target: Target) -> Objective:
    return Objective(padded, loss_sum, row_losses=row_losses, counts=target_counts, label_losses=label_losses)


CAUSAL_LM = Task(
    name="causal-lm",
    adapter_task=TaskType.CAUSAL_LM,
    loader="causal",
    formats=("text", "prompt-completion", "messages", "alpaca", "sharegpt", "question-answer", "source-target"),
    unit="token",
    target=no_target,
    encode=encode,
    encode_one=encode_one,
    objective=_objective,
    generates=True,
)
