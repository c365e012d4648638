"""From a request to a model with its adapter, optimizer and data, at the state to begin from.

Nothing of the run folder is changed here; `running.py` does that, once nothing can be refused any more.

One run from settings to adapter: check, load, train, publish.

The order is the point: whatever can be refused is refused before a weight is loaded, and nothing of an older run is
touched before the new one can begin. The arithmetic is in `step.py`, the sequence of steps in `loop.py`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from lorakit import core, hub
from lorakit.core.optimizers import Rates, freeze_factors, rates_by_name, trained_parts
from lorakit.data import lengths
from lorakit.errors import DiskError, LorakitError, ModelError
from lorakit.ops import choices
from lorakit.ops.kernels import compiled
from lorakit.plan.quantized import stored
from lorakit.speed import Acceleration, accelerate
from lorakit.tables import format_count
from lorakit.train import adapter_only, checkpoint
from lorakit.train.checkpoint import TrainState, differences, environment, random_state, restore_random_state
from lorakit.train.interrupts import stoppable
from lorakit.train.loop import Loop, Pace, schedule, steps_per_epoch
from lorakit.train.optimizer import build_adamw, build_lorafa, load_state_tensors, state_tensors
from lorakit.train.progress import Progress, Silence
from lorakit.train.publishing import write_tokenizer
from lorakit.train.results import RunResult, adapter_facts, finish, record
from lorakit.train.run_adapter import allotted, begun
from lorakit.train.run_data import RunBatches, make_batches
from lorakit.train.run_folder import cut, release, remove_run, write_record
from lorakit.train.run_plan import choices_of_run, planned_run
from lorakit.train.run_spec import ADAPTER, Planned, Ready, Request, check
from lorakit.train.settings import TrainSettings
from lorakit.train.space import Space, check_checkpoint, check_space, needed
from lorakit.train.step import Trainee

__all__ = ["RunResult", "run"]


_EVALUATIONS = 10


def make_ready(request: Request, progress: Progress) -> Ready:
    """Load and set up everything; random generators are seeded, or as they were at the checkpoint.

    Args:
        request: A checked request.
        progress: Told what the data is, what is planned, what is taken up.

    Returns:
        All that the loop needs.

    Raises:
        LorakitError: Data, model or checkpoint cannot be used; the message says which and why.
    """
    settings = request.settings
    batches = make_batches(settings, request.data, request.tokenizer, request.forecast.max_length, progress)
    _say_data(request, batches, progress)
    pace = make_pace(settings, batches)
    planned = planned_run(request, pace, lengths(batches.loader.sequences))
    for line in planned.lines:
        progress.say(line)
    for line in planned.details:
        progress.detail(line)
    model = hub.load_model(request.source, planned.dtype, request.device, quantization=settings.stored_as())
    total, base_bytes = request.forecast.shape.parameters, _base_bytes(model, request)
    found = checkpoint.newest_good(request.folder) if settings.resume else checkpoint.Found(None, ())
    notes = _put_adapter(model, request, batches, found, progress)
    trainee = _trainee(model, request, planned)
    if settings.accelerate:
        fast = accelerate(model, keep_feed_forward=planned.recompute != "feed-forward")
        trainee = dataclasses.replace(trainee, fast=fast)
        show = progress.detail if fast.swaps or fast.head or fast.packs else progress.say
        for line in accelerated_lines(fast):
            show(line)
    rates = schedule(settings.learning_rate, pace.total_steps, settings.warmup_ratio, settings.lr_scheduler_type)
    kept = None if found.path is None else checkpoint.load(found.path)
    before = None if kept is None else kept.environment
    chosen = choices_of_run(request, trainee, batches.loader, before, planned.dtype, progress)
    now = environment(request.device, planned.dtype, request.quantization, choices.to_strings(chosen))
    state = _take_up(request, trainee, batches, kept, now, progress)
    return Ready(request, planned, batches, pace, rates, trainee, state, found, total, base_bytes, notes, chosen)


def accelerated_lines(fast: Acceleration) -> list[str]:
    """Describe an acceleration in a few lines; `str(fast)` lists every fused forward.

    Args:
        fast: What `accelerate` made of the model.

    Returns:
        A line about the step, one about the CPU kernels, and one about the modules that are not accelerated, if any.
    """
    left = Counter((part.kind, part.why) for part in fast.skipped)
    if not (fast.swaps or fast.head or fast.packs):
        return [f"Not accelerated: {'; '.join(dict.fromkeys(why for _, why in left)) or fast.head_skipped}."]
    loss = f"loss from logits ({fast.head_skipped})" if fast.head_skipped else "loss without logits"
    rows = "packed sequences" if fast.packs else "padded sequences"
    lines = [f"Acceleration: {format_count(len(fast.swaps), 'fused module')}, {loss}, {rows}."]
    if fast.swaps:
        lines.append(f"CPU kernels: {compiled.describe()}.")
    if left:
        lines.append(
            f"Not accelerated: {'; '.join(f'{count} × {kind} ({why})' for (kind, why), count in left.items())}."
        )
    return lines


def _base_bytes(model: torch.nn.Module, request: Request) -> int:
    """Size of the base in memory; of a quantised one by formula, since its scales are no parameters."""
    quantization = request.stored
    if quantization is None:
        return sum(p.numel() * p.element_size() for p in model.parameters())
    number = next(p.element_size() for p in model.parameters() if p.is_floating_point())
    base = stored(request.forecast.shape, quantization.name, number, quantization.double)
    return number * base.rest + base.size_bytes


def make_pace(settings: TrainSettings, batches: RunBatches) -> Pace:
    """How long a run is and how often it evaluates and saves; an interval that is not given is a tenth of the run.

    Args:
        settings: The intervals and lengths.
        batches: The data.

    Returns:
        The pace.
    """
    accumulation = settings.gradient_accumulation_steps
    epoch = steps_per_epoch(batches.loader.batches_per_epoch, accumulation)
    total = settings.max_steps or max(1, math.ceil(settings.num_train_epochs * epoch))
    eval_steps = settings.eval_steps or max(1, math.ceil(total / _EVALUATIONS))
    return Pace(total, accumulation, eval_steps, settings.save_steps or eval_steps, settings.early_stopping_patience)


def _say_data(request: Request, batches: RunBatches, progress: Progress) -> None:
    new = request.forecast.new_tokens
    for note in (*request.forecast.notes, *(() if new is None else (new.sentence(),))):
        progress.say(note)
    for line in batches.train_report.lines():
        progress.say(f"training data: {line}")
    progress.say(request.data.note)
    if batches.held_out_report is not None:
        total, *losses = batches.held_out_report.lines()
        progress.detail(f"evaluation data: {total}")
        for line in losses:
            progress.say(f"evaluation data: {line}")


def _put_adapter(
    model: Any, request: Request, batches: RunBatches, found: checkpoint.Found, progress: Progress
) -> tuple[str, ...]:
    """A fresh adapter, or the one of the checkpoint; says which and why. The base grows by the rows of new tokens."""
    new = request.forecast.new_tokens
    unseen = () if new is None else tuple(new.unseen(batches.loader))
    if new is not None:
        new.grow(model)
    for path, reason in found.skipped:
        progress.say(f"{path}: skipped, {reason}.")
    if found.path is not None:
        progress.say(f"Resuming from {found.path}.")
        return core.load_adapter(model, found.path, ADAPTER, trainable=True).warnings + unseen
    if request.settings.resume:
        progress.say(f"{request.folder}: no valid checkpoint; the run starts at its first step.")
    allow = ("partial_targets",) if request.settings.allow_partial_targets else ()
    config = request.forecast.config
    if request.settings.allocate_ranks != "none":
        config = allotted(model, request, batches.loader, progress)
    if new is not None:
        config = new.config(config, model)
    config, statistics = begun(model, config, request, batches.loader, progress)
    report = core.attach(model, config, ADAPTER, allow=allow, seed=request.settings.seed, statistics=statistics)
    if new is not None:
        new.begin(model, ADAPTER)
    notes = (*map(str, report.notes), *unseen)
    for note in notes:
        progress.say(note)
    return notes


def _trainee(model: Any, request: Request, planned: Planned) -> Trainee:
    settings, device = request.settings, request.device
    if planned.recompute == "layers":
        _recompute_activations(model)
    pairs = freeze_factors(model, ADAPTER) if settings.optimizer == "lorafa" else None
    named = core.trainable_parameters(model, ADAPTER)
    wanted = Rates(
        settings.learning_rate,
        settings.loraplus_lr_ratio or 1.0,
        settings.loraplus_lr_embedding,
        settings.learning_rate_pattern,
    )
    rates = rates_by_name(trained_parts(model, ADAPTER), wanted)
    optimizer: torch.optim.Optimizer
    if pairs is None:
        optimizer = build_adamw(named, settings.learning_rate, settings.weight_decay, rates)
    else:
        optimizer = build_lorafa(named, pairs, settings.learning_rate, settings.weight_decay, rates)
    autocast = torch.bfloat16 if device.type != "cpu" and planned.dtype == "bfloat16" else None
    norm, budgeted = settings.max_grad_norm, settings.memory_budget is not None
    return Trainee(model, named, optimizer, device, norm, autocast, recompute=planned.recompute, budgeted=budgeted)


def _recompute_activations(model: Any) -> None:
    """Gradient checkpointing, non-reentrant, in which a recomputation has the route of its forward."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    try:
        enable({"use_reentrant": False, "context_fn": core.checkpoint_contexts(model)})
    except ValueError as cause:
        raise ModelError(
            f"{type(model).__name__} does not support gradient checkpointing; leave out --recompute layers (or "
            "--gradient-checkpointing)."
        ) from cause


