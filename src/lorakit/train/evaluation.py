"""Loss and perplexity of a model on batches, over all trained tokens alike.

Knows nothing about training; the command `lorakit eval` uses it too.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from lorakit.data import Batch
from lorakit.errors import DataError, NonFiniteError
from lorakit.speed import Acceleration
from lorakit.train.loss import loss_sum
from lorakit.train.relief import memory, relief_of_evaluation


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
        loss: Mean cross entropy per trained token, in nats.
        tokens: Trained tokens that it is the mean of.
    """

    loss: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """exp(loss); held below infinity, for which JSON has no word.   [docs/math.md (15)]"""
        return math.exp(min(self.loss, 700.0))


def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    device: str | torch.device,
    stop: Callable[[], bool] = lambda: False,
    fast: Acceleration | None = None,
) -> Evaluation | None:
    """Mean loss over the trained tokens of all batches, without gradients and without dropout.

    Args:
        model: A causal language model; its training mode is put back afterwards.
        batches: Batches on the CPU.
        device: Where the model is.
        stop: Asked between batches; True abandons the evaluation.
        fast: What `lorakit.speed.accelerate` made of the model, or None.

    Returns:
        The evaluation, or None when it was abandoned.

    Raises:
        DataError: No batch holds a trained token.
        NonFiniteError: The loss is NaN or infinite.
        RunError: Memory ran out; the message names the batch and what helps.
    """
    total, tokens = 0.0, 0
    with evaluating(model), torch.inference_mode():
        for batch in batches:
            if stop():
                return None
            with memory(batch, "while evaluating", relief_of_evaluation):
                total += loss_sum(model, batch, device, fast).item()
            tokens += batch.trained_tokens
    if tokens == 0:
        raise DataError("The evaluation data holds no trained token; give --eval-data with more text.")
    if not math.isfinite(total):
        raise NonFiniteError(
            f"The evaluation loss is {total}; the adapter or the base holds values that are not finite."
        )
    return Evaluation(total / tokens, tokens)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode, and each module back in its own mode afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
