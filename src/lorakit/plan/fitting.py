"""Fit a run into a memory limit: choose the rows per batch, the batches per step and what is recomputed.

The number of rows per optimizer step stays the same, so the result of the run does not change.
`lorakit.train.setup.fitting` checks the choice with a measurement.
"""

from __future__ import annotations

from collections.abc import Sequence

from lorakit.errors import ConfigError
from lorakit.plan.budget import with_job
from lorakit.plan.estimating import Plan
from lorakit.plan.job import RECOMPUTED
from lorakit.tables import format_bytes

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
    made = [with_job(plan, batch_rows=size, accumulation=rows // size, recompute=way) for size in sizes for way in ways]
    return sorted(made, key=_cost)


def _cost(plan: Plan) -> tuple[float, int]:
    """Return the relative time per token, and the peak in bytes for settings that take the same time."""
    tokens = plan.job.batch_rows * (plan.job.mean_tokens or plan.job.length_tokens)
    return plan.lora.flops.total * (1 + FIXED_TOKENS / tokens), plan.lora.memory.peak_bytes


def fitting(plan: Plan, limit_bytes: int) -> list[Plan]:
    """Return the plans from `by_cost` that fit into the memory of the process or accelerator, fastest first.

    Raises:
        ConfigError: No setting fits; the message gives the smallest need.
    """
    made = by_cost(plan)
    found = [one for one in made if needed_bytes(one) <= limit_bytes]
    if not found:
        raise does_not_fit(limit_bytes, min(made, key=needed_bytes))
    return found


def does_not_fit(limit_bytes: int, smallest: Plan, measured_bytes: int | None = None) -> ConfigError:
    """Return the error for a limit that no setting fits into, with the smallest need, planned or measured."""
    job, memory = smallest.job, smallest.lora.memory
    least = format_bytes(needed_bytes(smallest) if measured_bytes is None else measured_bytes)
    found = (
        f"planned peak {format_bytes(memory.peak_bytes)} plus {MARGIN:.0%}" if measured_bytes is None else "measured"
    )
    return ConfigError(
        f"the run does not fit into {format_bytes(limit_bytes)}: it needs at least {least} ({found}; weights "
        f"{format_bytes(memory.bytes_of('weights'))}), with {job.batch_rows} × {job.length_tokens:,} tokens per batch "
        f"and --recompute {job.recompute}. Raise --fit, or use a smaller --max-length or model, or --quantization.",
        what=format_bytes(limit_bytes),
        field="fit",
    )


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
