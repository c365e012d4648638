"""One optimizer step: forward and backward passes over the step's batches, clipping, and the update.

The loss of a batch is a sum, not a mean, over the tokens that contribute to it, so the gradient does not depend on how
a step is split into batches. Files, evaluation intervals and progress output are handled elsewhere.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from lorakit import allocator
from lorakit.core import penalties
from lorakit.data import Batch
from lorakit.errors import DataError, NonFiniteError, RunError
from lorakit.plan.job import RECOMPUTED
from lorakit.session.measuring import oom_as_run_error
from lorakit.speed import Acceleration
from lorakit.tasks import LossSum, loss_sum
from lorakit.train.loop.gradient_sum import GradientSum
from lorakit.train.loop.optimizer import Named, check_scale, clipped_step, gradient_norm, set_rate
from lorakit.train.processes.processes import ALONE, Processes


@dataclass(frozen=True)
class StepOptions:
    """Options for `train_step`.

    Attributes:
        device: The model's device.
        max_grad_norm: Maximum gradient norm; 0 disables clipping.
        autocast: Dtype of matrix multiplications under `torch.autocast` on an accelerator, or None.
        acceleration: Result of `lorakit.speed.accelerate` on the model, or None.
        recompute: What the backward pass recomputes, from `lorakit.plan.job.RECOMPUTED`; for out-of-memory advice.
        limited_by: Setting for which `recompute` was chosen, "memory_budget" or "fit", or None; for the same advice.
        releases_memory: Whether to return freed CPU memory to the operating system before each batch. Otherwise, malloc
            keeps it, and gaps that are too small for the tensors of later batches add to the memory of the process.
        scaler: Scales the loss of an fp16 base; None for other bases.
        loss: Function that runs the model and returns the summed loss of a batch.
        processes: The processes that compute a step together.
        is_interrupted: Function that returns whether this process was asked to stop.
    """

    device: torch.device
    max_grad_norm: float = 1.0
    autocast: torch.dtype | None = None
    acceleration: Acceleration | None = None
    recompute: str = "none"
    limited_by: str | None = None
    releases_memory: bool = False
    scaler: torch.amp.GradScaler | None = None
    loss: LossSum = loss_sum
    processes: Processes = ALONE
    is_interrupted: Callable[[], bool] = lambda: False

    def computing(self) -> contextlib.AbstractContextManager[object]:
        """Return the autocast context for calls to the model, or a null context if autocast is disabled."""
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast)

    def backward(self, loss: torch.Tensor) -> None:
        """Run the backward pass of a loss (a scalar), which is multiplied by the loss scale if there is one."""
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()

    def oom_advice(self, rows: int) -> str:
        """Return advice on reducing memory for a batch of `rows`, best option first, without options already in use."""
        is_fused = self.acceleration is not None
        more = [
            name for name in RECOMPUTED[RECOMPUTED.index(self.recompute) + 1 :] if is_fused or name != "feed-forward"
        ]
        options = [] if is_fused else ["fused forward passes (omit --no-accelerate)"]
        if self.limited_by == "fit":  # like --memory-budget, it cannot be combined with --recompute
            options.append("a smaller --fit")
        elif self.limited_by is not None:
            options += ["a smaller --memory-budget"] if more else []
        else:
            options += [f"--recompute {name}" for name in more if name != "layers"]
            options += ["--recompute layers (or --gradient-checkpointing)"] if "layers" in more else []
            options += ["--memory-budget, which chooses between these two"] if len(more) > 1 else []
        if rows > 1 and self.limited_by != "fit":
            options.append(
                "half the --per-device-train-batch-size with twice the --gradient-accumulation-steps (same result)"
            )
        return f"Try, in this order: {'; '.join([*options, 'a smaller --max-length'])}."


@dataclass(frozen=True)
class StepResult:
    """Result of an optimizer step.

    Attributes:
        loss: Loss before the update, averaged over all tokens in the step that contribute to it.
        grad_norm: Norm of the gradient before clipping; not finite if the step was skipped.
        tokens: Number of tokens, excluding padding.
        trained_tokens: Number of tokens that contribute to the loss.
        is_skipped: Whether the gradient overflowed fp16, so that no tensor was changed and the loss scale was lowered.
        is_interrupted: Whether any process was asked to stop.
    """

    loss: float
    grad_norm: float
    tokens: int
    trained_tokens: int
    is_skipped: bool = False
    is_interrupted: bool = False


def train_step(
    model: nn.Module,
    named: Named,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[Batch],
    learning_rate: float,
    options: StepOptions,
) -> StepResult:
    """Take one optimizer step on the mean loss over all tokens that contribute to it.   [docs/math.md (14)]

    The tokens that contribute to the loss are counted before the first forward pass. The summed loss of each batch is
    divided by this count, so the gradient does not depend on how the rows are split into batches. The penalty terms of
    adapter variants are added once per step. Several processes exchange values twice: the tokens before the first
    forward pass, and the loss and what an error says after the last backward pass, during which the gradients are
    summed (`GradientSum`).

    Args:
        model: The adapted model, in training mode.
        named: (name, tensor) pairs for the trainable tensors (any shape); `.grad` holds the gradients afterwards,
            possibly clipped.
        optimizer: An optimizer for these tensors, from `lorakit.train.loop.optimizer`.
        batches: The step's batches, on the CPU; with several processes, those of this process, which may be none.
        learning_rate: The learning rate for this step.
        options: Device, clipping, precision and acceleration.

    Returns:
        Loss, gradient norm and token counts, which are those of all processes together.

    Raises:
        NonFiniteError: The loss or the gradient is NaN or infinite; no trainable tensor was changed. On an fp16 base,
            an infinite gradient raises only if the loss scale cannot be lowered; otherwise, the step is skipped.
        DataError: None of the tokens in the batches contribute to the loss.
        RunError: Memory ran out, the loss does not depend on the adapter, a trainable tensor was replaced, or another
            process ended.
    """
    processes = options.processes
    sizes = sum(b.tokens for b in batches), sum(b.trained_tokens for b in batches), len(batches)
    counts = processes.exchange(sizes)
    tokens, trained, _ = (sum(numbers) for numbers in zip(*counts, strict=True))
    if trained == 0:
        raise DataError(
            "No token in the batches of this step contributes to the loss, so there is nothing to train on.",
            field="data",
        )
    optimizer.zero_grad(set_to_none=True)
    idle = idle_batches(processes, batches, [count for *_, count in counts])
    with GradientSum(named, processes) as sums:
        mine = _backward(model, batches, trained, options, sums, idle)
    outcomes = processes.exchange((mine, sums.has_gradient, options.is_interrupted()))
    losses, flags, interrupted = zip(*outcomes, strict=True)
    sums.received([any(one) for one in zip(*flags, strict=True)])
    _check_not_replaced(model, named)
    set_rate(optimizer, learning_rate)
    mean = _finite("loss", sum(losses) / trained, optimizer)
    grad_norm, is_skipped = _update(named, optimizer, options)
    if options.device.type == "cuda":
        torch.cuda.synchronize(options.device)  # so that the measured time covers the whole step
    return StepResult(mean, grad_norm, tokens, trained, is_skipped, any(interrupted))


def idle_batches(processes: Processes, batches: Sequence[Batch], counts: Sequence[int]) -> list[Batch]:
    """Return the batches that a process computes only because others have more, given the number of batches of each.

    The result is empty unless the processes are in lockstep.
    """
    if not processes.in_lockstep or min(counts) == max(counts):
        return []
    known = [*batches]
    if min(counts) == 0:  # this process may have none
        known += [batch for first in processes.exchange(batches[:1]) for batch in first]
    return [min(known, key=lambda batch: batch.tokens)] * (max(counts) - len(batches))


def _backward(
    model: nn.Module,
    batches: Sequence[Batch],
    trained: int,
    options: StepOptions,
    sums: GradientSum,
    idle: Sequence[Batch] = (),
) -> float:
    """Run the forward and backward passes of this process's batches, and return their summed loss.

    `trained` counts the tokens with loss in the whole step. `sums` start during the last backward pass. The loss of
    `idle` batches is multiplied by zero.
    """
    total = torch.zeros((), device=options.device)
    last = None if _adds_penalties(model, options.processes) else len(batches) + len(idle) - 1
    if options.scaler is not None and not batches:
        options.scaler.scale(total)  # creates the scale, by which the gradients of the other processes are divided
    for number, batch in enumerate((*batches, *idle)):
        if options.releases_memory:
            allocator.trim()
        with oom_as_run_error(batch, "", options.oom_advice):
            with options.computing():
                loss = options.loss(model, batch, options.device, options.acceleration)
            if not loss.requires_grad:
                raise RunError(
                    "The loss does not depend on any trainable tensor: the adapter is inactive or frozen.",
                    field="target_modules",
                )
            is_idle = number >= len(batches)
            with sums.overlapping() if number == last else contextlib.nullcontext():
                options.backward(loss * 0 if is_idle else loss / trained)
            total = total if is_idle else total + loss.detach()
    penalty = penalties(model) if options.processes.is_first else None
    if penalty is not None:  # added once per step, not once per batch
        options.backward(penalty)
    return float(total)


def _adds_penalties(model: nn.Module, processes: Processes) -> bool:
    """Return whether this process adds penalties after its batches, so that their gradients are not final."""
    with torch.no_grad():
        return processes.is_first and not processes.is_alone and penalties(model) is not None


def _update(named: Named, optimizer: torch.optim.Optimizer, options: StepOptions) -> tuple[float, bool]:
    """Clip the gradients and take the step, unless they overflowed because of the loss scale, which is then lowered.

    Returns the norm of the gradient before clipping, without the loss scale, and whether the step was skipped.
    """
    parameters, scaler = [parameter for _, parameter in named], options.scaler
    if scaler is not None:
        scaler.unscale_(optimizer)
    norm = gradient_norm(parameters)
    grad_norm = float(norm)
    is_skipped = scaler is not None and not math.isfinite(grad_norm)
    if scaler is not None and is_skipped:
        check_scale(scaler, grad_norm)
    else:
        _finite("gradient norm", grad_norm, optimizer)
        clipped_step(optimizer, parameters, norm, options.max_grad_norm)
    if scaler is not None:
        scaler.update()
    return grad_norm, is_skipped


def _finite(what: str, value: float, optimizer: torch.optim.Optimizer) -> float:
    """Return a value; if it is not finite, remove the gradients and raise a `NonFiniteError` that names it."""
    if not math.isfinite(value):
        optimizer.zero_grad(set_to_none=True)
        raise NonFiniteError(f"the {what} became {value}; the step was not taken.", what=what)
    return value


def _check_not_replaced(model: nn.Module, named: Named) -> None:
    """Raise if a trainable tensor was replaced in the model, because the optimizer would never update the new one."""
    without = {id(parameter): name for name, parameter in named if parameter.grad is None}
    current = {id(parameter) for parameter in model.parameters()} if without else set()
    for number, name in without.items():
        if number not in current:
            raise RunError(
                f"{name} is not the tensor that the optimizer was created for; it was replaced, for example by "
                "`load_state_dict(assign=True)`. Create the optimizer after replacing tensors.",
                what=name,
            )
