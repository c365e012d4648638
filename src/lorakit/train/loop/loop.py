"""The training loop, which decides when to step, evaluate, save and stop; other modules do the work.

Between steps, a run is completely described by its trainable tensors, the optimizer state, the state of the random
number generators, and `TrainState`. A checkpoint that contains all four is therefore enough to resume the run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from lorakit.data import Batch
from lorakit.errors import DataError, NonFiniteError, RunError
from lorakit.machine import peak_rss_bytes
from lorakit.session.measuring import IDLE, Evaluation, combined, measure
from lorakit.speed import Acceleration
from lorakit.tables import format_some
from lorakit.tasks import Objective
from lorakit.train.files.run_folder import MetricsLog
from lorakit.train.loop import score_cache
from lorakit.train.loop.interrupts import Interrupts, recording
from lorakit.train.loop.optimizer import ADVICE, HALF, received_gradients
from lorakit.train.loop.run import Run
from lorakit.train.loop.saving import save_checkpoint
from lorakit.train.loop.step import StepResult, train_step
from lorakit.train.processes.processes import ALONE, Processes
from lorakit.train.spec import ADAPTER


class Loop:
    """The training loop, which takes a run from its current state to the end.

    The run's loader must be at the position recorded in its state. The loop updates the state and the status.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._folder = run.spec.folder
        self._options = run.step_options
        self._processes, self._progress = run.spec.processes, run.spec.progress
        self._saved = (run.state.step, run.state.evaluated_step) if run.start.resumed_from else (-1, -1)
        self._is_interrupted = False

    def steps(self) -> None:
        """Train until the run ends, and set its status to "finished", "stopped early" or "interrupted".

        In each case, a checkpoint is saved at the last step; if the disk is full, only the adapter is saved.

        Raises:
            NonFiniteError: A loss or gradient became NaN or infinite, or every step was skipped because of that; the
                message names the last valid checkpoint.
            RunError: A step or an evaluation failed; the message names the step and the last valid checkpoint.
            DiskError: A file cannot be written.
            KeyboardInterrupt: A second signal arrived.
        """
        run = self._run
        first = run.state.step
        self._progress.begin(first, run.limits.total_steps)
        run.loaded.model.train()
        written = MetricsLog(self._folder) if self._processes.is_first else contextlib.nullcontext()
        # one of several processes may receive a signal because another one has ended
        with recording(is_answered=self._processes.is_alone) as interrupts, written as log:
            self._options = dataclasses.replace(self._options, is_interrupted=lambda: interrupts.requested)
            self._is_interrupted = self._processes.any(interrupts.requested)
            while True:
                self._evaluate(log, interrupts)
                ending = self._ending(interrupts)
                self._save(log, always=ending is not None)
                if ending is not None:
                    self._check_trained(ending)
                    run.status = ending
                    return
                self._step(log)
                if run.state.step == first + 1:
                    self._warn_without_gradient()

    def _ending(self, interrupts: Interrupts) -> str | None:
        state, limits = self._run.state, self._run.limits
        if state.step >= limits.total_steps and not self._is_evaluation_due():
            return "finished"
        if limits.patience is not None and state.stale_evaluations >= limits.patience:
            return "stopped early"
        is_alone = self._processes.is_alone  # several processes exchange this within an evaluation and a step
        return "interrupted" if self._is_interrupted or (is_alone and interrupts.requested) else None

    def _is_evaluation_due(self) -> bool:
        step, limits = self._run.state.step, self._run.limits
        at_this_step = step % limits.eval_steps == 0 or step >= limits.total_steps
        return self._run.batches.held_out is not None and at_this_step and self._run.state.evaluated_step != step

    def _evaluate(self, log: MetricsLog | None, interrupts: Interrupts) -> None:
        run, held_out = self._run, self._run.batches.held_out
        if held_out is None or not self._is_evaluation_due():
            return
        self._progress.busy("evaluating")
        key = score_cache.key_of(run) if run.state.step == 0 else None
        kept, began = None if key is None else score_cache.read(key), time.process_time()
        evaluation = kept or self._measured(held_out(), interrupts)
        if evaluation is None:
            self._is_interrupted = True
            return
        if kept is not None:
            self._progress.say("The evaluation at step 0 was read from the cache: an earlier run had the same start.")
        elif key is not None and time.process_time() - began >= score_cache.LEAST_SECONDS:
            problem = score_cache.write(key, evaluation)
            if problem:
                self._progress.detail(f"The evaluation at step 0 is not kept for later runs: {problem}.")
        self._note(evaluation)
        row = {
            "step": run.state.step,
            "eval_loss": evaluation.loss,
            **({"eval_perplexity": evaluation.perplexity} if run.spec.task.task.generates else {}),
            "eval_tokens": evaluation.tokens,
            **{f"eval_{name}": value for name, value in evaluation.metrics.items()},
            **({"eval_undefined": evaluation.undefined} if evaluation.undefined else {}),
        }
        self._log(log, row)
        is_start = run.state.step == 0 and run.spec.start is not None
        self._progress.eval_row(row, run.spec.before_training if is_start else "")

    def _note(self, evaluation: Evaluation) -> None:
        state, measured = self._run.state, (evaluation.loss, evaluation.row_losses, evaluation.row_counts)
        change = state.change(*measured)
        if not state.note_evaluation(*measured) and change is not None and change.value < 0:
            self._progress.say(
                f"step {state.step}: the evaluation loss is {-change.value:.4f} lower than at step {state.best_step}, "
                f"within one standard error ({change.error:.4f}), so step {state.best_step} stays the best."
            )

    def _measured(self, batches: Iterable[Batch], interrupts: Interrupts) -> Evaluation | None:
        """Evaluate the model; return None if a signal arrived."""
        run = self._run
        stop, objective = lambda: interrupts.requested, run.spec.task.objective
        try:
            with self._options.computing():
                return evaluate(
                    run.loaded.model,
                    batches,
                    self._options.device,
                    stop,
                    run.loaded.acceleration,
                    objective,
                    self._processes,
                )
        except RunError as cause:
            raise self._located(cause, run.state.step, self._advice(cause, "")) from cause

    def _log(self, log: MetricsLog | None, row: dict[str, Any]) -> None:
        if log is None:  # the first process writes
            return
        log.append(row)
        self._run.trackers.log(row)
        if len(log.waiting) == 1:
            self._progress.say(
                f"warning: {log.path}: the disk is full; new rows are kept in memory until there is space."
            )

    def _save(self, log: MetricsLog | None, always: bool) -> None:
        """Save a checkpoint if one is due, if the current step is the best so far, or if `always` is set."""
        state = self._run.state
        due = state.step > 0 and (state.step % self._run.limits.save_steps == 0 or state.best_step == state.step)
        now = (state.step, state.evaluated_step)
        if not (due or always) or now == self._saved:
            return
        self._progress.busy("saving")
        if log is not None:
            log.sync()
        state.data = self._run.batches.loader.state()
        if save_checkpoint(self._run) is not None:
            self._saved = now

    def _step(self, log: MetricsLog | None) -> None:
        run, state, started = self._run, self._run.state, time.perf_counter()
        rate = run.updates.schedule.rate(state.step - state.skipped_steps)
        try:
            result = train_step(
                run.loaded.model, run.updates.named, run.updates.optimizer, self._batches(log), rate, self._options
            )
        except RunError as cause:
            raise self._located(
                cause, state.step + 1, self._advice(cause, " Try a lower --learning-rate, or --dtype float32.")
            ) from cause
        seconds = time.perf_counter() - started
        state.step += 1
        state.tokens += result.tokens
        state.trained_tokens += result.trained_tokens
        state.seconds += seconds
        self._is_interrupted = result.is_interrupted
        if result.is_skipped:
            state.skipped_steps += 1
            self._say_skipped()
        row = self._row(result, rate, seconds)
        self._log(log, row)
        self._progress.train_row(row)

    def _batches(self, log: MetricsLog | None) -> list[Batch]:
        """Return this process's batches for the next step; see `RunBatches.next_share`.

        Raises:
            DataError: A row of streamed data does not fit; a checkpoint before this step was saved.
        """
        loader = self._run.batches.loader
        before = loader.state()
        try:
            return self._run.batches.next_share(self._run.limits.accumulation, self._processes)
        except DataError as cause:
            loader.load_state(before)
            self._save(log, always=True)
            text = (
                f"{cause} The run can be resumed from step {self._run.state.step}; --on-bad-row skip omits such rows."
            )
            raise DataError(text, **cause.fields) from cause

    def _row(self, result: StepResult, rate: float, seconds: float) -> dict[str, float | int]:
        scaler, skipped = self._run.updates.scaler, self._run.state.skipped_steps
        return {
            "step": self._run.state.step,
            "epoch": self._run.batches.loader.epoch,
            "loss": result.loss,
            "learning_rate": rate,
            **({} if result.is_skipped else {"grad_norm": result.grad_norm}),
            "tokens": result.tokens,
            "trained_tokens": result.trained_tokens,
            "seconds": seconds,
            "tokens_per_second": result.tokens / seconds,
            "peak_rss_bytes": peak_rss_bytes(),
            **({} if scaler is None else {"loss_scale": scaler.get_scale(), "skipped_steps": skipped}),
        }

    def _say_skipped(self) -> None:
        run = self._run
        scale = 0.0 if run.updates.scaler is None else run.updates.scaler.get_scale()
        self._progress.say(
            f"step {run.state.step} was skipped, because a gradient overflowed float16; the loss scale is now "
            f"{scale:,g}."
        )

    def _check_trained(self, ending: str) -> None:
        """Raise if the run ends, and every step was skipped; the checkpoint is kept, with its lower loss scale."""
        state = self._run.state
        if ending != "interrupted" and state.has_only_skipped_steps:
            text = (
                f"all {state.skipped_steps} steps were skipped, because gradients overflowed float16, so the adapter "
                "is untrained. Resume the run with a larger --max-steps, because each skipped step lowers the loss "
                "scale, or use --dtype bfloat16 or --dtype float32."
            )
            raise self._located(NonFiniteError(text, what=state.skipped_steps, field="dtype"), state.step)

    def _advice(self, cause: RunError, usual: str) -> str:
        """Return advice for a loss or gradient that is not finite, `usual` unless the base is in fp16."""
        if type(cause) is not NonFiniteError:
            return ""
        return ADVICE if self._run.plan.job.dtype == HALF else usual

    def _warn_without_gradient(self) -> None:
        received = received_gradients(self._run.loaded.model, ADAPTER, self._run.updates.optimizer)
        sites, moved = dict.fromkeys(site for site, _ in received), {site for (site, _), one in received.items() if one}
        idle = [site for site in sites if site not in moved]
        if idle:
            self._progress.say(
                f"warning: {len(idle)} of {len(sites)} sites received no gradient in the first step, first "
                f"{format_some(idle)}."
            )

    def _located(self, cause: RunError, step: int, advice: str = "") -> RunError:
        """Return the error with the run directory, step, advice and last valid checkpoint added to its message."""
        saved = self._saved[0]
        last = f"Last valid checkpoint: checkpoint-{saved}." if saved >= 0 else "No checkpoint was saved."
        text = f"{self._folder}: step {step}: {cause}{advice} {last}"
        return type(cause)(text, **{**cause.fields, "where": self._folder})


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
