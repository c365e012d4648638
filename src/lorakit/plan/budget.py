"""Memory budgets: parse sizes, and find the cheapest recomputation setting that fits within a budget.

The batch size, the row length and everything else that affects the result stay fixed.
"""

from __future__ import annotations

import re
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
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    size = UNITS.get(found[2].lower()) if found else None
    if found is None or size is None or not float(found[1]) * size >= 1:
        named = "" if field is None else f"{field}: "
        raise ConfigError(f"{named}{text!r} is not a size; {SIZE_FORM}.", what=text, field=field)
    return int(float(found[1]) * size)


def within(plan: Plan, budget_bytes: int) -> tuple[Plan, str]:
    """Return the plan with the cheapest recomputation whose planned peak fits, and a message with the reason.

    Raises:
        ConfigError: No setting fits; the message suggests changes.
    """
    tried: list[tuple[str, int]] = []
    for recompute in RECOMPUTED:
        made = with_job(plan, recompute=recompute)
        peak = made.lora.memory.peak_bytes
        if peak <= budget_bytes:
            without = "".join(f"; --recompute {other} needs {format_bytes(size)}" for other, size in reversed(tried))
            reason = f"--recompute {recompute} is the cheapest setting that fits ({format_bytes(peak)}){without}"
            return made, f"memory budget {format_bytes(budget_bytes)}: {reason}"
        tried.append((recompute, peak))
    recompute, least = min(tried, key=lambda pair: pair[1])
    raise ConfigError(
        f"the job does not fit in a memory budget of {format_bytes(budget_bytes)}: it needs at least "
        f"{format_bytes(least)}, with --recompute {recompute}. {_what_would(plan, budget_bytes)}",
        what=format_bytes(budget_bytes),
        field="memory_budget",
    )


def with_job(plan: Plan, **fields: float | str | None) -> Plan:
    """Return the plan of the same run with other values of some fields of its job."""
    made = estimate(plan.shape, plan.config, replace(plan.job, **fields), plan.speed, allow_partial=True)  # type: ignore[arg-type]
    return replace(made, ranks=plan.ranks)


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