def _take_up(
    request: Request,
    trainee: Trainee,
    batches: RunBatches,
    snapshot: checkpoint.Snapshot | None,
    now: Mapping[str, Any],
    progress: Progress,
) -> TrainState:
    """Random generators, optimizer and data position: seeded, or those of the checkpoint."""
    seed_everything(request.settings.seed)
    if snapshot is None:
        return TrainState()
    load_state_tensors(trainee.optimizer, trainee.named, snapshot.optimizer)
    batches.loader.load_state(snapshot.state.data)
    changed = differences(snapshot.environment, now)
    if changed:
        progress.say(
            f"This machine differs from the checkpoint's ({'; '.join(changed)}): results agree within rounding, not "
            "bit for bit."
        )
    restore_random_state(snapshot.random, snapshot.random_plain)
    return snapshot.state


def seed_everything(seed: int) -> None:
    """Seed every global random generator that training can draw from."""
    random.seed(seed)
    torch.manual_seed(seed)  # the accelerators' too
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(seed % 2**32)


def run(settings: TrainSettings, progress: Progress | None = None) -> RunResult:
    """Train an adapter as the settings say; the run is kept as a folder.

    Torch's, Python's and numpy's random generators are seeded for the run and put back afterwards.

    Args:
        settings: What to do. With `resume`, what was not given is taken from the run.
        progress: Where to report to; None is silent.

    Returns:
        What the run came to.

    Raises:
        LorakitError: Something cannot be done as asked; class and message say what. An older run has not been touched
            unless training had begun, and then its last good checkpoint stands.
        KeyboardInterrupt: A signal came while loading, or a second one while training. Before the first step nothing
            of the run has been written; the message says so.
    """
    began = time.perf_counter()
    progress = progress or Silence()
    with progress, stoppable(), _random_numbers_kept(), contextlib.ExitStack() as held:
        with _nothing_left(Path(settings.output_dir)):
            request = check(settings, progress)
            held.callback(release, request.lock)
            ready = make_ready(request, progress)
            space = needed(ready)
            for line in check_space(ready, space):
                progress.say(line)
        held.enter_context(choices.activate(ready.choices))
        _begin(ready)
        with _failure_recorded(ready):
            ending = _train(ready, space, progress)
            return finish(ready, ending, time.perf_counter() - began)


