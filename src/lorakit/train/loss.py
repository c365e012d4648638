"""The loss of a batch as a sum over its trained tokens, so that any split of a step adds up to the same number.

Knows nothing about adapters, optimizers or files.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

IGNORED = -100
"""The label of a position that is not trained on."""


def trained_tokens(labels: torch.Tensor) -> int:
    """How many positions of a batch count in its loss.

    Args:
        labels: (rows, length); the first column is never predicted, so it does not count.

    Returns:
        The number of labels after the first column that are not `IGNORED`.
    """
    return int((labels[:, 1:] != IGNORED).sum())


def loss_sum(
    model: nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """Cross entropy of the next token, summed over the trained tokens of a batch.   [math.md: loss]

    Args:
        model: A causal language model; its output has `logits` (rows, length, vocabulary).
        input_ids: (rows, length).
        attention_mask: (rows, length), 1 for a token, 0 for padding.
        labels: (rows, length), the input's ids or `IGNORED`; shifted here.

    Returns:
        A float32 scalar. Divide by the trained tokens of the whole step to have the mean.
    """
    output: Any = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
    targets = labels[:, 1:].reshape(-1)
    logits = output.logits[:, :-1].reshape(targets.numel(), -1)  # (rows * (length - 1), vocabulary)
    kept = targets != IGNORED
    if not bool(kept.all()):  # float32 copies of rows that count for nothing would cost the most memory of the step
        logits, targets = logits[kept], targets[kept]
    return functional.cross_entropy(logits.float(), targets, reduction="sum")
