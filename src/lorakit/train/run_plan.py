"""The estimate of a run, from its settings, its data and the measured speed of the machine.

The costs are computed by `lorakit.plan`, the speed is measured by `lorakit.hub`.

Which way the products and the attention of a run go, where there are several: chosen before its first step.

What was chosen acts from the first step to the last and stands in every checkpoint. A run that goes on where nothing
else has changed takes the checkpoint's, so that its bits are the same though another measurement might say otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lorakit import hub, plan
from lorakit.data import Loader, lengths
from lorakit.ops import choices
from lorakit.speed import choose
from lorakit.train.checkpoint import differences, environment
from lorakit.train.loop import Pace
from lorakit.train.progress import Progress
from lorakit.train.run_spec import Planned, Request
from lorakit.train.step import Trainee

WORTH_MEASURING_FLOPS = 2e12
"""A run of fewer FLOPs is over before the machine is measured, unless the precision depends on it."""


def planned_run(request: Request, pace: Pace, lengths: Sequence[int]) -> Planned:
    """Plan a run: its precision first ("auto" measures the machine), then its memory and time.

    Args:
        request: The checked request; a resumed run keeps the precision that it began with.
        pace: Its steps.
        lengths: Tokens of each of its rows.

    Returns:
        The plan.

    Raises:
        ConfigError: No way of computing fits the memory budget.
    """
    recorded = ((request.record or {}).get("resolved") or {}).get("dtype")
    wanted = recorded or request.settings.dtype
    calibration, details = None, []
    if wanted == "auto" or _flops(request, pace, lengths, wanted) > WORTH_MEASURING_FLOPS:
        calibration = hub.calibrate(request.device)
        details.append(calibration.line())
    choice = hub.choose_dtype(wanted, calibration)
    details.append(f"precision: {choice.reason if recorded is None else f'{recorded}, as at the start of the run.'}")
    lines = [f"model: {request.source.base_name} in {choice.dtype}"]
    speed = None
    if calibration is not None:
        settings = request.settings
        rate = calibration.flops_per_second(choice.dtype, tuned=settings.accelerate and settings.tuning)
        threads = calibration.threads if request.device.type == "cpu" else None
        speed = plan.Speed(flops_per_second=rate, source="measured", threads=threads)
    made = _estimate(request, pace, lengths, choice.dtype, speed)
    if request.settings.memory_budget is not None:
        fitting = plan.within(made, plan.bytes_of(request.settings.memory_budget))
        made = fitting.plan
        lines.append(fitting.reason)
    lines += plan.summary(made)
    details += plan.details(made)
    return Planned(choice.dtype, made.job.recompute, made.as_dict(), tuple(lines), tuple(details))


def _estimate(request: Request, pace: Pace, lengths: Sequence[int], dtype: str, speed: plan.Speed | None) -> plan.Plan:
    settings, prospect = request.settings, request.forecast
    job = plan.Job(
        batch_rows=settings.per_device_train_batch_size,
        length_tokens=max(lengths),
        accumulation=pace.accumulation,
        steps=pace.total_steps,
        dtype=dtype,
        recompute=settings.recomputed,
        optimizer=settings.optimizer,
        quantization=None if request.stored is None else request.stored.name,
        double_quantization=request.stored is not None and request.stored.double,
        accelerated=settings.accelerate,
        mean_tokens=sum(lengths) / len(lengths),
    )
    return plan.estimate(prospect.shape, prospect.config, job, speed, allow_partial=settings.allow_partial_targets)


def _flops(request: Request, pace: Pace, lengths: Sequence[int], dtype: str) -> float:
    made = _estimate(request, pace, lengths, dtype, None)
    return made.lora.flops.total * made.job.step_tokens * pace.total_steps


def choices_of_run(
    request: Request, trainee: Trainee, loader: Loader, before: Mapping[str, Any] | None, dtype: str, progress: Progress
) -> dict[str, int]:
    """What acts in a run, as `lorakit.ops.choices.activate` takes it; says what it cost where something was measured.

    Args:
        request: The request; without its `tuning` nothing is chosen.
        trainee: The model; where it is not accelerated nothing looks at choices.
        loader: Its batches.
        before: The environment of the checkpoint that is taken up, or None.
        dtype: Precision of the base.
        progress: Told the cost.
    """
    if not request.settings.tuning or trainee.fast is None or request.device.type != "cpu":
        return {}
    here = environment(request.device, dtype, request.quantization)
    if before is not None and not differences({**before, "kernels": here["kernels"]}, here):
        return choices.from_strings(before.get("kernels"))
    longest = max(lengths(loader.sequences))
    found = choose(trainee.model, most_tokens(loader, trainee.fast.packs), longest)
    if str(found):
        progress.detail(str(found))
    return dict(found.choices)


def most_tokens(loader: Loader, packs: bool) -> int:
    """Tokens of the largest batch that a loader can give.

    Args:
        loader: The batches.
        packs: Rows lie end to end, without padding.
    """
    longest = sorted(lengths(loader.sequences), reverse=True)[: loader.batch_rows]
    return sum(longest) if packs else longest[0] * len(longest)