@contextlib.contextmanager
def _nothing_left(folder: Path) -> Iterator[None]:
    """A block before the first step: if it fails, a folder that it made is removed."""
    made = not folder.exists()
    try:
        yield
    except BaseException as cause:
        if made:
            with contextlib.suppress(OSError):  # it is not there, or not empty
                folder.rmdir()
        if isinstance(cause, KeyboardInterrupt):
            raise KeyboardInterrupt(f"interrupted before the first step; {folder} is as it was") from None
        raise


def _begin(ready: Ready) -> None:
    """From here on files of the run change."""
    folder, settings = ready.request.folder, ready.request.settings
    if settings.overwrite:
        remove_run(folder)
    for path, _ in ready.found.skipped:
        checkpoint.set_aside(path)
    if settings.resume:
        cut(folder, ready.state.step if ready.found.path else -1, ready.state.evaluated_step)
    write_record(folder, record(ready, "running"))


def _train(ready: Ready, space: Space, progress: Progress) -> str:
    return Loop(
        trainee=ready.trainee,
        loader=ready.batches.loader,
        held_out=ready.batches.held_out,
        schedule=ready.schedule,
        pace=ready.pace,
        state=ready.state,
        save=lambda state: _save(ready, state, space, progress),
        folder=ready.request.folder,
        progress=progress,
        kept=(ready.state.step, ready.state.evaluated_step) if ready.found.path else (-1, -1),
    ).run()


