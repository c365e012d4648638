"""Choose how the model of a run computes: recomputation, fused modules, and what fits into the limit of `--fit`.

`lorakit.plan.budget` proposes settings for `--fit`. A probe then runs the forward and backward passes of the longest
rows, which need the most memory, while placeholders take the room of the optimizer's moments. Nothing that affects the
run's result changes: the order of the data, the random number generators and the gradients stay as they were.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import nn

from lorakit import allocator, core
from lorakit.data import Batch, lengths
from lorakit.data import Sequence as Tokens
from lorakit.data.encoding import IGNORED
from lorakit.errors import ModelError, RunError
from lorakit.machine import peak_rss_bytes, rss_bytes
from lorakit.ops import choices
from lorakit.ops.kernels import compiled
from lorakit.plan import Job, Plan, bytes_of
from lorakit.plan.budget import describe, does_not_fit, needed_bytes, smaller
from lorakit.session.measuring import oom_as_run_error
from lorakit.speed import Acceleration, accelerate
from lorakit.tables import format_count
from lorakit.tasks import TaskOnData
from lorakit.terminal import working
from lorakit.train.files.checkpoint import random_state, restore_random_state
from lorakit.train.loop.optimizer import Named
from lorakit.train.loop.run import LoadedModel, RunBatches, Updates, step_options
from lorakit.train.loop.step import StepOptions
from lorakit.train.spec import RunLimits, RunPlan, RunSpec

GROWTH = 0.05
"""Fraction of the limit that the probe leaves free: malloc's gaps grow a little when the lengths of rows vary."""


def arrange(model: nn.Module, recompute: str, spec: RunSpec) -> Acceleration | None:
    """Make a model recompute what a plan says, and accelerate it if the settings allow that."""
    if recompute == "layers":
        _enable_checkpointing(model)
    if not spec.settings.accelerate:
        return None
    acceleration = accelerate(model, keep_feed_forward=recompute != "feed-forward")
    show = spec.progress.detail if acceleration.swaps or acceleration.head or acceleration.packs else spec.progress.say
    for line in acceleration_lines(acceleration):
        show(line)
    return acceleration


def _enable_checkpointing(model: nn.Module) -> None:
    """Enable non-reentrant gradient checkpointing; recomputation uses the same adapter routing as the forward pass."""
    names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")  # newest name first
    enable = next(getattr(model, name) for name in names if hasattr(model, name))
    try:
        enable({"use_reentrant": False, "context_fn": core.checkpoint_contexts(model)})
    except ValueError as cause:
        text = (
            f"{type(model).__name__} does not support gradient checkpointing; omit --recompute layers (or "
            "--gradient-checkpointing)."
        )
        raise ModelError(text, what=type(model).__name__, field="recompute") from cause


def _disable_checkpointing(model: nn.Module) -> None:
    names = ("activation_checkpointing_disable", "gradient_checkpointing_disable")  # newest name first
    next(getattr(model, name) for name in names if hasattr(model, name))()


