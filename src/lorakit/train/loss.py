"""The loss of a batch as a sum over its trained tokens, so that any split of a step adds up to the same number.

Knows nothing about adapters, optimizers or files.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from lorakit.data import Batch
from lorakit.data.sequences import IGNORED
from lorakit.speed import Acceleration, end_to_end


def loss_sum(
    model: nn.Module, batch: Batch, device: str | torch.device, fast: Acceleration | None = None
) -> torch.Tensor:
    """Cross entropy of the next token, summed over the trained tokens of a batch.

    Args:
        model: A causal language model; its output has `logits` (rows, length, vocabulary).
        batch: Rows on the CPU; a label that is not -100 is trained, from the position before it.
        device: Where the model is.
        fast: What `accelerate` made of the model, or None.

    Returns:
        A float32 scalar (float64 for a float64 model). Divided by the trained tokens of the whole step it is the mean.
    """
    inputs: dict[str, Any]
    inputs, labels = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}, batch.labels
    if fast is not None and fast.packs and batch.tokens < batch.input_ids.numel():
        inputs, labels = end_to_end(batch.input_ids, batch.attention_mask, labels)
    for name, value in inputs.items():  # boundaries are read here, where nothing waits for a device
        if isinstance(value, torch.Tensor) and not name.startswith("cu_seq_lens"):
            inputs[name] = value.to(device)
    if fast is not None and fast.head is not None and fast.head.applies():
        return fast.head.loss_sum(model, labels, **inputs, use_cache=False)
    output: Any = model(**inputs, use_cache=False)
    labels = labels.to(device)
    targets = labels[:, 1:].reshape(-1)
    logits = output.logits[:, :-1].reshape(targets.numel(), -1)  # (rows * (length - 1), vocabulary)
    kept = targets != IGNORED
    if not bool(kept.all()):  # rows that count for nothing would cost a float32 copy each, the step's largest memory
        logits, targets = logits[kept], targets[kept]
    if logits.dtype != torch.float64:
        logits = logits.float()
    return functional.cross_entropy(logits, targets, reduction="sum")
