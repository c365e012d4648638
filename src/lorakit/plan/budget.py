"""Memory limits: parse sizes, and choose settings that fit.

`within` fits a step into a budget by recomputation; `fitting` fits a run into a limit by the rows per batch, the
batches per step and recomputation, and `lorakit.train.setup.fitting` measures the result. The rows per optimizer step
and everything else that affects the result stay the same.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from lorakit.errors import ConfigError
from lorakit.plan.estimating import Plan, estimate
from lorakit.plan.job import RECOMPUTED
from lorakit.tables import format_bytes

UNITS = {"": 1, "b": 1}
UNITS |= {f"{prefix}b": 1000**power for power, prefix in enumerate("kmgt", 1)}
UNITS |= {f"{prefix}ib": 1024**power for power, prefix in enumerate("kmgt", 1)}
"""Lowercase unit -> size in bytes."""

SIZE_FORM = "write a number and a unit, such as 4GiB or 800MB"
"""Hint for messages on how to write a size."""


def bytes_of(text: str, field: str | None = None) -> int:
    """Parse a size such as "4GiB", "1.5 GB" or "800MB" into bytes; a number without a unit is in bytes.

    Raises:
        ConfigError: `text` is not a size of at least one byte; it names `field`.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    size = UNITS.get(match[2].lower()) if match else None
    if match is None or size is None or not float(match[1]) * size >= 1:
        named = "" if field is None else f"{field}: "
        raise ConfigError(f"{named}{text!r} is not a size; {SIZE_FORM}.", what=text, field=field)
    return int(float(match[1]) * size)


def within(plan: Plan, budget_bytes: int) -> tuple[Plan, str]:
    """Return the plan with the cheapest recomputation whose planned peak fits, and a message with the reason.

    Raises:
        ConfigError: No setting fits; the message suggests changes.
    """
    tried: list[tuple[str, int]] = []
    for recompute in RECOMPUTED:
        variant = with_job(plan, recompute=recompute)
        peak = variant.lora.memory.peak_bytes
        if peak <= budget_bytes:
            without = "".join(f"; --recompute {other} needs {format_bytes(size)}" for other, size in reversed(tried))
            reason = f"--recompute {recompute} is the cheapest setting that fits ({format_bytes(peak)}){without}"
            return variant, f"memory budget {format_bytes(budget_bytes)}: {reason}"
        tried.append((recompute, peak))
    recompute, least = min(tried, key=lambda pair: pair[1])
    text = (
        f"the job does not fit in a memory budget of {format_bytes(budget_bytes)}: it needs at least "
        f"{format_bytes(least)}, with --recompute {recompute}. {_what_would(plan, budget_bytes)}"
    )
    raise ConfigError(text, what=format_bytes(budget_bytes), field="memory_budget")


def with_job(plan: Plan, **fields: float | str | None) -> Plan:
    """Return the plan of the same run with other values of some fields of its job."""
    estimated = estimate(plan.shape, plan.config, replace(plan.job, **fields), plan.speed, allow_partial=True)  # type: ignore[arg-type]
    return replace(estimated, ranks=plan.ranks)


def _what_would(plan: Plan, budget: int) -> str:
    """Return advice for the error message: a smaller batch that fits or, if none does, other changes."""
    rows, most = plan.job.batch_rows, RECOMPUTED[-1]
    while rows > 1:
        rows //= 2
        peak = with_job(plan, batch_rows=rows, recompute=most).lora.memory.peak_bytes
        if peak <= budget:
            return (
                f"A batch of {rows} would fit with --recompute {most} ({format_bytes(peak)}); raise "
                "--gradient-accumulation-steps to keep the effective batch size."
            )
    needs = with_job(plan, batch_rows=1, recompute=most).lora.memory
    return (
        f"A batch of 1 needs {format_bytes(needs.peak_bytes)} (weights {format_bytes(needs.bytes_of('weights'))}): "
        "use a smaller --max-length or model, or --quantization."
    )


MARGIN = 0.15
"""Fraction by which a process may exceed its planned peak (`benchmarks/bench_memory.py`)."""

FIXED_TOKENS = 100
"""Tokens whose matmuls take as long as reading the weights once, which each batch has to do."""


def needed_bytes(plan: Plan) -> int:
    """Return the memory limit that a plan needs, in bytes: its peak plus `MARGIN`."""
    return round((1 + MARGIN) * plan.lora.memory.peak_bytes)


def by_cost(plan: Plan) -> list[Plan]:
    """Return plans for all batch sizes that divide a step and all recomputations, by cost. [docs/math.md (100)]"""
    rows = plan.job.batch_rows * plan.job.accumulation
    sizes = [size for size in range(1, rows + 1) if rows % size == 0]
    ways = [way for way in RECOMPUTED if plan.job.accelerated or way != "feed-forward"]
    plans = [
        with_job(plan, batch_rows=size, accumulation=rows // size, recompute=way) for size in sizes for way in ways
    ]
    return sorted(plans, key=_cost)


def _cost(plan: Plan) -> tuple[float, int]:
    """Return the relative time per token, and the peak in bytes for settings that take the same time."""
    tokens = plan.job.batch_rows * (plan.job.mean_tokens or plan.job.length_tokens)
    return plan.lora.flops.total * (1 + FIXED_TOKENS / tokens), plan.lora.memory.peak_bytes


def fitting(plan: Plan, limit_bytes: int) -> list[Plan]:
    """Return the plans from `by_cost` that fit into the memory of the process or accelerator, fastest first.

    Raises:
        ConfigError: No setting fits; the message gives the smallest need.
    """
    plans = by_cost(plan)
    small = [one for one in plans if needed_bytes(one) <= limit_bytes]
    if not small:
        raise does_not_fit(limit_bytes, min(plans, key=needed_bytes))
    return small


def does_not_fit(limit_bytes: int, smallest: Plan, measured_bytes: int | None = None) -> ConfigError:
    """Return the error for a limit that no setting fits into, with the smallest need, planned or measured."""
    job, memory = smallest.job, smallest.lora.memory
    least = format_bytes(needed_bytes(smallest) if measured_bytes is None else measured_bytes)
    cause = (
        f"planned peak {format_bytes(memory.peak_bytes)} plus {MARGIN:.0%}" if measured_bytes is None else "measured"
    )
    text = (
        f"the run does not fit into {format_bytes(limit_bytes)}: it needs at least {least} ({cause}; weights "
        f"{format_bytes(memory.bytes_of('weights'))}), with {job.batch_rows} × {job.length_tokens:,} tokens per batch "
        f"and --recompute {job.recompute}. Raise --fit, or use a smaller --max-length or model, or --quantization."
    )
    return ConfigError(text, what=format_bytes(limit_bytes), field="fit")


def describe(plan: Plan, limit_bytes: int, measured_bytes: int | None = None) -> str:
    """Return one line with the settings of a plan that fits, and its planned or measured need."""
    job = plan.job
    measured = "" if measured_bytes is None else f", measured {format_bytes(measured_bytes)}"
    return (
        f"fit {format_bytes(limit_bytes)}: --per-device-train-batch-size {job.batch_rows} "
        f"--gradient-accumulation-steps {job.accumulation} --recompute {job.recompute} "
        f"(planned peak {format_bytes(plan.lora.memory.peak_bytes)}{measured})"
    )


def smaller(plans: Sequence[Plan], than: Plan) -> list[Plan]:
    """Return the plans whose steps need less memory than those of a given plan, in the same order."""
    limit = than.lora.memory.step_bytes
    return [plan for plan in plans if plan.lora.memory.step_bytes < limit]
