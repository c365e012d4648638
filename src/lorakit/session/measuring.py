"""Measure the loss and the metrics of a model on batches, in training too.

The loss is averaged over all tokens that contribute to it.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from lorakit.data import Batch
from lorakit.errors import DataError, NonFiniteError, RunError
from lorakit.speed import Acceleration
from lorakit.tasks import CAUSAL_LM, Meter, Objective, Target
from lorakit.tasks.metrics import Score


@dataclass(frozen=True)
class Evaluation:
    """Result of an evaluation.

    Attributes:
        loss: Mean loss over the targets: for language models, cross entropy in nats over the tokens with loss.
        tokens: Number of these targets: tokens, or rows for classification and embeddings.
        scores: Name of a metric of the task -> value, or the reason why the data does not define it.
        row_losses: Summed loss of each row (of each batch if the loss compares the rows of a batch); empty if unknown.
        row_counts: Number of targets of each of them.
        meter: What the metrics are computed from, with each row's part in the same order; None if there are no metrics.
    """

    loss: float
    tokens: int
    scores: Mapping[str, Score] = field(default_factory=dict)
    row_losses: tuple[float, ...] = field(default=(), compare=False, repr=False)
    row_counts: tuple[int, ...] = field(default=(), compare=False, repr=False)
    meter: Meter | None = field(default=None, compare=False, repr=False)

    @property
    def metrics(self) -> dict[str, float | None]:
        """Name of a metric of the task -> value; None if the data does not define it."""
        return {name: None if isinstance(value, str) else value for name, value in self.scores.items()}

    @property
    def undefined(self) -> dict[str, str]:
        """Name of a metric without a value -> reason."""
        return {name: value for name, value in self.scores.items() if isinstance(value, str)}

    @property
    def perplexity(self) -> float:
        """The perplexity exp(loss), capped to stay finite, because JSON has no infinity.   [docs/math.md (15)]"""
        return math.exp(min(self.loss, 700.0))


@dataclass(frozen=True)
class _Part:
    """The evaluation of a batch: its summed loss and its number of targets, and those of its rows, if known."""

    loss: float
    tokens: int
    row_losses: tuple[float, ...]
    row_counts: tuple[int, ...]


@dataclass(frozen=True)
class Share:
    """The part of an evaluation that one process computed: losses and metrics by the number of the batch."""

    parts: dict[int, _Part]
    meters: dict[int, Meter]
    is_stopped: bool


IDLE = -1
"""Number of a batch that a process computes only because the others compute one more; its result is not used."""


def measure(
    model: nn.Module,
    batches: Iterable[tuple[int, Batch | None]],
    device: str | torch.device,
    acceleration: Acceleration | None = None,
    objective: Objective | None = None,
) -> Share:
    """Evaluate batches without gradients or dropout; without an objective, as a causal language model.

    Args:
        model: A model for the task; the training mode of each of its modules is restored afterwards.
        batches: Numbers and batches of (rows, length) tensors on the CPU; the result of the batch number `IDLE` is not
            used, and None stops the evaluation.
        device: The model's device.
        acceleration: Result of `lorakit.speed.accelerate` on the model, or None.
        objective: The loss and the metrics.

    Raises:
        RunError: Memory ran out; the message describes the batch and suggests what to change.
    """
    parts, meters, is_stopped = dict[int, _Part](), dict[int, Meter](), False
    objective = objective or CAUSAL_LM.objective(Target())
    with evaluating(model), torch.inference_mode():
        for number, batch in batches:
            is_stopped = batch is None
            if batch is None:
                break
            with oom_as_run_error(batch, " while evaluating", oom_advice_for_evaluation):
                parts[number], output = _measure(objective, model, batch, device, acceleration)
                if output is not None and objective.meter is not None and number >= 0:
                    meters[number] = objective.meter()
                    meters[number].add(batch, output)
    parts.pop(IDLE, None)
    return Share(parts, meters, is_stopped)


def _measure(
    objective: Objective,
    model: nn.Module,
    batch: Batch,
    device: str | torch.device,
    acceleration: Acceleration | None,
) -> tuple[_Part, torch.Tensor | None]:
    """Evaluate a batch; also return the model's output if the objective reads it."""
    counts = None if objective.counts is None else objective.counts(batch)
    if objective.forward is not None and objective.loss is not None:
        output = objective.forward(model, batch, device)
        total = objective.loss(output, batch).item()
        rows: tuple[float, ...] = (total,)
        if counts is not None:
            alone = (replace(batch, labels=batch.labels[at : at + 1]) for at in range(len(counts)))
            rows = tuple(objective.loss(output[at : at + 1], row).item() for at, row in enumerate(alone))
        return _part(total, batch, rows, counts), output
    if objective.label_losses is None or counts is None:
        return _part(objective.loss_sum(model, batch, device, acceleration).item(), batch, (), None), None
    losses = objective.label_losses(model, batch, device, acceleration)
    row_of = torch.repeat_interleave(counts).cpu()
    sums = torch.zeros(len(counts), dtype=torch.float64, device="cpu").index_add_(0, row_of, losses.cpu().double())
    return _part(losses.sum().item(), batch, tuple(sums.tolist()), counts), None


