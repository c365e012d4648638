"""The progress of a run, and which of its steps is the best.

A later step replaces the best one if its evaluation loss is lower by more than one standard error of the difference,
which is paired by rows.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lorakit.errors import RunError


@dataclass(frozen=True)
class Improvement:
    """How much lower a mean loss is than an earlier one.

    Attributes:
        mean: Difference of the mean losses; positive if the later one is lower.
        error: Standard error of the difference, or 0 if it cannot be estimated.
    """

    mean: float
    error: float = 0.0

    @property
    def is_clear(self) -> bool:
        """Whether the improvement is positive and exceeds one standard error."""
        return self.mean > self.error


def improvement(before: Sequence[float], now: Sequence[float], counts: Sequence[int]) -> Improvement:
    """Return the improvement of the mean loss over all targets, paired by rows.   [docs/math.md (111)]

    `before` and `now` are the summed losses of the rows in two evaluations, and `counts` their numbers of targets. The
    standard error is 0 for a single row, whose variance is not known.
    """
    total, rows = sum(counts), len(counts)
    gains = [earlier - later for earlier, later in zip(before, now, strict=True)]
    mean = math.fsum(gains) / total
    if rows < 2:
        return Improvement(mean)
    squares = math.fsum((gain - mean * count) ** 2 for gain, count in zip(gains, counts, strict=True))
    return Improvement(mean, math.sqrt(rows / (rows - 1) * squares) / total)


@dataclass
class TrainState:
    """Progress of a run after `step` optimizer steps.

    Attributes:
        step: Number of optimizer steps taken.
        data: Position in the data, from `Loader.state`.
        evaluated_step: The last evaluated step, or -1.
        best_step: The best evaluated step, excluding step 0 (before training), or None. A later step replaces it if its
            loss is lower by more than one standard error.
        best_loss: Evaluation loss at `best_step`, or None.
        first_loss: Evaluation loss before the first step, or None.
        last_loss: The latest evaluation loss, or None.
        stale_evaluations: Number of evaluations since the best one.
        best_rows: Summed evaluation loss of each row at `best_step`; empty if unknown.
        trained_tokens: Total number of tokens that have contributed to the loss so far.
        tokens: Total number of tokens processed so far, excluding padding.
        seconds: Time spent in optimizer steps, excluding evaluation and saving.
        skipped_steps: Number of steps, included in `step`, that were skipped because a gradient overflowed fp16; they
            do not advance the learning rate schedule.
    """

    step: int = 0
    data: dict[str, Any] = field(default_factory=dict)
    evaluated_step: int = -1
    best_step: int | None = None
    best_loss: float | None = None
    first_loss: float | None = None
    last_loss: float | None = None
    stale_evaluations: int = 0
    best_rows: list[float] = field(default_factory=list)
    trained_tokens: int = 0
    tokens: int = 0
    seconds: float = 0.0
    skipped_steps: int = 0

    @property
    def has_only_skipped_steps(self) -> bool:
        """Whether every step so far was skipped, so that the adapter is untrained; False before the first step."""
        return 0 < self.step == self.skipped_steps

    def improvement(self, loss: float, rows: Sequence[float] = (), counts: Sequence[int] = ()) -> Improvement | None:
        """Return how much better an evaluation is than that of the best step, or None if there is none yet.

        Without the loss of each row (in nats, summed) at both steps, the difference has no standard error.
        """
        if self.best_loss is None:
            return None
        if rows and len(rows) == len(self.best_rows):
            return improvement(self.best_rows, rows, counts)
        return Improvement(self.best_loss - loss)

    def note_evaluation(self, loss: float, rows: Sequence[float] = (), counts: Sequence[int] = ()) -> bool:
        """Record an evaluation at the current step, and return whether it is the best so far; see `improvement`.

        It never is at step 0, before training.
        """
        gain = self.improvement(loss, rows, counts)
        self.evaluated_step, self.last_loss = self.step, loss
        if self.step == 0:
            self.first_loss = loss
            return False
        if gain is None or gain.is_clear:
            self.best_step, self.best_loss, self.best_rows = self.step, loss, list(rows)
            self.stale_evaluations = 0
            return True
        self.stale_evaluations += 1
        return False

    def loss_at(self, step: int) -> float | None:
        """Return the evaluation loss at a step, or None if unknown; only the best and the latest losses are kept."""
        if step == self.best_step:
            return self.best_loss
        return self.last_loss if step == self.evaluated_step else None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainState:
        """Create a state from its fields, as stored in `state.json`.

        Raises:
            RunError: A field is missing or unknown.
        """
        names = {f.name for f in dataclasses.fields(cls)}
        values = {"skipped_steps": 0, "best_rows": [], **values}  # checkpoints of earlier versions lack them
        if set(values) != names:
            odd = ", ".join(sorted(set(values) ^ names))
            raise RunError(
                f"The fields of the checkpoint's state do not match this version of lorakit ({odd}).", what=odd
            )
        return cls(**values)