@contextlib.contextmanager
def _failure_recorded(ready: Ready) -> Iterator[None]:
    """A block whose failure is written into the record before it is raised; of a full disk it is said what is saved."""
    folder = ready.request.folder
    try:
        yield
    except LorakitError as cause:
        if isinstance(cause, DiskError):
            text = f"{cause} {adapter_only.account(folder)}"
            cause = DiskError(text, **cause.fields).with_traceback(cause.__traceback__)
        error = {"code": cause.code, "message": str(cause)}
        with contextlib.suppress(DiskError):
            write_record(folder, {**record(ready, "failed"), "error": error})
        raise cause


def _save(ready: Ready, state: TrainState, space: Space, progress: Progress) -> Path | None:
    """Save a checkpoint, or, if that does not fit, the adapter alone and None."""
    request, trainee = ready.request, ready.trainee
    tensors, plain = random_state()
    snapshot = checkpoint.Snapshot(
        state=state,
        optimizer=state_tensors(trainee.optimizer, trainee.named),
        random=tensors,
        random_plain=plain,
        environment=environment(
            request.device, ready.planned.dtype, request.quantization, choices.to_strings(ready.choices)
        ),
        schedule=dataclasses.asdict(ready.schedule),
    )

    def write_adapter(folder: Path) -> None:
        core.save_adapter(
            trainee.model,
            folder,
            ADAPTER,
            base_model_name_or_path=request.source.recorded_name,
            facts=adapter_facts(ready),
        )
        if request.forecast.new_tokens is not None:  # the base's own tokenizer would not know them
            write_tokenizer(request.tokenizer, folder)

    folder = request.folder
    try:
        check_checkpoint(folder, space)
        path = checkpoint.save(folder, snapshot, write_adapter)
    except DiskError as cause:
        adapter_only.save(folder, state.step, state.best_step, write_adapter)
        progress.say(f"warning: {cause} The adapter alone was saved. {adapter_only.account(folder)}")
        return None
    checkpoint.prune(folder, request.settings.save_total_limit, state.best_step)
    adapter_only.prune(folder, state.step, state.best_step)
    return path


@contextlib.contextmanager
def _random_numbers_kept() -> Iterator[None]:
    tensors, plain = random_state()
    try:
        yield
    finally:
        restore_random_state(tensors, plain)
