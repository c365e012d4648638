"""The learning rate of a step: a pure function of the step's number, so that its state is one number.

Knows nothing about optimizers.

Ctrl-C and SIGTERM once: finish the step and save; twice: stop at once.

Knows nothing about what is being finished.

The loop: step, evaluate, keep, stop. When each happens is here; how, is in the modules beside.

Between two steps the run is wholly described by the trainable tensors, the optimizer's state, the random generators
and `TrainState`; that is what makes a checkpoint enough to go on from.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit.data import Batch, Loader
from lorakit.errors import NonFiniteError, RunError
from lorakit.machine import peak_rss_bytes
from lorakit.train.checkpoint import TrainState
from lorakit.train.evaluation import evaluate
from lorakit.train.interrupts import Interrupts
from lorakit.train.progress import Progress
from lorakit.train.run_folder import MetricsLog
from lorakit.train.settings import Scheduler
from lorakit.train.step import StepResult, Trainee, train_step, without_gradient


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


@dataclass(frozen=True)
class Pace:
    """How long and how often.

    Attributes:
        total_steps: Optimizer steps of the run.
        accumulation: Batches of a step; fewer at the end of an epoch.
        eval_steps: Steps between evaluations.
        save_steps: Steps between checkpoints.
        patience: Evaluations without a better one after which the run ends, or None.
    """

    total_steps: int
    accumulation: int
    eval_steps: int
    save_steps: int
    patience: int | None


def steps_per_epoch(batches: int, accumulation: int) -> int:
    """Optimizer steps of one pass over the data; the last takes the batches that are left."""
    return -(-batches // accumulation)


@dataclass
class Loop:
    """One run from a state to its end.

    Attributes:
        trainee: Model and optimizer.
        loader: Training batches, at the state's position.
        held_out: Gives the evaluation batches anew, or None.
        schedule: Learning rate by step.
        pace: How long and how often.
        state: Where the run stands; changed as it goes on.
        save: Saves a checkpoint of the state and returns its folder; None if the disk took the adapter alone.
        folder: The run folder.
        progress: Where to report to.
        kept: Step and evaluated step of the newest checkpoint, or (-1, -1).
    """

    trainee: Trainee
    loader: Loader
    held_out: Callable[[], Iterable[Batch]] | None
    schedule: Schedule
    pace: Pace
    state: TrainState
    save: Callable[[TrainState], Path | None]
    folder: Path
    progress: Progress
    kept: tuple[int, int] = (-1, -1)

    def run(self) -> str:
        """Go on to the end.

        Returns:
            "finished", "stopped early" or "interrupted"; a checkpoint of the last step has been saved in every case, or
            its adapter alone.

        Raises:
            NonFiniteError: A loss or gradient became NaN or infinite; the message names the last good checkpoint.
            RunError: As `train_step`; the message names the step and the last good checkpoint.
            DiskError: The disk refuses.
            KeyboardInterrupt: A second signal came.
        """
        first = self.state.step
        self.progress.begin(first, self.pace.total_steps)
        self.trainee.model.train()
        with Interrupts() as interrupts, MetricsLog(self.folder) as log:
            while True:
                self._evaluate(log, interrupts)
                ending = self._ending(interrupts)
                self._keep(log, always=ending is not None)
                if ending is not None:
                    return ending
                self._step(log)
                if self.state.step == first + 1:
                    self._say_without_gradient()

    def _ending(self, interrupts: Interrupts) -> str | None:
        if self.state.step >= self.pace.total_steps and not self._evaluation_due():
            return "finished"
        if self.pace.patience is not None and self.state.stale_evaluations >= self.pace.patience:
            return "stopped early"
        return "interrupted" if interrupts.requested else None

    def _evaluation_due(self) -> bool:
        step = self.state.step
        at_this_step = step % self.pace.eval_steps == 0 or step >= self.pace.total_steps
        return self.held_out is not None and at_this_step and self.state.evaluated_step != step

    def _evaluate(self, log: MetricsLog, interrupts: Interrupts) -> None:
        if self.held_out is None or not self._evaluation_due():
            return
        self.progress.busy("evaluating")
        try:
            with self.trainee.computing():
                found = evaluate(
                    self.trainee.model,
                    self.held_out(),
                    self.trainee.device,
                    stop=lambda: interrupts.requested,
                    fast=self.trainee.fast,
                )
        except RunError as cause:
            text = f"{self.folder}: step {self.state.step}: {cause} {self._last_good()}"
            raise type(cause)(text, **{**cause.fields, "where": self.folder}) from cause
        if found is None:
            return
        self.state.note_evaluation(found.loss)
        row = {
            "step": self.state.step,
            "eval_loss": found.loss,
            "eval_perplexity": found.perplexity,
            "eval_tokens": found.tokens,
        }
        self._log(log, row)
        self.progress.eval_row(row)

    def _log(self, log: MetricsLog, row: dict[str, Any]) -> None:
        log.append(row)
        if len(log.waiting) == 1:
            self.progress.say(f"warning: {log.path}: the disk is full; rows wait in memory until they fit.")

    def _keep(self, log: MetricsLog, always: bool) -> None:
        """Save where it is due: at the interval, at a new best step, and at the end."""
        state = self.state
        due = state.step > 0 and (state.step % self.pace.save_steps == 0 or state.best_step == state.step)
        now = (state.step, state.evaluated_step)
        if not (due or always) or now == self.kept:
            return
        self.progress.busy("saving")
        log.sync()
        state.data = self.loader.state()
        if self.save(state) is not None:
            self.kept = now

    def _step(self, log: MetricsLog) -> None:
        state, began = self.state, time.perf_counter()
        rate = self.schedule.rate(state.step)
        try:
            result = train_step(self.trainee, self._batches(), rate)
        except RunError as cause:
            advice = " Try a lower --learning-rate, or --dtype float32." if type(cause) is NonFiniteError else ""
            text = f"{self.folder}: in step {state.step + 1} {cause}{advice} {self._last_good()}"
            raise type(cause)(text, **{**cause.fields, "where": self.folder}) from cause
        seconds = time.perf_counter() - began
        state.step += 1
        state.tokens += result.tokens
        state.trained_tokens += result.trained_tokens
        state.seconds += seconds
        row = self._row(result, rate, seconds)
        self._log(log, row)
        self.progress.train_row(row)

    def _batches(self) -> list[Batch]:
        """The batches of the next step, which never reach over the end of an epoch."""
        batches: list[Batch] = []
        while len(batches) < self.pace.accumulation:
            batches.append(next(self.loader))
            if self.loader.epoch.is_integer():  # the batch was the last of its epoch
                break
        return batches

    def _row(self, result: StepResult, rate: float, seconds: float) -> dict[str, float | int]:
        return {
            "step": self.state.step,
            "epoch": self.loader.epoch,
            "loss": result.loss,
            "learning_rate": rate,
            "grad_norm": result.grad_norm,
            "tokens": result.tokens,
            "trained_tokens": result.trained_tokens,
            "seconds": seconds,
            "tokens_per_second": result.tokens / seconds,
            "peak_rss_bytes": peak_rss_bytes(),
        }

    def _say_without_gradient(self) -> None:
        names = without_gradient(self.trainee)
        if names:
            listed = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            self.progress.say(
                f"warning: the first step gave {len(names)} of {len(self.trainee.named)} trainable tensors no "
                f"gradient ({listed}); they will not learn."
            )

    def _last_good(self) -> str:
        if self.kept[0] < 0:
            return "No checkpoint had been saved yet."
        return f"The last good checkpoint is checkpoint-{self.kept[0]}."
