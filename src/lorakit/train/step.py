"""How much memory this process has needed; the kernel's own count, no package.

Knows nothing about training.

Whether memory ran out, and what is left to do for the run. Knows settings by name, nothing of models.

The loss of a batch as a sum over its trained tokens, so that any split of a step adds up to the same number.

Knows nothing about adapters, optimizers or files.

One optimizer step: forward and backward over its batches, clipping, AdamW. All the arithmetic of training is here.

Knows nothing about files, intervals or progress.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from lorakit.data import Batch
from lorakit.data.encoding import IGNORED
from lorakit.errors import DataError, NonFiniteError, RunError
from lorakit.plan.job import RECOMPUTED
from lorakit.speed import Acceleration, pack_rows
from lorakit.train.optimizer import clipped_step, gradient_norm, set_rate


@contextlib.contextmanager
def memory(batch: Batch, where: str, helps: Callable[[int], str]) -> Iterator[None]:
    """A block in which memory that runs out becomes an error that names the batch and a way out.

    Args:
        batch: What is computed in the block.
        where: "in" or the like, before "a batch of …".
        helps: Gives a sentence for so many rows.

    Raises:
        RunError: Memory ran out.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as cause:
        if not _is_out_of_memory(cause):
            raise
        rows, length = batch.input_ids.shape
        raise RunError(f"memory ran out {where} a batch of {rows} rows of {length} tokens. {helps(rows)}") from cause


def relief(rows: int, recompute: str, *, accelerated: bool, budgeted: bool) -> str:
    """What makes a step need less, in the order in which to try it, without what is done already.

    Args:
        rows: Rows of the batch that memory ran out in.
        recompute: What the backward computes again, a word of `lorakit.plan.job.RECOMPUTED`.
        accelerated: Whether the model runs by the functions of `lorakit.speed.accelerate`.
        budgeted: Whether `recompute` was chosen for a memory budget, beside which it cannot be given.

    Returns:
        A sentence.
    """
    more = [way for way in RECOMPUTED[RECOMPUTED.index(recompute) + 1 :] if accelerated or way != "feed-forward"]
    helps = [] if accelerated else ["accelerated forwards (leave --no-accelerate out)"]
    if budgeted:
        helps += ["a smaller --memory-budget"] if more else []
    else:
        helps += [f"--recompute {way}" + (" (or --gradient-checkpointing)" if way == "layers" else "") for way in more]
        helps += ["--memory-budget, which chooses between these two"] if len(more) > 1 else []
    if rows > 1:
        helps.append(
            "half the --per-device-train-batch-size and twice the --gradient-accumulation-steps: the same result"
        )
    return f"What helps, to try in this order: {'; '.join([*helps, 'a smaller --max-length'])}."


def relief_of_evaluation(rows: int) -> str:
    """The same of an evaluation, which computes nothing for a backward.

    Args:
        rows: Rows of the batch that memory ran out in.
    """
    fewer = "fewer rows (--per-device-train-batch-size of train, --batch-size of eval) or " if rows > 1 else ""
    return f"What helps: {fewer}a smaller --max-length."


def _is_out_of_memory(cause: BaseException) -> bool:
    """Return whether an error means that memory ran out.

    The only place that reads torch's text: its allocators for a CPU and some of its libraries raise a plain
    RuntimeError without attributes; only the one for CUDA has a class.
    """
    if isinstance(cause, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(cause)
    return "can't allocate memory" in text or "not enough memory" in text or "out of memory" in text


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
        inputs, labels = pack_rows(batch.input_ids, batch.attention_mask, labels)
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
            raise NonFiniteError(f"the {what} became {value}, so the step was not taken.", what=what)
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
                "`load_state_dict(assign=True)` does; make the optimizer after that.",
                what=name,
            )


def _relief(trainee: Trainee, rows: int) -> str:
    return relief(rows, trainee.recompute, accelerated=trainee.fast is not None, budgeted=trainee.budgeted)