def _part(total: float, batch: Batch, rows: tuple[float, ...], counts: torch.Tensor | None) -> _Part:
    several = (batch.trained_tokens,) if counts is None else tuple(counts.tolist())
    return _Part(total, batch.trained_tokens, rows, several if rows else ())


def combined(shares: Sequence[Share]) -> Evaluation | None:
    """Combine the results of `measure` of several processes, however the batches were divided; None if one was stopped.

    Raises:
        DataError: None of the tokens in the batches contribute to the loss.
        NonFiniteError: The loss is NaN or infinite.
    """
    if any(share.is_stopped for share in shares):
        return None
    by_number = {number: part for share in shares for number, part in share.parts.items()}
    meters = {number: meter for share in shares for number, meter in share.meters.items()}
    parts = [by_number[number] for number in sorted(by_number)]  # in the order of one process, for equal rounding
    total, tokens = 0.0, sum(part.tokens for part in parts)
    for part in parts:
        total += part.loss
    ordered = [meters[number] for number in sorted(meters)]
    for other in ordered[1:]:
        ordered[0].merge(other)
    if tokens == 0:
        text = "No token in the evaluation data contributes to the loss; pass more text with --eval-data."
        raise DataError(text, field="eval_data")
    if not math.isfinite(total):
        text = f"the evaluation loss is {total}; the base or the adapter produces non-finite values."
        raise NonFiniteError(text, what="evaluation loss")
    scores = {name: _finite(value) for name, value in (ordered[0].result() if ordered else {}).items()}
    losses = tuple(itertools.chain.from_iterable(part.row_losses for part in parts))
    counts = tuple(itertools.chain.from_iterable(part.row_counts for part in parts))
    return Evaluation(total / tokens, tokens, scores, losses, counts, ordered[0] if ordered else None)


def _finite(value: Score) -> Score:
    return value if isinstance(value, str) or math.isfinite(value) else f"the value is {value}"


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode within a block, and restore the mode of each module afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextlib.contextmanager
def oom_as_run_error(batch: Batch, where: str, advice: Callable[[int], str]) -> Iterator[None]:
    """Convert an out-of-memory error in a block to a `RunError` that describes the batch and gives advice for its rows.

    `where` follows "out of memory" in the message: "" or " while evaluating".

    Raises:
        RunError: Memory ran out.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as cause:
        if not _is_out_of_memory(cause):
            raise
        rows, length = batch.input_ids.shape
        raise RunError(
            f"out of memory{where}: batch of {rows} × {length} tokens. {advice(rows)}", what=(rows, length)
        ) from cause


def oom_advice_for_evaluation(rows: int) -> str:
    """Return advice on reducing the memory use of an evaluation with batches of this number of rows."""
    fewer = "fewer rows per batch (train: --per-device-train-batch-size, eval: --batch-size) or " if rows > 1 else ""
    return f"Try {fewer}a smaller --max-length."


def _is_out_of_memory(cause: BaseException) -> bool:
    """Return whether an error means that memory ran out.

    This is the only function that parses torch's error messages. Parsing is unavoidable, because torch's CPU allocator
    and some libraries raise a plain RuntimeError without attributes; only the CUDA error has its own class.
    """
    if isinstance(cause, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(cause)
    return "can't allocate memory" in text or "not enough memory" in text or "out of memory" in text
