"""A memory budget: how it is written, and which way of computing a step is the cheapest that fits it.

What the backward computes again is chosen, in the order of its price; batch, length and everything that changes the
result stay as they are. Knows nothing about machines.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from lorakit.errors import ConfigError
from lorakit.plan.estimating import Plan, estimate
from lorakit.plan.job import RECOMPUTED
from lorakit.tables import format_bytes

UNITS = {"B": 1, **{f"{letter}B": 1000**n for n, letter in enumerate(("k", "M", "G", "T"), 1)}}
"""Decimal units; those with an i, such as GiB, are powers of 1024."""

BINARY_UNITS = {f"{letter}iB": 1024**n for n, letter in enumerate(("K", "M", "G", "T"), 1)}


SIZE_FORM = "write a number and a unit, such as 4GiB or 800MB"
"""How a size is written, for messages."""


def bytes_of(text: str) -> int:
    """Bytes from a number with a unit, such as "4GiB", "1.5 GB" or "800MB"; a bare number is bytes.

    Args:
        text: The number and its unit, in any case.

    Raises:
        ConfigError: It is no such text, or not above 0.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    units = {name.lower(): size for name, size in {**UNITS, **BINARY_UNITS, "": 1}.items()}
    size = units.get(found[2].lower()) if found else None
    if found is None or size is None or not float(found[1]) * size >= 1:
        raise ConfigError(f"{text!r} is no size; {SIZE_FORM}.", what=text)
    return int(float(found[1]) * size)


@dataclass(frozen=True)
class Fitting:
    """A plan within a budget.

    Attributes:
        plan: The plan.
        said: What was chosen, and why.
    """

    plan: Plan
    said: str


def within(plan: Plan, budget_bytes: int) -> Fitting:
    """The plan of the cheapest way of computing that fits a budget.

    Args:
        plan: The plan of a job, whatever it computes again.
        budget_bytes: What a step may take, weights and all.

    Returns:
        The plan of the same job with that way, and the reason.

    Raises:
        ConfigError: No way fits; the message says what would.
    """
    tried: list[tuple[str, int]] = []
    for way in RECOMPUTED:
        made = _with(plan, recompute=way)
        peak = made.lora.memory.peak_bytes
        if peak <= budget_bytes:
            return Fitting(made, _said(budget_bytes, way, peak, tried))
        tried.append((way, peak))
    way, least = min(tried, key=lambda pair: pair[1])
    raise ConfigError(
        f"No way of computing fits a memory budget of {format_bytes(budget_bytes)}: the least is "
        f"{format_bytes(least)}, with --recompute {way}. {_what_would(plan, budget_bytes)}"
    )


def _with(plan: Plan, **fields: Any) -> Plan:
    made = estimate(plan.shape, plan.config, replace(plan.job, **fields), plan.speed, allow_partial=True)
    return replace(made, ranks=plan.ranks)


def _said(budget: int, way: str, peak: int, tried: list[tuple[str, int]]) -> str:
    without = "".join(f"; --recompute {other} takes {format_bytes(size)}" for other, size in reversed(tried))
    return (
        f"memory budget {format_bytes(budget)}: --recompute {way} is the cheapest that fits, "
        f"{format_bytes(peak)}{without}"
    )


def _what_would(plan: Plan, budget: int) -> str:
    """The largest batch that would fit, or that none does."""
    rows, most = plan.job.batch_rows, RECOMPUTED[-1]
    while rows > 1:
        rows //= 2
        peak = _with(plan, batch_rows=rows, recompute=most).lora.memory.peak_bytes
        if peak <= budget:
            return (
                f"Batches of {rows} would fit with --recompute {most}, {format_bytes(peak)}; with more "
                "--gradient-accumulation-steps the result is the same."
            )
    needs = _with(plan, batch_rows=1, recompute=most).lora.memory
    return (
        f"Batches of 1 need {format_bytes(needs.peak_bytes)}, of which weights "
        f"{format_bytes(needs.bytes_of('weights'))}: take a smaller --max-length or model, or --quantization."
    )