def acceleration_lines(acceleration: Acceleration) -> list[str]:
    """Say in up to three lines what is accelerated, which CPU kernels are used, and what is not accelerated.

    `str(acceleration)` lists every fused module.
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


def padding_line(acceleration: Acceleration | None, job: Job) -> str:
    """Return a message if batches have to be padded although their plan assumes that they are packed, otherwise ""."""
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


def fit_plan(
    spec: RunSpec, plan: RunPlan, limits: RunLimits, batches: RunBatches, loaded: LoadedModel, updates: Updates
) -> tuple[RunPlan, LoadedModel]:
    """Return the fastest proposed plan that fits into the limit of `--fit` in each process, according to a probe."""
    if not plan.proposed:
        return plan, loaded
    loader = batches.loader
    longest = longest_rows(batches.parts, loader.batch_rows * limits.accumulation)
    probe = Probe(loaded.model, updates.named, longest, loader.pad_id, loaded.choices, spec.task)
    now, current = plan.job.recompute, loaded.acceleration

    def measure(candidate: Plan) -> int:
        nonlocal now, current
        if candidate.job.recompute != now:
            if current is not None:
                current.undo()
            if now == "layers":
                _disable_checkpointing(probe.model)
            now = candidate.job.recompute
            current = arrange(probe.model, now, spec)
        job, plan_of_job = candidate.job, RunPlan(candidate, spec.settings.fit)
        peak = probe.peak_bytes(job.batch_rows, job.accumulation > 1, step_options(spec, plan_of_job, current))
        return max(spec.processes.exchange(peak))

    limit = bytes_of(spec.settings.fit or "")
    with working("measuring memory"):
        fitting_plan, used = settle(plan.proposed, limit, measure)
    spec.progress.say(describe(fitting_plan, limit, used))
    plan = RunPlan(fitting_plan, spec.settings.fit, dtype_reason=plan.dtype_reason)
    return plan, replace(loaded, acceleration=current)


@dataclass(frozen=True)
class Probe:
    """Measures the memory that the longest rows of a run need (longest first)."""

    model: nn.Module
    named: Named
    rows: Sequence[Tokens]
    pad_id: int
    choices: Mapping[str, int]
    task: TaskOnData

    def peak_bytes(self, batch_rows: int, accumulates: bool, options: StepOptions) -> int:
        """Return the peak memory use of a step, in bytes: of the process or, on a GPU, of its memory.

        A step that accumulates several batches has gradients during forward passes. The peak is more than any limit if
        memory ran out.
        """
        batch = _longest(self.rows[:batch_rows], self.pad_id, self.task)
        before = _begin(options.device)
        try:
            with _unchanged(self.model, self.named), choices.activate(self.choices):
                moments = [
                    torch.ones_like(p, requires_grad=False) for _, p in self.named for _ in ("exp_avg", "exp_avg_sq")
                ]
                for _ in range(1 + accumulates):
                    if options.releases_memory:
                        allocator.trim()
                    with oom_as_run_error(batch, " in the probe of --fit", lambda _: ""):
                        with options.computing():
                            loss = options.loss(self.model, batch, options.device, options.acceleration)
                        (loss / batch.trained_tokens).backward()
                del moments
                return _peak(options.device, before)
        except RunError:
            return 1 << 62


def settle(proposed: Sequence[Plan], limit_bytes: int, measure: Callable[[Plan], int]) -> tuple[Plan, int]:
    """Return the first proposed plan (fastest first) whose measured memory use is below a limit, and that use in bytes.

    `measure` applies a plan's settings and returns the peak memory use in bytes.

    Raises:
        ConfigError: No plan fits.
    """
    smallest, least = min(proposed, key=needed_bytes), 1 << 62
    while proposed:
        plan = proposed[0]
        used = measure(plan)
        if used <= (1 - GROWTH) * limit_bytes:
            return plan, used
        least, proposed = min(least, used), smaller(proposed, plan)
    raise does_not_fit(limit_bytes, smallest, round(least / (1 - GROWTH)))


def longest_rows(parts: Sequence[Sequence[Tokens]], count: int) -> list[Tokens]:
    """Return the `count` longest sequences of several data sets, longest first."""
    rows = [(size, part, index) for part in parts for index, size in enumerate(lengths(part))]
    rows.sort(key=lambda entry: entry[0], reverse=True)
    return [part[index] for _, part, index in rows[:count]]


def _longest(rows: Sequence[Tokens], pad_id: int, task: TaskOnData) -> Batch:
    """Return a batch of these rows; in text, all tokens contribute to the loss, which needs the most memory."""
    batch = task.objective.collate(list(rows), pad_id, 0.0)
    if not task.task.generates:
        return batch
    labels = batch.input_ids.masked_fill(batch.attention_mask == 0, IGNORED)
    return replace(batch, labels=labels, trained_tokens=max(1, batch.tokens - len(labels)))


@contextmanager
def _unchanged(model: nn.Module, named: Named) -> Iterator[None]:
    """Put a model in training mode, as the loop does; restore gradients and random number generators after a block."""
    gradients = [parameter.grad for _, parameter in named]
    tensors, plain = random_state()
    model.train()
    try:
        for _, parameter in named:
            parameter.grad = None
        yield
    finally:
        for (_, parameter), gradient in zip(named, gradients, strict=True):
            parameter.grad = gradient
        restore_random_state(tensors, plain)


def _begin(device: torch.device) -> int:
    """Return freed memory to the system or the device; return the peak of the process so far, in bytes."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    elif device.type == "cpu":
        allocator.trim()
    return peak_rss_bytes()


def _peak(device: torch.device, before: int) -> int:
    """Return the peak since `_begin`, in bytes.

    On a CPU, the kernel reports only the peak of the whole process. If the probe did not raise it, memory use is what
    the process holds now, because malloc keeps freed memory.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    peak = peak_rss_bytes()
    return peak if peak > before else rss_bytes()
