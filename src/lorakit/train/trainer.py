"""Train an adapter: `run` takes the settings, trains, and publishes the result.

Every error that can be detected without weights is raised before any weights are loaded (`RunSpec.of`), and the files
of an earlier run are not modified until the new run is fully prepared (`prepare`). The training loop is in `loop.py`,
and the computation of a step is in `step.py`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorakit import core, hub
from lorakit.data import Sequence, StoredRecords, few_rows
from lorakit.data.quality import marked, shown_tokens
from lorakit.errors import DiskError, LorakitError, ModelError
from lorakit.ops import choices
from lorakit.ops.kernels import compiled
from lorakit.plan import Job, Plan, bytes_of
from lorakit.plan.fitting import describe
from lorakit.plan.params import with_full_modules
from lorakit.plan.quantized import stored
from lorakit.speed import Acceleration, accelerate
from lorakit.startup import rare_collections
from lorakit.tables import format_count
from lorakit.tasks import EncodeOptions, load_model_for
from lorakit.terminal import working
from lorakit.train.files import checkpoint
from lorakit.train.files.results import RunResult, finish
from lorakit.train.files.run_folder import cut_metrics, remove_run, unlock, write_record
from lorakit.train.files.trackers import Trackers
from lorakit.train.files.train_state import TrainState
from lorakit.train.loop.interrupts import stoppable
from lorakit.train.loop.loop import Loop
from lorakit.train.loop.optimizer import Named, build_optimizer, load_state_tensors
from lorakit.train.loop.progress import Progress
from lorakit.train.loop.scaling import check_named_in_fp32, loss_scaler
from lorakit.train.loop.schedule import schedule
from lorakit.train.processes import sharding
from lorakit.train.processes.agreement import check_alike, check_rows, check_same_base, share_tensors
from lorakit.train.processes.failures import describe as described
from lorakit.train.processes.processes import joined
from lorakit.train.processes.restarting import continued
from lorakit.train.settings.settings import TrainSettings
from lorakit.train.setup.fitting import Probe, longest_rows, settle
from lorakit.train.setup.run_adapter import add_adapter, quantized_run_base
from lorakit.train.setup.run_context import Run, RunLimits, RunPlan, seed_of
from lorakit.train.setup.run_data import RunBatches, make_batches
from lorakit.train.setup.run_plan import autotuned_choices, check_space, disk_space, plan_run
from lorakit.train.setup.run_spec import ADAPTER, RunSpec
from lorakit.train.setup.seen_rows import seen_note

__all__ = ["RunResult", "run"]

SHOWN_CHARACTERS = 120
"""Maximum number of characters of a part of the first row, which is shown before training."""


def run(settings: TrainSettings, progress: Progress | None = None) -> RunResult:
    """Train an adapter and return a `RunResult`; the run's files are saved in `output_dir`.

    The random number generators of torch, Python and numpy are seeded for the run and restored afterwards. In a process
    that torchrun or SLURM started, all processes train together; the first one prints and writes, and each of them
    returns its result.

    Args:
        settings: The run's settings. If `resume` is set, missing settings are taken from the existing run.
        progress: Object that receives progress reports; None disables them.

    Returns:
        The result of the run; after an interruption, its `adapter` is None.

    Raises:
        LorakitError: The run is impossible as specified, or the run failed; the error class and message say why. If the
            error occurs before training starts, an existing run is left unchanged. If the error occurs later, the last
            valid checkpoint is kept.
        KeyboardInterrupt: A signal arrived before the first step (the run directory is left unchanged), or a second
            signal arrived during training.
    """
    started = time.perf_counter()
    progress = progress or Progress()
    with joined() as processes, contextlib.ExitStack() as held:
        progress = held.enter_context(progress if processes.is_first else Progress())
        held.enter_context(stoppable())
        held.enter_context(_restored_random_state())
        with _unchanged_on_failure(Path(settings.output_dir)), processes.together(), rare_collections():
            spec = RunSpec.of(continued(settings, processes, progress), progress, processes)
            held.callback(unlock, spec.lock)
            check_alike(spec)
            current = prepare(spec, progress, started)
            if processes.is_first:
                check_space(spec, current.space, progress)
                if padded := padding_line(current.acceleration, current.plan.estimated.job):
                    progress.say(padded)
        held.enter_context(choices.activate(current.choices))
        held.callback(lambda: current.trackers.close(current.status))
        with processes.together():
            processes.from_first(lambda: _start(current))
        with _failure_recorded(current), sharding.without_hints(current.sharded), current.spec.processes.together():
            Loop(current).steps()
            with rare_collections():  # imports matplotlib
                return current.spec.processes.from_first(lambda: finish(current))


def prepare(spec: RunSpec, progress: Progress, started: float) -> Run:
    """Load the data, the model and the checkpoint without changing any files in the run directory.

    The random number generators are seeded, or restored from the checkpoint.

    Args:
        spec: The run's specification.
        progress: Receives messages about the data, the plan, and the checkpoint to resume from.
        started: Value of `time.perf_counter()` when `run` was called.

    Returns:
        The run, ready for its next step.

    Raises:
        LorakitError: The data, the model or the checkpoint cannot be used; the error class and message say why.
    """
    settings, processes = spec.settings, spec.processes
    asked_data = (spec.data, spec.task, spec.tokenizer, spec.forecast.max_length)
    batches = make_batches(settings, *asked_data, progress, spec.tokenizer_sha256)
    _report_data(spec, batches, progress)
    limits, plan = _planned(spec, batches, progress)
    parallel = sharding.choose_parallel(spec, plan.estimated)
    _seed_everything(settings.seed)  # a new head is initialized while the model is loaded
    model, spec = _loaded(parallel.spec_to_load(spec), plan, progress)
    check_same_base(model, processes)
    size = _base_bytes(model, spec)
    resumed_from, damaged = _newest_checkpoint(spec, progress)
    loader = batches.loader
    notes = _said(add_adapter(model, spec, loader, resumed_from, progress), progress)
    int8 = quantized_run_base(model, spec, loader, progress)
    acceleration = _arranged(model, plan.recompute, settings, progress)
    snapshot = None if resumed_from is None else checkpoint.load(resumed_from)
    before = snapshot.environment if snapshot else None
    asked = (spec, plan.dtype, model, acceleration, loader, before, progress)
    chosen = processes.from_first(lambda: autotuned_choices(*asked))
    spec, sharded = sharding.share_base(model, spec, parallel, progress)
    named, optimizer = _optimized(model, spec, plan)
    if plan.proposed:
        longest = longest_rows(batches.parts, loader.batch_rows * limits.accumulation)
        probe = Probe(model, named, longest, loader.pad_id, chosen, spec.task)
        plan, acceleration = _fitted(spec, plan, probe, acceleration, progress)
    limits, batches = _same_rows_per_step(limits, batches, plan)
    loader = batches.loader
    _seed_everything(seed_of(settings.seed, processes.rank))
    _load_optimizer(optimizer, named, spec, snapshot)
    state, seeded_at = TrainState(), 0
    if snapshot is not None:
        loader.load_state(snapshot.state.data)
        here = checkpoint.environment(spec.device, plan.dtype, spec.quantization_values, choices.to_strings(chosen))
        state, seeded_at = _restore(snapshot, here, spec, progress)
    return Run(
        spec=spec,
        plan=plan,
        batches=batches,
        limits=limits,
        schedule=schedule(settings, limits.total_steps),
        model=model,
        named=named,
        optimizer=optimizer,
        acceleration=acceleration,
        state=state,
        choices=chosen,
        space=disk_space(spec, limits, state.step, model, named),
        base_bytes=size if int8 is None else int8.bytes_after,
        progress=progress,
        started=started,
        trackers=Trackers(progress.say),
        resumed_from=resumed_from,
        damaged=damaged,
        notes=notes,
        sharded=sharded,
        int8=int8,
        scaler=loss_scaler(spec.device, plan.dtype, None if snapshot is None else snapshot.scaler),
        seeded_at=seeded_at,
    )


def _said(notes: tuple[str, ...], progress: Progress) -> tuple[str, ...]:
    """Print messages, and return them."""
    for note in notes:
        progress.say(note)
    return notes


def _same_rows_per_step(limits: RunLimits, batches: RunBatches, plan: RunPlan) -> tuple[RunLimits, RunBatches]:
    """Return the limits and batches of a plan; a step has as many rows as before, which --fit does not change."""
    rows = batches.loader.batch_rows * limits.accumulation
    return limits.with_accumulation(-(-rows // plan.batch_rows)), batches.with_rows(plan.batch_rows)


def _optimized(model: nn.Module, spec: RunSpec, plan: RunPlan) -> tuple[Named, torch.optim.Optimizer]:
    """Return the trainable tensors, which are those of the first process, and the optimizer."""
    named, optimizer = build_optimizer(model, ADAPTER, spec.settings)
    check_named_in_fp32(named, plan.dtype)
    share_tensors(named, spec.processes)
    return named, optimizer


def _load_optimizer(
    optimizer: torch.optim.Optimizer, named: Named, spec: RunSpec, snapshot: checkpoint.Snapshot | None
) -> None:
    """Load the optimizer's state from the checkpoint, or from the one that the run's start adapter comes from."""
    if snapshot is not None:
        load_state_tensors(optimizer, named, snapshot.optimizer)
    elif spec.start is not None and spec.start.optimizer is not None:
        load_state_tensors(optimizer, named, checkpoint.load(spec.start.optimizer).optimizer)


def _planned(spec: RunSpec, batches: RunBatches, progress: Progress) -> tuple[RunLimits, RunPlan]:
    """Return the length of a run, and the plan for one of its processes, which the first process makes."""
    loader, processes = batches.loader, spec.processes
    check_rows(loader, processes)
    limits = RunLimits.of(spec.settings, loader, spec.initial_processes)
    own = limits.with_accumulation(-(-limits.accumulation // processes.count))
    return limits, processes.from_first(lambda: plan_run(spec, own, batches, progress))


def _loaded(spec: RunSpec, plan: RunPlan, progress: Progress) -> tuple[nn.Module, RunSpec]:
    """Load the model, and add the modules that its files lack to those that the adapter trains and saves in full."""
    stored = spec.settings.stored_as()
    start = None if spec.start is None else [spec.start.adapter.folder]
    how = hub.LoadOptions(plan.dtype, spec.device, stored, convert_in_files=spec.base_matmul == "int8")
    loaded = load_model_for(spec.task, spec.source, how, spec.tokenizer, start)
    if start is not None:
        return loaded.model, spec
    if loaded.new_modules:
        progress.say(
            f"New modules, because the model's files lack them: {', '.join(loaded.new_modules)}; they are trained and "
            "saved with the adapter."
        )
    config = with_full_modules(spec.forecast.config, loaded.new_modules)
    forecast = dataclasses.replace(spec.forecast, config=config)
    return loaded.model, dataclasses.replace(spec, forecast=forecast)


def _report_data(spec: RunSpec, batches: RunBatches, progress: Progress) -> None:
    batches.count_inactive(spec.forecast.config)
    for note in spec.forecast.notes:
        progress.say(note)
    for line in batches.train_report.lines():
        progress.say(f"training data: {line}")
    names = spec.task.target.names if spec.task.task.unit == "row" else ()
    row = shown_tokens(_first_row(spec), spec.tokenizer, names)
    progress.say(f"first row, with brackets around what contributes to the loss: {marked(row, most=SHOWN_CHARACTERS)}")
    progress.say(spec.data.note)
    held_out, start = spec.data.held_out, None if spec.start is None else spec.start.adapter
    if start is not None and isinstance(held_out, StoredRecords):
        seen = seen_note(start.folder, start.facts, held_out, by_file=False)
        if seen is not None:
            progress.say(f"warning: evaluation data: {seen}")
    if batches.held_out_report is not None:
        total, *losses = batches.held_out_report.lines()
        progress.detail(f"evaluation data: {total}")
        for line in losses:
            progress.say(f"evaluation data: {line}")
        remedy = "Repeat the run with other seeds (--seed), or pass more rows with --eval-data."
        if few := few_rows(batches.held_out_report.sequences, spec.task.target.kind == "class", remedy):
            progress.say(few)


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


def _newest_checkpoint(spec: RunSpec, progress: Progress) -> tuple[Path | None, tuple[Path, ...]]:
    """Return the newest valid checkpoint (or None), and a tuple of all newer checkpoints, which are damaged."""
    found, damaged = _valid_and_damaged(spec, progress)
    spec.processes.check_equal({"checkpoint": found})
    return found, damaged


def _valid_and_damaged(spec: RunSpec, progress: Progress) -> tuple[Path | None, tuple[Path, ...]]:
    damaged: list[Path] = []
    for path, fault in checkpoint.verified(spec.folder) if spec.settings.resume else ():
        if fault is None:
            return path, tuple(damaged)
        progress.say(f"{path}: skipped, because {fault}.")
        damaged.append(path)
    return None, tuple(damaged)


def _enable_checkpointing(model: nn.Module) -> None:
    """Enable non-reentrant gradient checkpointing; recomputation uses the same adapter routing as the forward pass."""
    names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")  # newest name first
    enable = next(getattr(model, name) for name in names if hasattr(model, name))
    try:
        enable({"use_reentrant": False, "context_fn": core.checkpoint_contexts(model)})
    except ValueError as cause:
        raise ModelError(
            f"{type(model).__name__} does not support gradient checkpointing; omit --recompute layers (or "
            "--gradient-checkpointing).",
            what=type(model).__name__,
            field="recompute",
        ) from cause


def _disable_checkpointing(model: nn.Module) -> None:
    names = ("activation_checkpointing_disable", "gradient_checkpointing_disable")  # newest name first
    next(getattr(model, name) for name in names if hasattr(model, name))()


def _arranged(model: nn.Module, recompute: str, settings: TrainSettings, progress: Progress) -> Acceleration | None:
    """Make a model recompute what a plan says, and accelerate it if the settings allow that."""
    if recompute == "layers":
        _enable_checkpointing(model)
    return _accelerated(model, recompute, progress) if settings.accelerate else None


def _fitted(
    spec: RunSpec, plan: RunPlan, probe: Probe, acceleration: Acceleration | None, progress: Progress
) -> tuple[RunPlan, Acceleration | None]:
    """Return the fastest proposed plan that fits into the limit of `--fit` in each process, according to a probe."""
    now, current = plan.recompute, acceleration

    def measure(candidate: Plan) -> int:
        nonlocal now, current
        if candidate.job.recompute != now:
            if current is not None:
                current.undo()
            if now == "layers":
                _disable_checkpointing(probe.model)
            now = candidate.job.recompute
            current = _arranged(probe.model, now, spec.settings, progress)
        job, made = candidate.job, RunPlan.of(candidate, spec.settings.fit)
        peak = probe.peak_bytes(job.batch_rows, job.accumulation > 1, made.step_options(spec, current))
        return max(spec.processes.exchange(peak))

    limit = bytes_of(spec.settings.fit or "")
    with working("measuring memory"):
        found, used = settle(plan.proposed, limit, measure)
    progress.say(describe(found, limit, used))
    return RunPlan.of(found, spec.settings.fit, dtype_reason=plan.dtype_reason), current


def _accelerated(model: nn.Module, recompute: str, progress: Progress) -> Acceleration:
    acceleration = accelerate(model, keep_feed_forward=recompute != "feed-forward")
    show = progress.detail if acceleration.swaps or acceleration.head or acceleration.packs else progress.say
    for line in acceleration_lines(acceleration):
        show(line)
    return acceleration


def padding_line(acceleration: Acceleration | None, job: Job) -> str:
    """Return a message if batches have to be padded although their plan assumes that they are packed, otherwise "".

    Args:
        acceleration: Result of `accelerate`, or None.
        job: The job of the plan.
    """
    if (
        acceleration is None
        or acceleration.packs
        or not acceleration.swaps
        or job.mean_tokens is None
        or job.batch_rows == 1
    ):
        return ""
    return (
        "Rows are padded, not packed, because packed sequences would affect each other in this model, or some of its "
        "attention layers are not fused. The plan does not include the memory and time that padding takes."
    )


def acceleration_lines(acceleration: Acceleration) -> list[str]:
    """Summarize in a few lines what was accelerated; `str(acceleration)` lists every fused module.

    Args:
        acceleration: Result of `accelerate`.

    Returns:
        Up to three lines: what is accelerated, which CPU kernels are used, and what is not accelerated.
    """
    left = Counter((part.kind, part.why) for part in acceleration.skipped)
    if not (acceleration.swaps or acceleration.head or acceleration.packs):
        reasons = dict.fromkeys(why for _, why in left)
        return [f"Not accelerated: {'; '.join(reasons) or acceleration.head_skipped}."]
    loss = f"loss from logits ({acceleration.head_skipped})" if acceleration.head_skipped else "loss without logits"
    rows = "packed sequences" if acceleration.packs else "padded sequences"
    lines = [f"Acceleration: {format_count(len(acceleration.swaps), 'fused module')}, {loss}, {rows}."]
    lines += [f"{acceleration.release}."] if acceleration.release else []
    if acceleration.swaps:
        lines.append(f"CPU kernels: {compiled.describe()}.")
    if left:
        lines.append(
            f"Not accelerated: {'; '.join(f'{count} × {kind} ({why})' for (kind, why), count in left.items())}."
        )
    return lines


def _restore(
    snapshot: checkpoint.Snapshot, here: dict[str, Any], spec: RunSpec, progress: Progress
) -> tuple[TrainState, int]:
    """Restore the random number generators, or seed them if the checkpoint has those of another number of processes.

    Returns:
        The checkpoint's state, and the step at which the generators were seeded.
    """
    changed = checkpoint.differences(snapshot.environment, here)
    if changed:
        progress.say(
            f"This environment differs from the checkpoint's ({'; '.join(changed)}): the results will agree within "
            "rounding error, but not bit for bit."
        )
    rank, count = spec.processes.rank, spec.processes.count
    random = snapshot.random_of(rank, count)
    if random is not None:
        checkpoint.restore_random_state(*random)
        recorded = (spec.record or {}).get("processes") or {}
        return snapshot.state, int(recorded.get("seeded_at") or 0)
    step = snapshot.state.step
    _seed_everything(seed_of(spec.settings.seed, rank, step))
    saved = format_count(len(snapshot.others) + 1, "process", "processes")
    progress.say(
        f"The checkpoint was saved by {saved}, and the run continues with {count}: the rows of each step stay the "
        "same, but the random number generators, which draw dropout, are seeded again."
    )
    return snapshot.state, step


def _seed_everything(seed: int) -> None:
    """Seed every global random number generator that training may use."""
    random.seed(seed)
    torch.manual_seed(seed)  # also seeds accelerators
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(seed % 2**32)


def _start(current: Run) -> None:
    """Make the first changes to the run directory: remove outdated files and write `run.json`."""
    folder, settings = current.spec.folder, current.spec.settings
    if settings.overwrite:
        remove_run(folder)
    for path in current.damaged:
        checkpoint.set_aside(path)
    if settings.resume:
        cut_metrics(folder, current.state.step if current.resumed_from else -1, current.state.evaluated_step)
    ids = (current.spec.record or {}).get("trackers") or {}
    current.trackers.open(settings.report_to, folder, settings.as_dict(), current.state.step, ids)
    if current.int8 is not None:
        current.int8.write(folder)
    write_record(folder, current.record())


@contextlib.contextmanager
def _unchanged_on_failure(folder: Path) -> Iterator[None]:
    """Remove the run directory, and its parents, if the block created them and then failed."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        yield
    except BaseException as cause:
        with contextlib.suppress(OSError):  # a directory may be missing or not empty
            for path in missing:
                path.rmdir()
        if isinstance(cause, KeyboardInterrupt):
            raise KeyboardInterrupt(f"interrupted before the first step; {folder} is unchanged") from None
        raise


@contextlib.contextmanager
def _failure_recorded(current: Run) -> Iterator[None]:
    """If the block raises any exception, record it in `run.json`; for a `DiskError`, also list what was saved."""
    folder = current.spec.folder
    try:
        yield
    except BaseException as cause:
        raised = cause
        if isinstance(cause, DiskError):
            text = f"{cause} {checkpoint.describe_saved(folder)}"
            raised = DiskError(text, **cause.fields).with_traceback(cause.__traceback__)
        current.status = "interrupted" if isinstance(cause, KeyboardInterrupt) else "failed"
        if current.spec.processes.is_first:
            known = raised if isinstance(raised, LorakitError) else None
            error = (
                {"code": known.code, "message": str(known)} if known else {"code": None, "message": described(cause)}
            )
            with contextlib.suppress(DiskError):
                write_record(folder, {**current.record(), "error": error})
        if raised is cause:
            raise
        raise raised from cause


@contextlib.contextmanager
def _restored_random_state() -> Iterator[None]:
    tensors, plain = checkpoint.random_state()
    try:
        yield
    finally:
        checkpoint.restore_random_state(tensors, plain)
