"""The end of a run: publish the adapter, plot the loss, and write `run.json`.

The adapter's files are copied byte for byte from the chosen checkpoint. What the adapter does not need (the plot)
cannot fail the run: its errors become notes.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from lorakit import durable_folders
from lorakit.errors import LorakitError, RunError, describe
from lorakit.machine import peak_rss_bytes
from lorakit.report import loss_plot, read_metrics
from lorakit.tables import format_bytes, format_percent, format_rate, format_seconds, format_some
from lorakit.train.files import checkpoint, run_folder
from lorakit.train.files.model_card import evaluation_line, metrics_line
from lorakit.train.loop.loop import evaluate
from lorakit.train.loop.optimizer import received_gradients
from lorakit.train.loop.run import INT8_NAME, Run
from lorakit.train.loop.saving import metrics_at, undefined_at
from lorakit.train.spec import ADAPTER

T = TypeVar("T")

_WEIGHTS = "adapter_model.safetensors"
_CHECKPOINT_ONLY = {checkpoint.MANIFEST, checkpoint.STATE, checkpoint.OPTIMIZER, checkpoint.RANDOM}


@dataclass(frozen=True)
class RunResult:
    """The result of a run.

    Attributes:
        folder: The run directory.
        ending: "finished", "stopped early" or "interrupted".
        adapter: Directory of the adapter; None after an interruption.
        steps: Number of optimizer steps taken.
        total_steps: Total number of optimizer steps in the run.
        adapter_step: The step at which `adapter` was saved; None after an interruption.
        first_loss: Evaluation loss before the first step, of the base or of the adapter that the run starts from; None
            without evaluation data.
        best_loss: Evaluation loss at the best step, or None.
        adapter_loss: Evaluation loss at `adapter_step`, or None; exceeds `best_loss` if the best checkpoint was lost.
        trainable_parameters: Number of trainable parameters.
        total_parameters: Number of parameters in the base.
        adapter_bytes: Size of the adapter's weights file; 0 after an interruption.
        base_bytes: Size of the base's weights in memory.
        tokens_per_second: Average speed over all steps, excluding evaluation and saving.
        peak_rss_bytes: Peak resident memory of the process.
        seconds: Duration of the call to `run`.
        dtype: Precision of the base.
        plan: The plan, from `Plan.as_dict()`.
        notes: Messages for the user.
        printed: Number of the first notes that were printed during the run.
        checkpoint_step: The step from which `--resume` continues after an interruption, or None.
        first_metrics: Metrics of the task before the first step; empty for language models. A value is None if the
            evaluation data does not define the metric.
        adapter_metrics: Metrics of the task at `adapter_step`, in the same form.
        base_matmul: How the base was multiplied: "dtype" or "int8".
        original_base_loss: With `keep_bf16_base`, evaluation loss of the last step on the original weights, or None.
        untrained_sites: Number of sites, with each expert counted, that received no gradient in any step.
    """

    folder: Path
    ending: str
    adapter: Path | None
    steps: int
    total_steps: int
    adapter_step: int | None
    first_loss: float | None
    best_loss: float | None
    adapter_loss: float | None
    trainable_parameters: int
    total_parameters: int
    adapter_bytes: int
    base_bytes: int
    tokens_per_second: float
    peak_rss_bytes: int
    seconds: float
    dtype: str
    plan: dict[str, Any]
    notes: tuple[str, ...]
    printed: int = 0
    checkpoint_step: int | None = None
    first_metrics: Mapping[str, float | None] = field(default_factory=dict)
    adapter_metrics: Mapping[str, float | None] = field(default_factory=dict)
    base_matmul: str = "dtype"
    original_base_loss: float | None = None
    untrained_sites: int = 0

    def lines(self, verbose: bool = False) -> list[str]:
        """Return the result as lines of text, most important first, with estimates and counts if `verbose`."""
        if self.ending == "interrupted":
            return self._interrupted()
        speed, planned = format_rate(self.tokens_per_second, "tokens/s"), ""
        rate = (self.plan.get("lora") or {}).get("tokens_per_second")
        if verbose and rate:
            planned = f" (estimated {format_rate(rate, 'tokens/s')})"
        lines = [
            metrics_line(self.first_metrics, self.adapter_metrics)
            or evaluation_line(None if self.best_loss is None else self.first_loss, self.adapter_loss),
            f"Adapter: {self.adapter} (step {self.adapter_step}, {format_bytes(self.adapter_bytes)})",
            f"{'Stopped early' if self.ending == 'stopped early' else 'Finished'} at step {self.steps} of "
            f"{self.total_steps} in {format_seconds(self.seconds)}, {speed}{planned}, peak memory "
            f"{format_bytes(self.peak_rss_bytes)}.",
        ]
        if verbose:
            fraction = format_percent(self.trainable_parameters / self.total_parameters)
            lines.append(
                f"Trained {self.trainable_parameters:,} of {self.total_parameters:,} parameters ({fraction}); the "
                f"base's weights take {format_bytes(self.base_bytes)}."
            )
        if self.base_matmul == "int8":
            lines.append(f"Base matmuls: {INT8_NAME}; merge the adapter into the original base.")
        return [*lines, *self.notes[self.printed :]]

    def _interrupted(self) -> list[str]:
        command = f"lorakit train --output-dir {self.folder} --resume"
        where = f"Interrupted at step {self.steps} of {self.total_steps}"
        if self.checkpoint_step == self.steps:
            return [f"{where}; a checkpoint was saved. Resume with: {command}"]
        start = "the beginning" if self.checkpoint_step is None else f"step {self.checkpoint_step}"
        return [
            f"{where}; the checkpoint could not be saved. {checkpoint.describe_saved(self.folder)}",
            f"Resume from {start} with: {command}",
        ]

    def as_dict(self) -> dict[str, Any]:
        """Return the result as a dict of plain JSON values."""
        values = dataclasses.asdict(self)
        values.update(folder=str(self.folder), adapter=str(self.adapter) if self.adapter else None)
        values["notes"] = list(self.notes)
        del values["printed"]
        return values


def finish(run: Run) -> RunResult:
    """Publish the adapter and write `run.json`, also with the result; after an interruption, write only `run.json`.

    Raises:
        RunError: The run has neither a valid checkpoint nor an adapter saved without one.
        DiskError: A file cannot be written.
    """
    folder, state, notes = run.spec.folder, run.state, list(run.notes)
    adapter = step = resumable = original = None
    if run.status == "interrupted":
        newest = checkpoint.newest_valid(folder)
        resumable = None if newest is None else run_folder.step_of(newest)
    else:
        step, source = _chosen(run, notes)
        adapter = publish_adapter(folder, source)
        if source == run_folder.adapter_only_path(folder, step):
            shutil.rmtree(source, ignore_errors=True)
        if state.skipped_steps:
            notes.append(
                f"{state.skipped_steps} of {state.step} steps were skipped, because gradients overflowed float16; the "
                "loss scale was lowered, and these steps did not advance the learning rate schedule."
            )
        original = _attempt("the evaluation on the original weights", lambda: _on_original_weights(run, notes), notes)
        _plot_loss(folder, f"{run.spec.source.base_name}: loss by step", notes)
        loss, before = state.loss_at(step), run.spec.before_training
        if loss is not None and loss == state.first_loss:
            notes.append(f"The evaluation data does not tell the adapter from {before}: the loss is the same.")
        elif loss is not None and state.first_loss is not None and loss > state.first_loss:
            notes.append(f"The adapter is not better than {before} on the evaluation data; do not use it.")
    first_metrics, adapter_metrics = _attempt("The metrics", lambda: metrics_at(run, 0, step), notes) or ({}, {})
    notes += _attempt("The metrics", lambda: undefined_at(run, step), notes) or []
    result = RunResult(
        folder=folder,
        ending=run.status,
        adapter=adapter,
        steps=state.step,
        total_steps=run.limits.total_steps,
        adapter_step=step,
        first_loss=state.first_loss,
        best_loss=state.best_loss,
        adapter_loss=None if step is None else state.loss_at(step),
        trainable_parameters=run.trainable_parameters,
        total_parameters=run.total_parameters,
        adapter_bytes=(adapter / _WEIGHTS).stat().st_size if adapter else 0,
        base_bytes=run.loaded.base_bytes,
        tokens_per_second=state.tokens / state.seconds if state.seconds else 0.0,
        peak_rss_bytes=peak_rss_bytes(),
        seconds=time.perf_counter() - run.start.started,
        dtype=run.plan.job.dtype,
        plan=run.plan.estimated.as_dict(),
        untrained_sites=0 if adapter is None else _untrained(run, notes),  # adds a note
        notes=tuple(notes),
        printed=len(run.notes),
        checkpoint_step=resumable,
        first_metrics=first_metrics,
        adapter_metrics=adapter_metrics,
        base_matmul=run.spec.base_matmul,
        original_base_loss=original,
    )
    unrecorded = list[str]()
    write = run_folder.write_record
    _attempt("run.json", lambda: write(folder, {**run.record(), "result": result.as_dict()}), unrecorded)
    if not unrecorded:
        return result
    _attempt("run.json", lambda: write(folder, run.record()), [])  # at least the final status
    return dataclasses.replace(result, notes=(*notes, *unrecorded, "The result of the run was not recorded."))


def _attempt(what: str, work: Callable[[], T], notes: list[str]) -> T | None:
    """Return the result of work that the adapter does not depend on; if it fails, add a note and return None."""
    try:
        return work()
    except Exception as cause:  # noqa: BLE001 - plots and files of other packages may raise anything
        notes.append(str(cause) if isinstance(cause, LorakitError) else f"{what} failed ({describe(cause)}).")
        return None


def _untrained(run: Run, notes: list[str]) -> int:
    """Return the number of sites, with each expert counted, that received no gradient in any step, and note them."""
    received = received_gradients(run.loaded.model, ADAPTER, run.updates.optimizer)
    idle = [
        f"{site} (expert {expert})" if (site, 1) in received else site
        for (site, expert), one in received.items()
        if not one
    ]
    if len(idle) == len(received):
        notes.append(
            "The adapter is untrained, do not use it: no site received a gradient in any step, because the model does "
            "not use the adapted modules on this data, or the loss does not depend on them."
        )
    elif idle:
        notes.append(
            f"{len(idle)} of {len(received)} sites received no gradient in any step, so they are untrained, first "
            f"{format_some(idle)}; the model did not use them on this data, like experts that no token reached."
        )
    return len(idle)


def _on_original_weights(run: Run, notes: list[str]) -> float | None:
    """Evaluate the adapter of the last step on the original weights of an int8 base, if they were kept."""
    if run.loaded.int8 is None or not run.loaded.int8.originals or run.batches.held_out is None:
        return None
    if run.loaded.acceleration is not None:
        run.loaded.acceleration.undo()
    run.loaded.int8.restore(run.loaded.model)
    evaluation = evaluate(run.loaded.model, run.batches.held_out(), run.spec.device, objective=run.spec.task.objective)
    if evaluation is None:  # for the type checker only: nothing stops this evaluation
        return None
    state = run.state
    in_int8 = f" (in int8: {state.last_loss:.4f})" if state.last_loss and state.evaluated_step == state.step else ""
    notes.append(f"Evaluation loss of step {state.step} on the original weights: {evaluation.loss:.4f}{in_int8}.")
    return evaluation.loss


def _chosen(run: Run, notes: list[str]) -> tuple[int, Path]:
    """Return the step to publish (the best evaluated one, or else the last) and the directory of its adapter."""
    folder, state = run.spec.folder, run.state
    wanted = state.best_step or state.step
    whole = folder / f"checkpoint-{wanted}"
    try:
        checkpoint.verify(whole)
    except RunError as cause:
        alone = run_folder.adapters_only(folder)
        if run_folder.adapter_only_path(folder, wanted) in alone:
            return wanted, run_folder.adapter_only_path(folder, wanted)
        valid = checkpoint.newest_valid(folder)
        saved = [*([valid] if valid else []), *alone]
        if not saved:
            raise
        path = max(saved, key=run_folder.step_of)
        notes.append(f"{cause} {run_folder.ADAPTER_FOLDER}/ was copied from {path.name} instead.")
        return run_folder.step_of(path), path
    return wanted, whole


def publish_adapter(folder: Path, source: Path) -> Path:
    """Atomically publish the adapter of a verified checkpoint, or one saved without a checkpoint, as `adapter/`.

    Files are hard-linked if the disk has no room for copies, or had none for a checkpoint.

    Raises:
        DiskError: A file cannot be written.
    """
    final, is_full = folder / run_folder.ADAPTER_FOLDER, source in run_folder.adapters_only(folder)
    with durable_folders.publish_directory(final, replace=True) as temporary:
        for path in sorted(source.iterdir()):
            if path.is_file() and path.name not in _CHECKPOINT_ONLY:
                _copy(path, temporary / path.name, is_full)
    return final


def _copy(path: Path, target: Path, is_full: bool) -> None:
    """Copy a file, or hard-link it; which is tried first depends on whether the disk is known to be full."""
    first, second = (os.link, shutil.copyfile) if is_full else (shutil.copyfile, os.link)
    try:
        first(path, target)
    except OSError:  # not all file systems support hard links
        target.unlink(missing_ok=True)
        second(path, target)


def _plot_loss(folder: Path, title: str, notes: list[str]) -> None:
    """Draw `loss.svg` if matplotlib is installed; add a note with the file's path or the reason it is missing."""
    path, failed = folder / run_folder.PLOT_FILE, list[str]()
    _attempt(run_folder.PLOT_FILE, lambda: loss_plot(read_metrics(folder), path, title), failed)
    notes += failed or [f"Loss by step: {path}"]
