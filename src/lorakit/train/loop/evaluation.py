"""Evaluation in a run: its batches are divided among the processes, and it can be stopped."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import nn

from lorakit.data import Batch
from lorakit.session.measuring import IDLE, Evaluation, combined, measure
from lorakit.speed import Acceleration
from lorakit.tasks import Objective
from lorakit.train.processes.processes import ALONE, Processes


def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    device: str | torch.device,
    stop: Callable[[], bool] = lambda: False,
    acceleration: Acceleration | None = None,
    objective: Objective | None = None,
    processes: Processes = ALONE,
) -> Evaluation | None:
    """Measure the loss, averaged over all targets, and the metrics of a task, without gradients or dropout.

    Args:
        model: A model for the task; the training mode of each of its modules is restored afterwards.
        batches: Batches of (rows, length) tensors on the CPU.
        device: The model's device.
        stop: Function that is called before each batch; if it returns True, the evaluation stops.
        acceleration: Result of `lorakit.speed.accelerate` on the model, or None.
        objective: The loss and the metrics; None selects those of causal language models.
        processes: The processes among which the batches are divided; all of them get the same result.

    Returns:
        The evaluation, or None if it was stopped.

    Raises:
        DataError: None of the tokens in the batches contribute to the loss.
        NonFiniteError: The loss is NaN or infinite.
        RunError: Memory ran out; the message describes the batch and suggests what to change.
    """
    share = measure(model, own_batches(batches, processes, stop), device, acceleration, objective)
    return combined(processes.exchange(share))


def own_batches(
    batches: Iterable[Batch], processes: Processes, stop: Callable[[], bool] = lambda: False
) -> Iterator[tuple[int, Batch | None]]:
    """Yield the batches that one process evaluates, with their numbers, and None instead of one if `stop` is True.

    In lockstep, all processes get equally many batches, and stop together.
    """
    number, batch, is_together = -1, None, processes.in_lockstep
    for number, batch in enumerate(batches):
        is_asked = not is_together or number % processes.count == 0
        if is_asked and (processes.any(stop()) if is_together else stop()):
            yield number, None
            return
        if number % processes.count == processes.rank:
            yield number, batch
    if is_together and batch is not None and number % processes.count < processes.rank:
        yield IDLE, batch
