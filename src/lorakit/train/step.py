"""One optimizer step: forward and backward over its batches, clipping, AdamW. All the arithmetic of training is here.

Knows nothing about files, intervals or progress.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from lorakit.data import Batch
from lorakit.errors import DataError, NonFiniteError, RunError
from lorakit.speed import Acceleration
from lorakit.train.loss import loss_sum
from lorakit.train.optim import clipped_step, gradient_norm, set_rate
from lorakit.train.relief import memory, relief


@dataclass(frozen=True)
class Trainee:
    """What a step acts on.

    Attributes:
        model: The adapted model, in training mode.
        named: Its trainable tensors with their names.
        optimizer: AdamW over them.
        device: Where the model is.
        max_grad_norm: The largest gradient norm; 0 clips nothing.
        autocast: The dtype in which an accelerator computes products of float32 tensors, or None for as they are.
        fast: What `lorakit.speed.accelerate` made of the model, or None.
        recompute: What the backward computes again, a word of `lorakit.plan.job.RECOMPUTED`.
        budgeted: Whether that was chosen for a memory budget.
    """

    model: nn.Module
    named: Sequence[tuple[str, nn.Parameter]]
    optimizer: torch.optim.Optimizer
    device: torch.device
    max_grad_norm: float
    autocast: torch.dtype | None = None
    fast: Acceleration | None = None
    recompute: str = "none"
    budgeted: bool = False

    def computing(self) -> contextlib.AbstractContextManager[object]:
        """The context in which the model is called."""
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast)


@dataclass(frozen=True)
class StepResult:
    """What a step found.

    Attributes:
        loss: Mean over the trained tokens of all its batches, before the step.
        grad_norm: Norm of the gradient before clipping.
        tokens: Tokens without padding.
        trained_tokens: Tokens that the loss is the mean of.
    """

    loss: float
    grad_norm: float
    tokens: int
    trained_tokens: int


def train_step(trainee: Trainee, batches: Sequence[Batch], learning_rate: float) -> StepResult:
    """Take one optimizer step on the mean loss over the trained tokens of all batches.   [docs/math.md (14)]

    The tokens are counted before the first forward, so each batch's sum is divided by the count of the whole step and
    the gradient does not depend on how the rows are split into batches.

    Args:
        trainee: Model and optimizer; gradients of this step are left in `.grad`, clipped or not.
        batches: The step's batches, on the CPU.
        learning_rate: The rate of this step.

    Returns:
        Loss, norm and counts.

    Raises:
        NonFiniteError: Loss or gradient is NaN or infinite; no tensor has been changed.
        DataError: No batch holds a trained token.
        RunError: Memory ran out, the loss does not depend on the adapter, or a trained tensor was replaced.
    """
    trained = sum(batch.trained_tokens for batch in batches)
    if trained == 0:
        raise DataError("The rows of this step hold no trained token, so there is nothing to learn from.")
    trainee.optimizer.zero_grad(set_to_none=True)
    total = torch.zeros((), device=trainee.device)
    for batch in batches:
        with memory(batch, "in", partial(_relief, trainee)):
            with trainee.computing():
                loss = loss_sum(trainee.model, batch, trainee.device, trainee.fast)
            if not loss.requires_grad:
                raise RunError("The loss does not depend on any trainable tensor: the adapter is inactive or frozen.")
            (loss / trained).backward()
            total = total + loss.detach()
    _refuse_replaced(trainee)
    parameters = [parameter for _, parameter in trainee.named]
    norm = gradient_norm(parameters)
    mean, grad_norm = float(total) / trained, float(norm)
    for what, value in (("loss", mean), ("gradient norm", grad_norm)):
        if not math.isfinite(value):
            trainee.optimizer.zero_grad(set_to_none=True)
            raise NonFiniteError(f"the {what} became {value}, so the step was not taken")
    set_rate(trainee.optimizer, learning_rate)
    clipped_step(trainee.optimizer, parameters, norm, trainee.max_grad_norm)
    if trainee.device.type == "cuda":
        torch.cuda.synchronize(trainee.device)  # so that the step's time is the step's
    return StepResult(mean, grad_norm, sum(batch.tokens for batch in batches), trained)


def without_gradient(trainee: Trainee) -> list[str]:
    """Names of trainable tensors that the last step gave no gradient."""
    return [name for name, parameter in trainee.named if parameter.grad is None]


def _refuse_replaced(trainee: Trainee) -> None:
    """A tensor that the model has no more gets no gradient; the one in its place would never be stepped."""
    without = [(name, parameter) for name, parameter in trainee.named if parameter.grad is None]
    if not without:
        return
    held = {id(parameter) for parameter in trainee.model.parameters()}
    for name, parameter in without:
        if id(parameter) not in held:
            raise RunError(
                f"{name} is not the tensor that the optimizer was made for: another has been put in its place, as "
                "`load_state_dict(assign=True)` does; make the optimizer after that"
            )


def _relief(trainee: Trainee, rows: int) -> str:
    return relief(rows, trainee.recompute, accelerated=trainee.fast is not None, budgeted=trainee.budgeted)
