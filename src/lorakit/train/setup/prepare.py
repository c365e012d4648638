"""Set up a run, in order: data, plan, model, adapter, acceleration, optimizer, and the state to continue from."""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import nn

from lorakit import hub
from lorakit.config import LoraConfig
from lorakit.data import BatchLoader, Sequence, StoredRecords, few_rows
from lorakit.data.quality import marked, shown_tokens
from lorakit.ops import choices
from lorakit.plan.params import with_full_modules
from lorakit.plan.quantized import stored
from lorakit.tables import format_count
from lorakit.tasks import EncodeOptions, load_model_for
from lorakit.train.files import checkpoint
from lorakit.train.files.trackers import Trackers
from lorakit.train.files.train_state import TrainState
from lorakit.train.loop.optimizer import build_optimizer, check_named_in_fp32, load_state_tensors, loss_scaler
from lorakit.train.loop.run import LoadedModel, Run, RunBatches, Start, Updates
from lorakit.train.setup.agreement import check_rows, check_same_base, choose_parallel, share_base, share_tensors
from lorakit.train.setup.fitting import arrange, fit_plan
from lorakit.train.setup.run_adapter import add_adapter, quantized_run_base
from lorakit.train.setup.run_data import count_inactive, make_batches, seen_note
from lorakit.train.setup.run_plan import autotuned_choices, disk_space, plan_run
from lorakit.train.spec import ADAPTER, RunLimits, RunPlan, RunSpec, schedule

SHOWN_CHARACTERS = 120
"""Maximum number of characters of a part of the first row, which is shown before training."""


def prepare(spec: RunSpec, started: float) -> Run:
    """Load the data, the model and the checkpoint without changing any files in the run directory.

    The random number generators are seeded, or restored from the checkpoint. `started` is the value of
    `time.perf_counter()` when `run` was called.

    Raises:
        LorakitError: The data, the model or the checkpoint cannot be used; the error class and message say why.
    """
    batches = make_batches(spec)
    _report_data(spec, batches)
    limits, plan = _planned(spec, batches)
    parallel = choose_parallel(spec, plan.estimated)
    device = spec.device if parallel is None else parallel.loading_device
    resumed = _newest_checkpoint(spec)
    model, base_bytes, notes = _adapted(spec, plan, device, batches.loader, resumed.path)
    loaded = _computing(model, base_bytes, spec, plan, batches.loader, resumed)
    loaded = dataclasses.replace(loaded, sharded=share_base(model, parallel, spec))
    updates = _updates(model, spec, plan, limits, resumed.snapshot)
    plan, loaded = fit_plan(spec, plan, limits, batches, loaded, updates)
    limits, batches = _same_rows_per_step(limits, batches, plan)
    state, seeded_at = _restored(spec, plan, loaded, updates, batches, resumed)
    space = disk_space(spec, limits, state.step, model, updates.named)
    start = Start(started, space, resumed.path, resumed.damaged, seeded_at)
    return Run(spec, plan, batches, limits, loaded, updates, start, state, Trackers(spec.progress.say), notes)


@dataclass(frozen=True)
class ResumedCheckpoint:
    """The newest valid checkpoint of a run, its contents, and all newer checkpoints, which are damaged."""

    path: Path | None
    damaged: tuple[Path, ...]

    @cached_property
    def snapshot(self) -> checkpoint.Snapshot | None:
        """The contents of the checkpoint, without the adapter; None without a checkpoint."""
        return None if self.path is None else checkpoint.load(self.path)


def _adapted(
    spec: RunSpec, plan: RunPlan, device: torch.device, loader: BatchLoader, resumed_from: Path | None
) -> tuple[nn.Module, int, tuple[str, ...]]:
    """Load the base onto a device and put the adapter on it; return also the base's size in bytes, and messages."""
    _seed_everything(spec.settings.seed)  # a new head is initialized while the model is loaded
    model, config = _loaded(spec, plan, device)
    check_same_base(model, spec.processes)
    size = _base_bytes(model, spec)
    notes = add_adapter(model, config, spec, loader, resumed_from)
    for note in notes:
        spec.progress.say(note)
    return model, size, notes


