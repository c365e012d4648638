"""Memory and communication of each process of a run, if the base is replicated or sharded.

Under DDP, each process has the whole base. Under FSDP2 (`fully_shard`), the frozen base is sharded in its storage dtype
over all processes, and one block after the other is gathered; HSDP does this within each node. In each way, the adapter
with its gradients and optimizer state is whole in every process, and gradients are summed once per step, during the
last backward pass. `docs/distributed-arithmetic.md` has the formulas with examples; `choosing` selects one of the ways.

Sources:
    Li et al. 2020, arXiv:2006.15704 (DDP); Zhao et al. 2023, arXiv:2304.11277 (FSDP, hybrid sharding).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from lorakit.architectures.shapes import ModelShape, SiteShape, block_of
from lorakit.plan.estimating import Plan
from lorakit.plan.fitting import MARGIN
from lorakit.plan.memory import OPTIMIZING, Memory
from lorakit.plan.network import BUCKET_BYTES, Cluster, Traffic, all_gather_bytes, all_reduce_bytes
from lorakit.plan.process import WRITING
from lorakit.targets.layer_types import LINEAR

DDP, HSDP, FSDP = "ddp", "hsdp", "fsdp"

WAYS = (DDP, HSDP, FSDP)
"""Ways to share a base, ordered from the least communication to the least memory."""

SUMMING = "the gradients are summed"
"""Moment at the end of the last backward pass, at which a bucket of gradients and its buffer exist."""

GATHERING = "the embeddings and the head are gathered"
"""Moment at the beginning of a forward pass, at which they exist twice: as received, and as separate tensors."""

IN_FLIGHT = 2
"""Blocks that are gathered at once: the one that is computed, and the next one."""


def tensors_of_base(shape: ModelShape) -> Iterator[tuple[str | None, int, int]]:
    """Yield the tensors of a base as (block or None, rows, elements per row); rows are what FSDP2 divides.

    The tensors of a norm are known only by their size, so each element counts as a row.
    """
    for site in shape.sites:
        if site.tied_to is None:
            yield block_of(site.path), *_stored(site)
        if site.bias:
            yield block_of(site.path), site.out_features, 1
    for other in shape.others:
        known = 0
        for _, (rows, *rest) in other.matrices:
            columns = 1
            for size in rest:
                columns *= size
            known += rows * columns
            yield block_of(other.path), rows, columns
        yield block_of(other.path), other.parameters - known, 1


def _stored(site: SiteShape) -> tuple[int, int]:
    """Return the rows and columns of a stored weight; only a Linear is stored as (out, in)."""
    sizes = site.out_features, site.in_features
    return sizes if site.kind == LINEAR else sizes[::-1]


def parts_of_base(shape: ModelShape, itemsize: int, processes: int) -> dict[str | None, int]:
    """Return the bytes that a process holds of each unit that is gathered at once: block, or None for the others.

    The parts of all processes are padded to the same number of rows.
    """
    found: dict[str | None, int] = {None: 0}
    for block, rows, columns in tensors_of_base(shape):
        found[block] = found.get(block, 0) + itemsize * -(-rows // processes) * columns
    return found


@dataclass(frozen=True)
class RankPlan:
    """Memory and communication of one process of a run.

    Attributes:
        way: One of `WAYS`.
        held: Category -> bytes when the total peaks; those of `memory.Line`, blocks "gathered" from all processes, and
            the "buffer" in which gradients are summed.
        base_bytes: Size of the process's part of the base, without gathered blocks.
        peak_bytes: Largest total at any moment.
        traffic: What the process sends during a step.
    """

    way: str
    held: Mapping[str, int]
    base_bytes: int
    peak_bytes: int
    peak_moment: str
    traffic: Traffic

    @property
    def needed_bytes(self) -> int:
        """Return the memory limit that the process needs in bytes: its peak plus `fitting.MARGIN`."""
        return round((1 + MARGIN) * self.peak_bytes)

    def as_dict(self) -> dict[str, Any]:
        """Return the plan as JSON values."""
        sent = {**asdict(self.traffic), "sent_bytes": self.traffic.sent_bytes}
        return {**asdict(self), "traffic": sent, "needed_bytes": self.needed_bytes}


def rank_plan(plan: Plan, cluster: Cluster, way: str) -> RankPlan:
    """Return what each process holds and sends in one of `WAYS`, given the plan of one process that is alone."""
    memory, itemsize = plan.lora.memory, plan.job.dtype_bytes
    group = {DDP: 1, HSDP: cluster.local, FSDP: cluster.processes}[way]
    parts = parts_of_base(plan.shape, itemsize, group)
    base = memory.bytes_of("weights")
    if group > 1:
        base = sum(parts.values()) + itemsize * plan.counted.biases  # trained biases are not sharded
    buffer = _bucket_bytes(plan) if cluster.processes > 1 else 0
    moments = _moments(memory, parts, group, base, buffer)
    totals = {moment: sum(sizes.values()) for moment, sizes in moments.items()}
    peak = max(totals, key=totals.__getitem__)
    return RankPlan(way, moments[peak], base, totals[peak], peak, _traffic(plan, cluster, way, parts, group))


def _moments(
    memory: Memory, parts: Mapping[str | None, int], group: int, base: int, buffer: int
) -> dict[str, dict[str, int]]:
    """Return the size of each category at each moment; a sharded base is whole until the first step.

    Args:
        memory: Memory of a process that is alone.
        parts: Result of `parts_of_base`.
        group: Number of processes over which the base is sharded.
        base: Size of a process's part of the base in bytes.
        buffer: Size of the largest bucket of gradients that are summed together, in bytes.
    """
    root, blocks = parts[None], sorted(_blocks(parts))
    in_flight = group * (root + sum(blocks[-IN_FLIGHT:]))
    moments = {moment: {**memory.sizes_at(moment), "gathered": 0, "buffer": 0} for moment in memory.moments}
    if group > 1:
        for moment in (*memory.moments_of_step, WRITING):
            if moment in moments:
                gathered = 0 if moment in (OPTIMIZING, WRITING) else in_flight
                moments[moment] |= {"weights": base, "gathered": gathered}
        moments[GATHERING] = moments[OPTIMIZING] | {"gathered": 2 * group * root}
    moments[SUMMING] = moments[OPTIMIZING] | {"buffer": buffer}
    return moments


def _blocks(parts: Mapping[str | None, int]) -> list[int]:
    return [part for block, part in parts.items() if block is not None]


def _bucket_bytes(plan: Plan) -> int:
    """Return the size of the largest bucket of gradients, which is closed when it reaches `BUCKET_BYTES`."""
    counted = plan.counted
    largest = max([plan.job.dtype_bytes * count for count in counted.saved.values()], default=0)
    return min(plan.lora.memory.bytes_of("gradients"), BUCKET_BYTES + largest)


def _traffic(plan: Plan, cluster: Cluster, way: str, parts: Mapping[str | None, int], group: int) -> Traffic:
    """Return what a process sends; a block is gathered for the forward and for the backward pass, the rest once."""
    root, blocks = parts[None], _blocks(parts)
    batches, costs, count = plan.job.accumulation, plan.lora.flops, cluster.processes
    gathered = batches * all_gather_bytes(root + 2 * sum(blocks), group)
    first = batches * all_gather_bytes(root + sum(blocks[:1]), group)
    reduced = all_reduce_bytes(plan.lora.memory.bytes_of("gradients"), count)
    last = all_reduce_bytes(_bucket_bytes(plan), count)
    rate = cluster.link.bytes_per_second if way == HSDP else cluster.rate
    return Traffic(
        gathered_bytes=gathered,
        reduced_bytes=reduced,
        gather_seconds=gathered / rate,
        first_seconds=first / rate,
        reduce_seconds=reduced / cluster.rate,
        last_seconds=last / cluster.rate,
        backward=(costs.backward + costs.recomputed) / costs.total / batches,
    )
