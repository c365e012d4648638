"""Check with a measurement that a run fits into the limit of `--fit`, and otherwise choose a smaller setting.

`lorakit.plan.budget` proposes settings. A probe then runs the forward and backward passes of the longest rows, which
need the most memory, while placeholders take the room of the optimizer's moments. Nothing that affects the run's result
changes: the order of the data, the random number generators and the gradients stay as they were.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from lorakit import allocator
from lorakit.data import Batch, lengths
from lorakit.data.encoding import IGNORED
from lorakit.errors import RunError
from lorakit.machine import peak_rss_bytes, rss_bytes
from lorakit.ops import choices
from lorakit.plan import Plan
from lorakit.plan.budget import does_not_fit, needed_bytes, smaller
from lorakit.session.measuring import oom_as_run_error
from lorakit.tasks import TaskOnData
from lorakit.train.files.checkpoint import random_state, restore_random_state
from lorakit.train.loop.optimizer import Named
from lorakit.train.loop.step import StepOptions

if TYPE_CHECKING:
    from lorakit.data import Sequence as Tokens

GROWTH = 0.05
"""Fraction of the limit that the probe leaves free: malloc's gaps grow a little when the lengths of rows vary."""


@dataclass(frozen=True)
class Probe:
    """Measures the memory that the longest rows of a run need.

    Attributes:
        model: The adapted model.
        named: (name, tensor) pairs for the trainable tensors (any shape).
        rows: The longest sequences for training and evaluation, longest first.
        pad_id: Id of the padding token.
        choices: Autotuned choices of the run.
        task: The task of the run.
    """

    model: nn.Module
    named: Named
    rows: Sequence[Tokens]
    pad_id: int
    choices: Mapping[str, int]
    task: TaskOnData

    def peak_bytes(self, batch_rows: int, accumulates: bool, options: StepOptions) -> int:
        """Return the peak memory use of a step, in bytes: of the process or, on a GPU, of its memory.

        Args:
            batch_rows: Number of rows per batch.
            accumulates: Whether a step has several batches, so that gradients exist during forward passes.
            options: Options of the run's steps.

        Returns:
            The peak; more than any limit if memory ran out.
        """
        batch = _longest(self.rows[:batch_rows], self.pad_id, self.task)
        before = _begin(options.device)
        try:
            with _unchanged(self.model, self.named), choices.activate(self.choices):
                held = [
                    torch.ones_like(p, requires_grad=False) for _, p in self.named for _ in ("exp_avg", "exp_avg_sq")
                ]
                for _ in range(1 + accumulates):
                    if options.releases_memory:
                        allocator.trim()
                    with oom_as_run_error(batch, " in the probe of --fit", lambda _: ""):
                        with options.computing():
                            loss = options.loss(self.model, batch, options.device, options.acceleration)
                        (loss / batch.trained_tokens).backward()
                del held
                return _peak(options.device, before)
        except RunError:
            return 1 << 62


def settle(proposed: Sequence[Plan], limit_bytes: int, measure: Callable[[Plan], int]) -> tuple[Plan, int]:
    """Return the first proposed plan whose measured memory use is below a limit, and that measurement in bytes.

    Args:
        proposed: Plans that should fit, fastest first.
        limit_bytes: The limit.
        measure: Function that applies a plan's settings and returns the peak memory use in bytes.

    Raises:
        ConfigError: No plan fits.
    """
    smallest, least = min(proposed, key=needed_bytes), 1 << 62
    while proposed:
        plan = proposed[0]
        used = measure(plan)
        if used <= (1 - GROWTH) * limit_bytes:
            return plan, used
        least, proposed = min(least, used), smaller(proposed, plan)
    raise does_not_fit(limit_bytes, smallest, round(least / (1 - GROWTH)))


def longest_rows(parts: Sequence[Sequence[Tokens]], count: int) -> list[Tokens]:
    """Return the longest sequences of several data sets, longest first.

    Args:
        parts: The data sets.
        count: Maximum number of sequences to return.
    """
    found = [(size, part, index) for part in parts for index, size in enumerate(lengths(part))]
    found.sort(key=lambda entry: entry[0], reverse=True)
    return [part[index] for _, part, index in found[:count]]


def _longest(rows: Sequence[Tokens], pad_id: int, task: TaskOnData) -> Batch:
    """Return a batch of these rows; in text, all tokens contribute to the loss, which needs the most memory."""
    batch = task.objective.collate(list(rows), pad_id, 0.0)
    if not task.task.generates:
        return batch
    labels = batch.input_ids.masked_fill(batch.attention_mask == 0, IGNORED)
    return dataclasses.replace(batch, labels=labels, trained_tokens=max(1, batch.tokens - len(labels)))


@contextmanager
def _unchanged(model: nn.Module, named: Named) -> Iterator[None]:
    """Put a model in training mode, as the loop does; restore gradients and random number generators after a block."""
    gradients = [parameter.grad for _, parameter in named]
    tensors, plain = random_state()
    model.train()
    try:
        for _, parameter in named:
            parameter.grad = None
        yield
    finally:
        for (_, parameter), gradient in zip(named, gradients, strict=True):
            parameter.grad = gradient
        restore_random_state(tensors, plain)


def _begin(device: torch.device) -> int:
    """Return freed memory to the system or the device; return the peak of the process so far, in bytes."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    elif device.type == "cpu":
        allocator.trim()
    return peak_rss_bytes()


def _peak(device: torch.device, before: int) -> int:
    """Return the peak since `_begin`, in bytes.

    On a CPU, the kernel reports only the peak of the whole process. If the probe did not raise it, memory use is what
    the process holds now, because malloc keeps freed memory.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    peak = peak_rss_bytes()
    return peak if peak > before else rss_bytes()
