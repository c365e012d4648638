"""The progress of a run, and which of its steps is the best.

A later step replaces the best one if its evaluation loss is lower by more than one standard error of the difference,
which is paired by rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lorakit.differences import Difference, mean_difference
from lorakit.errors import RunError


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

    def change(self, loss: float, rows: Sequence[float] = (), counts: Sequence[int] = ()) -> Difference | None:
        """Return an evaluation's loss minus that of the best step, or None if there is none yet.

        Without the loss of each row (in nats, summed) at both steps, the difference has no standard error.
        """
        if self.best_loss is None:
            return None
        if rows and len(rows) == len(self.best_rows):
            return mean_difference(rows, self.best_rows, counts)
        return Difference(loss - self.best_loss, 0.0, 0.0, len(rows))

    def note_evaluation(self, loss: float, rows: Sequence[float] = (), counts: Sequence[int] = ()) -> bool:
        """Record an evaluation at the current step, and return whether it is the best so far.   [docs/math.md (111)]

        It never is at step 0, before training. A later step is better if its loss is lower by more than one standard
        error.
        """
        change = self.change(loss, rows, counts)
        self.evaluated_step, self.last_loss = self.step, loss
        if self.step == 0:
            self.first_loss = loss
            return False
        if change is None or change.value < -change.error:
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
