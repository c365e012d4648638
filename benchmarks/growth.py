"""Growth of a cost: the slope of a line through logarithms, and the estimates of `lorakit.plan` for the same points.

FLOPs and bytes are for SmolLM2-135M's published shape with all or fewer of its layers. Nothing here measures or imports
torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from lorakit.architectures.shapes import replicated
from lorakit.config import LoraConfig
from lorakit.plan import Job, ModelShape, Plan, catalogue, estimate
from lorakit.plan.memory import RUNTIME_BYTES

MODEL = "SmolLM2-135M"


class Work(NamedTuple):
    """Estimated work of one point.

    Attributes:
        flops: Per step, or per token of all rows; a multiply-add counts as two.
        memory_bytes: Peak above base and adapters.
        read_bytes: Weights and factors that a decoded token reads; 0 for a training step.
    """

    flops: float
    memory_bytes: int
    read_bytes: int = 0


def slope(points: Sequence[float], values: Sequence[float]) -> float:
    """Return the least-squares slope of log(value) over log(point): p if a value grows as its point to the power p.

    Args:
        points: At least two different ones, above 0.
        values: One for each, above 0.

    Raises:
        ValueError: The points or values are not like that.
    """
    pairs = list(zip(points, values, strict=True))
    if len(set(points)) < 2 or any(not number > 0 for pair in pairs for number in pair):
        raise ValueError(f"a slope needs two different points and values above 0; got {pairs}")
    x, y = ([math.log(number) for number in numbers] for numbers in (points, values))
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    together = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return together / sum((a - mean_x) ** 2 for a in x)


def of_step(fields: Mapping[str, Any], job: Job, layers: int | None = None) -> Work:
    """Estimate the work of a training step. [docs/math.md (20)-(35)]

    Args:
        fields: Fields of the adapter's config.
        job: Rows, length, dtype, whether it is accelerated.
        layers: Fewer layers than the model has.
    """
    plan = _plan(fields, job, layers)
    return Work(plan.lora.flops.total * job.step_tokens, plan.lora.memory.above_weights_bytes)


def of_decoding(fields: Mapping[str, Any], job: Job, adapters: int, layers: int | None = None) -> Work:
    """Estimate the work of one token of all rows, to which some adapters are assigned. [docs/math.md (13), (20), (32)]

    Each row uses the factors of one adapter, so the FLOPs are those of one. The factors of all of them are held in the
    base's dtype, and read for each token like the base.

    Args:
        fields: Fields of each adapter's config.
        job: Rows, one token each, dtype.
        adapters: Number of adapters, each with some row.
        layers: Fewer layers than the model has.
    """
    plan = _plan(fields, job, layers)
    stacks = adapters * plan.counted.factors * job.dtype_bytes
    read = plan.lora.memory.bytes_of("weights") + stacks
    return Work(plan.lora.flops.forward * job.step_tokens, RUNTIME_BYTES + stacks, read)


def shape_of(layers: int | None = None) -> ModelShape:
    """Return the published shape, limited to its first layers if a number is given."""
    shape = catalogue.published(MODEL)
    if shape is None:
        raise SystemExit(f"{MODEL} is not in the catalogue")
    if layers is None:
        return shape
    fewer = replicated(shape, [(0, layers)])
    return replace(fewer, parameters=sum(part.parameters for part in (*fewer.sites, *fewer.others)))


def _plan(fields: Mapping[str, Any], job: Job, layers: int | None) -> Plan:
    return estimate(shape_of(layers), LoraConfig(**fields), job)
