"""The learning rate as a function of the step: a warm-up, then a constant rate or a decay."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lorakit.errors import UsageError
from lorakit.train.settings.defaults import DECAY_RATIO, WARMUP_RATIO
from lorakit.train.settings.settings import TrainSettings
from lorakit.train.settings.types import Scheduler


@dataclass(frozen=True)
class Schedule:
    """Stateless learning rate schedule: a warm-up, then a decay or a constant rate.   [docs/math.md (44)]

    Attributes:
        peak: Learning rate at the end of the warm-up.
        total_steps: Number of optimizer steps in the run.
        warmup_steps: Number of steps over which the rate rises linearly; the first step already has a rate above 0.
        kind: Shape after the warm-up: "cosine" or "linear" decay toward zero at `total_steps`; "constant"; or "wsd",
            a constant rate that decays toward zero over the last `decay_steps`.
        decay_steps: Number of steps over which "wsd" decays, at least 1; other kinds ignore it.
    """

    peak: float
    total_steps: int
    warmup_steps: int
    kind: Scheduler
    decay_steps: int = 1

    def rate(self, step: int) -> float:
        """Return the learning rate for a step.

        Args:
            step: Step number, starting at 0.

        Returns:
            The rate: at most `peak`, and above 0 for every step of the run.

        Source:
            "wsd": Hu et al. 2024, arXiv:2404.06395; its decay, 1 − √x: Hägele et al. 2024, arXiv:2405.18392,
            section 3.
        """
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        if self.kind == "constant":
            return self.peak
        # the first step of a decay has the peak rate; a step after the last one would have a rate of zero
        first = max(self.warmup_steps, self.total_steps - self.decay_steps) if self.kind == "wsd" else self.warmup_steps
        done = min(1.0, max(0.0, (step - first) / max(1, self.total_steps - first)))
        if self.kind == "wsd":
            return self.peak * (1 - math.sqrt(done))
        return self.peak * (1 - done if self.kind == "linear" else (1 - math.cos(math.pi * (1 - done))) / 2)


def schedule(settings: TrainSettings, total_steps: int) -> Schedule:
    """Build the schedule of a run.

    Args:
        settings: Peak rate, kind, and lengths of the warm-up and of the decay; fractions of steps are rounded up.
        total_steps: Number of optimizer steps in the run, at least 1.

    Returns:
        The schedule.

    Raises:
        UsageError: The warm-up is longer than the run, so the rate would never reach its peak.
    """
    warmup = settings.warmup_steps
    if warmup is None:
        ratio = WARMUP_RATIO if settings.warmup_ratio is None else settings.warmup_ratio
        warmup = math.ceil(ratio * total_steps)
    if warmup > total_steps:
        raise UsageError(
            f"warmup_steps is {warmup}, but the run has only {total_steps} steps; pass a smaller --warmup-steps, or "
            "use --warmup-ratio.",
            what=warmup,
            field="warmup_steps",
        )
    ratio = DECAY_RATIO if settings.decay_ratio is None else settings.decay_ratio
    decay = max(1, math.ceil(ratio * total_steps))
    return Schedule(settings.learning_rate, total_steps, warmup, settings.lr_scheduler_type, decay)