def _computing(
    model: nn.Module, base_bytes: int, spec: RunSpec, plan: RunPlan, loader: BatchLoader, resumed: ResumedCheckpoint
) -> LoadedModel:
    """Choose how an adapted model computes: int8 matmuls, recomputation, fused modules and autotuned kernels."""
    int8 = quantized_run_base(model, spec, loader)
    acceleration = arrange(model, plan.job.recompute, spec)
    before = resumed.snapshot.environment if resumed.snapshot else None
    chosen = spec.processes.from_first(
        lambda: autotuned_choices(spec, plan.job.dtype, model, acceleration, loader, before)
    )
    return LoadedModel(model, base_bytes if int8 is None else int8.bytes_after, chosen, acceleration, int8)


def _same_rows_per_step(limits: RunLimits, batches: RunBatches, plan: RunPlan) -> tuple[RunLimits, RunBatches]:
    """Return the limits and batches of a plan; a step has as many rows as before, which --fit does not change."""
    rows = batches.loader.batch_rows * limits.accumulation
    return limits.with_accumulation(-(-rows // plan.job.batch_rows)), batches.with_rows(plan.job.batch_rows)


def _updates(
    model: nn.Module, spec: RunSpec, plan: RunPlan, limits: RunLimits, snapshot: checkpoint.Snapshot | None
) -> Updates:
    """Return the trainable tensors, which are those of the first process, with their optimizer and schedule."""
    named, optimizer = build_optimizer(model, ADAPTER, spec.settings)
    share_tensors(named, spec.processes)
    check_named_in_fp32(named, plan.job.dtype)
    scaler = loss_scaler(spec.device, plan.job.dtype, None if snapshot is None else snapshot.scaler)
    return Updates(named, optimizer, schedule(spec.settings, limits.total_steps), scaler)


def _load_optimizer(updates: Updates, spec: RunSpec, snapshot: checkpoint.Snapshot | None) -> None:
    """Load the optimizer's state from the checkpoint, or from the one that the run's start adapter comes from."""
    if snapshot is not None:
        load_state_tensors(updates.optimizer, updates.named, snapshot.optimizer)
    elif spec.start is not None and spec.start.optimizer is not None:
        load_state_tensors(updates.optimizer, updates.named, checkpoint.load(spec.start.optimizer).optimizer)


def _planned(spec: RunSpec, batches: RunBatches) -> tuple[RunLimits, RunPlan]:
    """Return the length of a run, and the plan for one of its processes, which the first process makes."""
    loader, processes = batches.loader, spec.processes
    check_rows(loader, processes)
    limits = RunLimits.of(spec.settings, loader, spec.initial_processes)
    own = limits.with_accumulation(-(-limits.accumulation // processes.count))
    return limits, processes.from_first(lambda: plan_run(spec, own, batches))


def _loaded(spec: RunSpec, plan: RunPlan, device: torch.device) -> tuple[nn.Module, LoraConfig]:
    """Load the model, and add the modules that its files lack to those that the adapter trains and saves in full."""
    stored = spec.settings.stored_as()
    start = None if spec.start is None else [spec.start.adapter.folder]
    how = hub.LoadOptions(plan.job.dtype, device, stored, convert_in_files=spec.base_matmul == "int8")
    loaded = load_model_for(spec.task, spec.source, how, spec.tokenizer, start)
    if start is not None:
        return loaded.model, spec.forecast.config
    if loaded.new_modules:
        spec.progress.say(
            f"New modules, because the model's files lack them: {', '.join(loaded.new_modules)}; they are trained and "
            "saved with the adapter."
        )
    return loaded.model, with_full_modules(spec.forecast.config, loaded.new_modules)


def _report_data(spec: RunSpec, batches: RunBatches) -> None:
    """Report what the data of a run contains."""
    report = batches.train_report
    report.inactive_sequences = count_inactive(spec.forecast.config, batches.loader.sequences)
    for note in spec.forecast.notes:
        spec.progress.say(note)
    for line in report.lines():
        spec.progress.say(f"training data: {line}")
    names = spec.task.target.names if spec.task.task.unit == "row" else ()
    row = shown_tokens(_first_row(spec), spec.tokenizer, names)
    spec.progress.say(
        f"first row, with brackets around what contributes to the loss: {marked(row, most=SHOWN_CHARACTERS)}"
    )
    spec.progress.say(spec.data.note)
    held_out, start = spec.data.held_out, None if spec.start is None else spec.start.adapter
    if start is not None and isinstance(held_out, StoredRecords):
        seen = seen_note(start.folder, start.facts, held_out, by_file=False)
        if seen is not None:
            spec.progress.say(f"warning: evaluation data: {seen}")
    if batches.held_out_report is not None:
        total, *losses = batches.held_out_report.lines()
        spec.progress.detail(f"evaluation data: {total}")
        for line in losses:
            spec.progress.say(f"evaluation data: {line}")
        remedy = "Repeat the run with other seeds (--seed), or pass more rows with --eval-data."
        if few := few_rows(batches.held_out_report.sequences, spec.task.target.kind == "class", remedy):
            spec.progress.say(few)


def _first_row(spec: RunSpec) -> Sequence:
    """Return the first row of the training data with the text of its tokens, which the token cache does not keep."""
    options = EncodeOptions(spec.forecast.max_length, spec.settings.overlong, shown=1)
    encode, given = spec.task.task.encode_one, (spec.tokenizer, spec.task.target, options)
    return next(row for record in spec.data.train for row in encode(record, *given))


def _base_bytes(model: nn.Module, spec: RunSpec) -> int:
    """Return the size of the base model's weights in memory, in bytes.

    The size of a quantized base is computed from a formula, because its quantization scales are not parameters.
    """
    quantization = spec.quantization
    if quantization is None:
        return sum(p.numel() * p.element_size() for p in model.parameters())
    element = next(p.element_size() for p in model.parameters() if p.is_floating_point())
    base = stored(spec.forecast.shape, quantization.name, element, quantization.double)
    return element * base.rest + base.size_bytes


def _newest_checkpoint(spec: RunSpec) -> ResumedCheckpoint:
    """Find the checkpoint to resume from, which is the same in all processes."""
    newest, damaged = None, list[Path]()
    for path, fault in checkpoint.verified(spec.folder) if spec.settings.resume else ():
        if fault is None:
            newest = path
            break
        spec.progress.say(f"{path}: skipped, because {fault}.")
        damaged.append(path)
    spec.processes.check_equal({"checkpoint": newest})
    return ResumedCheckpoint(newest, tuple(damaged))


def _restored(
    spec: RunSpec, plan: RunPlan, loaded: LoadedModel, updates: Updates, batches: RunBatches, resumed: ResumedCheckpoint
) -> tuple[TrainState, int]:
    """Seed everything and load the state of the optimizer; a resumed run continues with its data and random numbers.

    Returns:
        The state of training, and the step at which the random number generators were seeded.
    """
    rank, count, snapshot = spec.processes.rank, spec.processes.count, resumed.snapshot
    _seed_everything(spec.seed_of(rank))
    _load_optimizer(updates, spec, snapshot)
    if snapshot is None:
        return TrainState(), 0
    batches.loader.load_state(snapshot.state.data)
    kernels = choices.to_strings(loaded.choices)
    here = checkpoint.environment(spec.device, plan.job.dtype, spec.quantization_values, kernels)
    changed = checkpoint.differences(snapshot.environment, here)
    if changed:
        spec.progress.say(
            f"This environment differs from the checkpoint's ({'; '.join(changed)}): the results will agree within "
            "rounding error, but not bit for bit."
        )
    random = snapshot.random_of(rank, count)
    if random is not None:
        checkpoint.restore_random_state(*random)
        recorded = (spec.record or {}).get("processes") or {}
        return snapshot.state, int(recorded.get("seeded_at") or 0)
    step = snapshot.state.step
    _seed_everything(spec.seed_of(rank, step))
    saved = format_count(len(snapshot.random), "process", "processes")
    spec.progress.say(
        f"The checkpoint was saved by {saved}, and the run continues with {count}: the rows of each step stay the "
        "same, but the random number generators, which draw dropout, are seeded again."
    )
    return snapshot.state, step


def _seed_everything(seed: int) -> None:
    """Seed every global random number generator that training may use."""
    random.seed(seed)
    torch.manual_seed(seed)  # also seeds accelerators
    np.random.seed(seed % 2**32)
