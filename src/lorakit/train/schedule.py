"""The learning rate of a step: a pure function of the step's number, so that its state is one number.

Knows nothing about optimizers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from lorakit.train.settings import Scheduler


@dataclass(frozen=True)
class Schedule:
    """Warm-up, then cosine, linear or constant.

    Attributes:
        peak: The rate at the end of the warm-up, per step.
        total_steps: Steps of the whole run.
        warmup_steps: Steps over which the rate rises linearly; the first of them already moves.
        kind: What follows the warm-up: "cosine" or "linear" (towards zero at `total_steps`), or "constant".
    """

    peak: float
    total_steps: int
    warmup_steps: int
    kind: Scheduler

    def rate(self, step: int) -> float:
        """The learning rate of a step.

        Args:
            step: Number of the step, from 0.

        Returns:
            The rate; at most `peak`, and above 0 for every step of the run.
        """
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        if self.kind == "constant":
            return self.peak
        # the first step after the warm-up has the peak, the step after the last would have zero
        left = max(0.0, 1 - (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps))
        return self.peak * (left if self.kind == "linear" else (1 - math.cos(math.pi * left)) / 2)


def schedule(peak: float, total_steps: int, warmup_ratio: float, kind: Scheduler) -> Schedule:
    """A schedule with a share of its steps as warm-up.

    Args:
        peak: The largest rate.
        total_steps: Steps of the run, at least 1.
        warmup_ratio: Share of them in [0, 1], rounded up to whole steps.
        kind: As `Schedule.kind`.

    Returns:
        The schedule.
    """
    return Schedule(peak, total_steps, math.ceil(warmup_ratio * total_steps), kind)
