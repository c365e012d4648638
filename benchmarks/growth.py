"""How a cost grows: the slope of a line through logarithms, and what the plan's arithmetic says of the same points.

FLOPs and bytes are those of `lorakit.plan`, for SmolLM2-135M's published shape with all or fewer of its layers. Nothing
here measures, and nothing loads torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from lorakit.config import LoraConfig
from lorakit.plan import Job, ModelShape, Plan, catalogue, estimate
from lorakit.plan.memory import RUNTIME_BYTES
from lorakit.plan.stacking import stacked

MODEL = "SmolLM2-135M"


class Work(NamedTuple):
    """What the arithmetic says of one point.

    Attributes:
        flops: Of a step, or of a token of all rows; a multiply-add counts as two.
        memory_bytes: Of the peak above base and adapters.
        read_bytes: Of weights and factors that a decoded token reads; 0 for a training step.
    """

    flops: float
    memory_bytes: int
    read_bytes: int = 0


def slope(points: Sequence[float], values: Sequence[float]) -> float:
    """The least-squares slope of log(value) over log(point): p where a value grows as its point to the power p.

    Args:
        points: At least two different ones, above 0.
        values: One for each, above 0.

    Raises:
        ValueError: They are not like that.
    """
    pairs = list(zip(points, values, strict=True))
    if len(set(points)) < 2 or any(not number > 0 for pair in pairs for number in pair):
        raise ValueError(f"a slope needs two different points, and numbers above 0 alone; these are {pairs}")
    x, y = ([math.log(number) for number in numbers] for numbers in (points, values))
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    together = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return together / sum((a - mean_x) ** 2 for a in x)


def of_step(fields: Mapping[str, Any], job: Job, layers: int | None = None) -> Work:
    """The arithmetic of a training step.   [docs/math.md (20)-(35)]

    Args:
        fields: Of the adapter's config.
        job: Rows, length, dtype, whether it is accelerated.
        layers: Fewer than the model has.
    """
    plan = _plan(fields, job, layers)
    return Work(plan.lora.flops.total * job.step_tokens, plan.lora.memory.above_weights_bytes)


def of_decoding(fields: Mapping[str, Any], job: Job, adapters: int, layers: int | None = None) -> Work:
    """The arithmetic of one token of all rows, which some adapters are dealt over.   [docs/math.md (13), (20), (32)]

    Each row meets the factors of its own adapter, so the FLOPs are those of one. The factors of all of them are kept in
    the base's dtype beside what any process needs, and read for each token as the base is.

    Args:
        fields: Of each adapter's config.
        job: Rows, a token of each, dtype.
        adapters: How many, each with some row.
        layers: Fewer than the model has.
    """
    plan = _plan(fields, job, layers)
    stacks = adapters * plan.counted.factors * job.dtype_bytes
    read = plan.lora.memory.bytes_of("weights") + stacks
    return Work(plan.lora.flops.forward * job.step_tokens, RUNTIME_BYTES + stacks, read)


def shape_of(layers: int | None = None) -> ModelShape:
    """The published shape, with its first layers alone where a number is given."""
    shape = catalogue.published(MODEL)
    if shape is None:
        raise SystemExit(f"{MODEL} is not in the catalogue")
    if layers is None:
        return shape
    fewer = stacked(shape, LoraConfig(layer_replication=[(0, layers)]))
    return replace(fewer, parameters=fewer.counted_parameters)


def _plan(fields: Mapping[str, Any], job: Job, layers: int | None) -> Plan:
    return estimate(shape_of(layers), LoraConfig(**fields), job)
