"""Estimates and choices made before a run's first step: time and memory, disk space, and autotuned kernels.

`lorakit.plan` computes the costs, `lorakit.hub` measures the speed of the machine, and `lorakit.speed` tunes kernels.
Autotuned choices stay the same for the whole run and are saved in every checkpoint. A resumed run reuses the choices in
its checkpoint if the environment has not changed, so that results are bit-identical even if new measurements would lead
to different choices.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from lorakit import allocator, hub, plan
from lorakit.core.attachment.saving import saved_form
from lorakit.data import BatchLoader, lengths
from lorakit.errors import DiskError
from lorakit.machine import rss_bytes
from lorakit.ops import choices
from lorakit.plan.budget import describe, fitting
from lorakit.speed import Acceleration, choose
from lorakit.tables import format_bytes
from lorakit.train.files.checkpoint import differences, environment
from lorakit.train.files.run_folder import checkpoints, run_files
from lorakit.train.loop.optimizer import HALF, Named, check_trained_in_fp32
from lorakit.train.loop.run import RunBatches
from lorakit.train.settings.types import SHARDED
from lorakit.train.spec import ADAPTER, DiskSpace, RunLimits, RunPlan, RunSpec

WORTH_MEASURING_FLOPS = 2e12
"""Runs of more FLOPs than this always benchmark the machine; smaller runs do so only to choose the precision."""

_MOMENT_BYTES = 2 * 4
_FOLDER_BYTES = 64 << 10  # configs, manifests, random number generator states, model card
_HEADER_BYTES = 512  # per tensor: its entries in the safetensors header and in JSON files
_ROW_BYTES = 400  # per row of metrics.jsonl


def plan_run(spec: RunSpec, limits: RunLimits, data: RunBatches) -> RunPlan:
    """Choose a run's precision (by benchmarking if it is "auto"), and estimate the run's memory use and duration.

    A resumed run keeps its precision.

    Raises:
        ConfigError: No setting fits within the memory budget or the limit of `fit`, or float16 was requested for a run
            that trains parameters in the dtype of the base.
    """
    resolved = spec.resolved
    recorded, automatic = resolved.get("dtype"), spec.settings.dtype == "auto"
    wanted = recorded or spec.settings.dtype
    calibration, details, sizes = None, [], lengths(data.loader.sequences)
    resident = max(0, rss_bytes() - allocator.free_bytes())
    if wanted == "auto" or _flops(spec, limits, sizes, wanted) > WORTH_MEASURING_FLOPS:
        calibration = hub.calibrate(spec.device, with_fp16=wanted == HALF, with_int8=spec.base_matmul == "int8")
        details.append(calibration.line())
    choice = _precision(spec, limits, sizes, wanted, calibration)
    reason = (
        str(resolved.get("dtype_reason") or f"{recorded}, as at the start of the run.") if recorded else choice.reason
    )
    lines = [f"model: {spec.source.base_name} in {choice.dtype}"]
    (lines if automatic else details).append(f"precision: {reason}")
    speed, upcasts = None, False
    if calibration is not None:
        tuned = spec.settings.accelerate and spec.settings.tuning
        rate = calibration.flops_per_second(choice.dtype, tuned=tuned)
        upcasts = calibration.upcasts(choice.dtype, tuned=tuned)
        threads = calibration.threads if spec.device.type == "cpu" else None
        int8_rate = calibration.int8_flops_per_second
        speed = plan.Speed(rate, source="measured", threads=threads, int8_flops_per_second=int8_rate)
    estimated = _estimate(spec, limits, sizes, choice.dtype, speed)
    estimated = plan.with_job(estimated, upcasts=upcasts, **_job_fields(spec, limits, data, sizes, resident))
    estimated, proposed, reasons = _limited(spec, estimated)
    lines += reasons
    for line in (*lines, *plan.summary(estimated)):
        spec.progress.say(line)
    for line in (*details, *plan.details(estimated)):
        spec.progress.detail(line)
    return RunPlan(estimated, spec.settings.fit, proposed, reason)


def _precision(
    spec: RunSpec, limits: RunLimits, sizes: Sequence[int], wanted: str, calibration: hub.Calibration | None
) -> hub.DtypeChoice:
    """Return the precision of a run and the reason; "auto" does not select float16 for what cannot be trained in it.

    Raises:
        ConfigError: float16 was requested for a run that trains parameters in the dtype of the base.
    """
    choice = hub.choose_dtype(wanted, spec.device, calibration)
    if choice.dtype != HALF:
        return choice
    counted = _estimate(spec, limits, sizes, choice.dtype, None).counted
    narrow = counted.copied + counted.biases
    if wanted == "auto" and narrow:
        text = (
            f"float32: saved modules, heads or biases are trained too, which float16 does not allow ({choice.reason})"
        )
        return hub.DtypeChoice("float32", text)
    check_trained_in_fp32(choice.dtype, narrow)
    return choice


def _estimate(
    spec: RunSpec, limits: RunLimits, sizes: Sequence[int], dtype: str, speed: plan.Speed | None
) -> plan.Plan:
    settings, forecast, quantization = spec.settings, spec.forecast, spec.quantization
    job = plan.Job.of(
        settings,
        length_tokens=max(sizes),
        accumulation=limits.accumulation,
        steps=limits.total_steps,
        dtype=dtype,
        quantization=None if quantization is None else quantization.name,
        double_quantization=quantization is not None and quantization.double,
        base_matmul=spec.base_matmul,
        mean_tokens=sum(sizes) / len(sizes),
    )
    shape = hub.as_kept(forecast.shape, spec.source, spec.task.task.loader, dtype)
    return plan.estimate(shape, forecast.config, job, speed, allow_partial=settings.allow_partial_targets)


def _limited(spec: RunSpec, estimated: plan.Plan) -> tuple[plan.Plan, list[plan.Plan], list[str]]:
    """Choose what a memory limit leaves open; a resumed run keeps its recorded choice.

    Returns:
        The plan with the choice, the plans that a measurement may choose from, and lines that describe the choice.
    """
    settings, recorded = spec.settings, spec.resolved
    limit, budget = settings.fit, settings.memory_budget
    if limit is None and budget is None:
        return estimated, [], []
    chosen = {name: recorded[name] for name in ("batch_rows", "accumulation", "recompute") if name in recorded}
    if len(chosen) == 3:  # an older run has recorded only some of them
        chosen["accumulation"] = -(-chosen["accumulation"] // spec.processes.count)
        chosen_plan = plan.with_job(estimated, **chosen)
        return chosen_plan, [], [] if limit is None else [describe(chosen_plan, plan.bytes_of(limit))]
    if limit is not None:
        proposed = fitting(estimated, plan.bytes_of(limit))
        return proposed[0], proposed, []
    chosen_plan, reason = plan.within(estimated, plan.bytes_of(budget or ""))
    return chosen_plan, [], [reason]


def _job_fields(
    spec: RunSpec, limits: RunLimits, data: RunBatches, sizes: Sequence[int], held_bytes: int
) -> dict[str, int | float | None]:
    """Return the fields of a job that describe its batches, whose rows have these lengths, its evaluations and process.

    `held_bytes` is its resident size without freed memory, before the machine was measured; 0 if unknown.
    """
    settings = spec.settings
    is_limited = settings.fit is not None or settings.memory_budget is not None  # then the longest rows have to fit
    returns = settings.fit is not None or settings.parallel in SHARDED  # malloc returns freed memory
    count = limits.total_steps * limits.accumulation * spec.processes.count
    fields: dict[str, int | float | None] = {
        "packed_tokens": None if is_limited else data.loader.most_tokens(count),
        "malloc_share": 0 if returns else plan.MALLOC_SHARES["varying" if min(sizes) < max(sizes) else "equal"],
        "evaluations": 0,
    }
    if data.held_out_sequences is not None:
        fields["evaluations"] = 1 + -(-limits.total_steps // limits.eval_steps)  # one is before the first step
        fields["evaluated_tokens"] = -(-sum(lengths(data.held_out_sequences)) // spec.processes.count)
    if spec.device.type != "cpu":
        fields["process_bytes"] = None
    elif held_bytes:
        fields |= {"process_bytes": held_bytes, "reserved_bytes": max(0, rss_bytes() - held_bytes)}
    return fields


def _flops(spec: RunSpec, limits: RunLimits, sizes: Sequence[int], dtype: str) -> float:
    estimated = _estimate(spec, limits, sizes, dtype, None)
    return estimated.lora.flops.total * estimated.job.step_tokens * limits.total_steps


def disk_space(spec: RunSpec, limits: RunLimits, step: int, model: nn.Module, named: Named) -> DiskSpace:
    """Return the disk space that a run needs from a given step to its end, with the trainable tensors `named`."""
    settings = spec.settings
    tensors = saved_form(model, ADAPTER).tensors.values()
    adapter = sum(one.numel() * one.element_size() + _HEADER_BYTES for one in tensors) + _tokenizer_bytes(spec)
    moments = sum(_MOMENT_BYTES * p.numel() + 3 * _HEADER_BYTES for _, p in named)
    steps, evaluated = max(0, limits.total_steps - step), bool(spec.data.held_out)
    saves = -(-steps // min(limits.save_steps, limits.eval_steps if evaluated else limits.save_steps)) + 1
    present = len(checkpoints(spec.folder)) if settings.resume else 0
    limit = max(settings.save_total_limit, 2 if evaluated else 1)  # the best and newest checkpoints are always kept
    added = max(0, min(limit, saves + present) - present)
    checkpoint, published = adapter + moments + _FOLDER_BYTES, adapter + _FOLDER_BYTES
    log = _FOLDER_BYTES + 2 * _ROW_BYTES * steps
    replacing = checkpoint if saves + present > limit else 0  # each checkpoint is written before the oldest is removed
    return DiskSpace(checkpoint, published + log, added * checkpoint + max(replacing, published) + log)


def check_space(spec: RunSpec, space: DiskSpace) -> None:
    """Check that the disk has enough free space for a run; a message says if there is no room for all checkpoints.

    Raises:
        DiskError: Not even the adapter fits on the disk.
    """
    folder = spec.folder
    free = shutil.disk_usage(folder).free
    if spec.settings.overwrite:
        free += _bytes_of(run_files(folder))
    if free < space.least:
        raise DiskError(
            f"{folder}: not enough disk space for this run: the adapter alone needs {format_bytes(space.least)}, but "
            f"only {format_bytes(free)} is free. Free up space, or pass an --output-dir on another disk.",
            where=folder,
        )
    if free < space.whole:
        spec.progress.say(
            f"warning: {folder}: the disk may be too small for all checkpoints: {format_bytes(space.whole)} needed "
            f"({format_bytes(space.checkpoint)} each), {format_bytes(free)} free. If a checkpoint does not fit, only "
            "the adapter is saved."
        )


def _bytes_of(paths: Iterable[Path]) -> int:
    """Return the total size of files and directories, in bytes."""
    files = (inner for path in paths for inner in (path, *path.rglob("*")) if inner.is_file())
    return sum(file.stat().st_size for file in files)


def _tokenizer_bytes(spec: RunSpec) -> int:
    """Return the size in bytes of the model directory's tokenizer files, or else of the serialized tokenizer."""
    source = Path(spec.source.path_or_id)
    if source.is_dir():
        return _bytes_of(hub.tokenizer_files(source))
    backend = getattr(spec.tokenizer, "backend_tokenizer", None)
    return 0 if backend is None else len(backend.to_str(pretty=True).encode())


def autotuned_choices(
    spec: RunSpec,
    dtype: str,
    model: nn.Module,
    acceleration: Acceleration | None,
    loader: BatchLoader,
    before: Mapping[str, Any] | None,
) -> dict[str, int]:
    """Return a run's autotuned kernel choices for `lorakit.ops.choices.activate`, and report any measurements.

    They are those of the environment `before`, which is that of the checkpoint to resume from, if it has not changed;
    empty without tuning or acceleration.
    """
    if not spec.settings.tuning or acceleration is None or spec.device.type != "cpu":
        return {}
    here = environment(spec.device, dtype, spec.quantization_values)
    if before is not None and not differences({**before, "kernels": here["kernels"]}, here):
        return choices.from_strings(before.get("kernels"))
    tuned = choose(model, most_tokens(loader, acceleration.packs), max(lengths(loader.sequences)))
    if str(tuned):
        spec.progress.detail(str(tuned))
    return dict(tuned.choices)


def most_tokens(loader: BatchLoader, packs: bool) -> int:
    """Return the number of tokens in the largest batch of a loader; sequences are packed, or padded."""
    longest = sorted(lengths(loader.sequences), reverse=True)[: loader.batch_rows]
    return sum(longest) if packs else longest[0] * len(longest)
