"""What each process of a run holds and sends if the base is replicated or sharded, and which of these ways fits.

Under DDP, each process has the whole base. Under FSDP2 (`fully_shard`), the frozen base is sharded in its storage dtype
over all processes, and one block after the other is gathered; HSDP does this within each node. In each way, the adapter
with its gradients and optimizer state is whole in every process, and gradients are summed once per step. This module
does not depend on the machine; `docs/distributed-arithmetic.md` has the formulas with examples.

Sources:
    Li et al. 2020, arXiv:2006.15704 (DDP); Zhao et al. 2023, arXiv:2304.11277 (FSDP, hybrid sharding).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from lorakit.architectures.shapes import ModelShape, SiteShape, block_of
from lorakit.errors import ConfigError, UsageError
from lorakit.plan.budget import with_job
from lorakit.plan.estimating import Plan
from lorakit.plan.fitting import MARGIN
from lorakit.plan.job import RECOMPUTED
from lorakit.plan.memory import OPTIMIZING, Memory
from lorakit.plan.network import Cluster, Traffic, all_gather_bytes, all_reduce_bytes
from lorakit.plan.packed import stored_base
from lorakit.plan.process import WRITING
from lorakit.tables import format_bytes, format_count
from lorakit.targets.layer_types import LINEAR

AUTO, DDP, HSDP, FSDP = "auto", "ddp", "hsdp", "fsdp"

WAYS = (DDP, HSDP, FSDP)
"""How the processes can share a base, from the least communication to the least memory; `AUTO` selects one of them."""

SUMMING = "the gradients are summed"
"""Moment between the last backward pass and the optimizer step, at which the flat buffer exists."""

GATHERING = "the embeddings and the head are gathered"
"""Moment at the beginning of a forward pass, at which they exist twice: as received, and as separate tensors."""

IN_FLIGHT = 2
"""Blocks that are gathered at once: the one that is computed, and the next one."""

MOST_PROCESSES = 1024
"""Number of processes up to which advice is given."""


def tensors_of_base(shape: ModelShape) -> Iterator[tuple[str | None, int, int]]:
    """Yield the tensors of a base as (block or None, rows, elements per row); rows are what FSDP2 divides.

    The tensors of a norm are known only by their size, so each element counts as a row.

    Args:
        shape: Shape of the base.
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
    """Return the rows and columns of a weight as it is stored; only a Linear is stored as (out, in)."""
    sizes = site.out_features, site.in_features
    return sizes if site.kind == LINEAR else sizes[::-1]


def parts_of_base(shape: ModelShape, itemsize: int, processes: int) -> dict[str | None, int]:
    """Return the bytes that a process holds of each unit that is gathered at once: block, or None for the others.

    Args:
        shape: Shape of the base.
        itemsize: Bytes per element.
        processes: Number of processes over which the base is sharded; parts are padded to the same number of rows.
    """
    found: dict[str | None, int] = {None: 0}
    for block, rows, columns in tensors_of_base(shape):
        found[block] = found.get(block, 0) + itemsize * -(-rows // processes) * columns
    return found


@dataclass(frozen=True)
class RankPlan:
    """What one process of a run holds and sends.

    Attributes:
        way: One of `WAYS`.
        held: Category of memory -> size in bytes when the total peaks. There are two more than in `memory.Line`: blocks
            "gathered" from all processes, and the "buffer" in which gradients are summed.
        base_bytes: Size of the process's part of the base, without gathered blocks, in bytes.
        peak_bytes: Largest total at any moment, in bytes.
        peak_moment: That moment.
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
    """Return what each process of a run holds and sends.

    Args:
        plan: The plan of one process that is alone, with the batch of one process.
        cluster: The processes.
        way: One of `WAYS`.
    """
    memory, itemsize = plan.lora.memory, plan.job.dtype_bytes
    group = {DDP: 1, HSDP: cluster.local, FSDP: cluster.processes}[way]
    parts = parts_of_base(plan.shape, itemsize, group)
    base = memory.bytes_of("weights")
    if group > 1:
        base = sum(parts.values()) + itemsize * plan.counted.biases  # trained biases are not sharded
    buffer = memory.bytes_of("gradients") if cluster.processes > 1 else 0
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
        buffer: Size of the buffer in which gradients are summed, in bytes.
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


def _traffic(plan: Plan, cluster: Cluster, way: str, parts: Mapping[str | None, int], group: int) -> Traffic:
    """Return what a process sends; a block is gathered for the forward and for the backward pass, the rest once."""
    root, blocks = parts[None], _blocks(parts)
    batches = plan.job.accumulation
    gathered = batches * all_gather_bytes(root + 2 * sum(blocks), group)
    before = batches * all_gather_bytes(root + sum(blocks[:1]), group)
    reduced = all_reduce_bytes(plan.lora.memory.bytes_of("gradients"), cluster.processes)
    rate = cluster.link.bytes_per_second if way == HSDP else cluster.rate
    return Traffic(gathered, reduced, gathered / rate, before / rate, reduced / cluster.rate)


@dataclass(frozen=True)
class ParallelPlan:
    """How the processes of a run share the base.

    Attributes:
        way: The chosen one of `WAYS`.
        reason: Message that says why it was chosen.
        cluster: The processes.
        limit_bytes: Memory of each GPU in bytes, or None if it is unknown.
        ranks: Plan of a process for each way that is possible; all processes hold and send the same.
        step_seconds: Time in which a process that is alone takes its part of a step, or None if no speed is known.
        step_tokens: Number of tokens of a step in all processes.
    """

    way: str
    reason: str
    cluster: Cluster
    limit_bytes: int | None
    ranks: tuple[RankPlan, ...]
    step_seconds: float | None
    step_tokens: int

    @property
    def chosen(self) -> RankPlan:
        """Return the plan of a process in the chosen way."""
        return next(rank for rank in self.ranks if rank.way == self.way)

    def fits(self, rank: RankPlan) -> bool | None:
        """Return whether a process fits into its GPU, or None if the size of its memory is unknown."""
        return None if self.limit_bytes is None else rank.needed_bytes <= self.limit_bytes

    def scaling(self, rank: RankPlan) -> float | None:
        """Return the expected speed of each process relative to one that is alone, or None if no speed is known."""
        return None if self.step_seconds is None else rank.traffic.scaling(self.step_seconds)

    def tokens_per_second(self, rank: RankPlan) -> float | None:
        """Return the expected speed of all processes together, or None if no speed is known."""
        scaling = self.scaling(rank)
        return None if scaling is None or self.step_seconds is None else scaling * self.step_tokens / self.step_seconds

    def as_dict(self) -> dict[str, Any]:
        """Return the plan as JSON values."""
        return {
            "parallel": self.way,
            "reason": self.reason,
            **asdict(self.cluster),
            "nodes": self.cluster.nodes,
            "limit_bytes": self.limit_bytes,
            "step_seconds": self.step_seconds,
            "step_tokens": self.step_tokens,
            "ranks": [
                {
                    **rank.as_dict(),
                    "fits": self.fits(rank),
                    "expected_scaling": self.scaling(rank),
                    "expected_tokens_per_second": self.tokens_per_second(rank),
                }
                for rank in self.ranks
            ],
        }


def choose_parallel(plan: Plan, cluster: Cluster, parallel: str = AUTO, limit_bytes: int | None = None) -> ParallelPlan:
    """Choose how the processes of a run share the base.

    Args:
        plan: The plan of one process that is alone, with the batch of one process.
        cluster: The processes.
        parallel: One of `WAYS`, or `AUTO` for the first of them that fits.
        limit_bytes: Memory of each GPU in bytes; None if it is unknown, in which case `AUTO` selects DDP.

    Raises:
        ConfigError: The way is unknown or not possible, or no way fits; the message says what would fit.
    """
    ways = _possible(plan, cluster, parallel)
    ranks = tuple(rank_plan(plan, cluster, way) for way in ways)
    asked = [rank for rank in ranks if parallel in (AUTO, rank.way)]
    chosen = next((rank for rank in asked if limit_bytes is None or rank.needed_bytes <= limit_bytes), None)
    if chosen is None:
        raise _does_not_fit(plan, cluster, parallel, asked[-1], limit_bytes or 0)
    reason = _reason(chosen, ranks, cluster, parallel, limit_bytes)
    tokens = cluster.processes * plan.job.step_tokens
    return ParallelPlan(chosen.way, reason, cluster, limit_bytes, ranks, plan.lora.step_seconds, tokens)


def _possible(plan: Plan, cluster: Cluster, parallel: str) -> list[str]:
    """Return the ways that are possible for these processes and this base, in the order of `WAYS`."""
    if parallel not in (AUTO, *WAYS):
        raise ConfigError.of("parallel", parallel, allowed=(AUTO, *WAYS))
    needs = {HSDP: (cluster.nodes, "nodes"), FSDP: (cluster.processes, "processes")}
    count, things = needs.get(parallel, (2, ""))
    if count < 2:
        raise UsageError(
            f"parallel is {parallel!r}, which needs at least 2 {things}; this run has 1 "
            f"({format_count(cluster.processes, 'process', 'processes')}, {cluster.per_node} GPUs per node).",
            what=parallel,
            field="parallel",
        )
    if _is_quantized(plan):
        if parallel in needs:
            raise ConfigError(
                f"parallel is {parallel!r}, but a quantized base cannot be sharded; use ddp, or omit --quantization.",
                what=parallel,
                field="parallel",
                allowed=(AUTO, DDP),
            )
        return [DDP]
    return [way for way in WAYS if needs.get(way, (2, ""))[0] > 1]


def _is_quantized(plan: Plan) -> bool:
    job = plan.job
    return stored_base(plan.shape, job.quantization, job.dtype_bytes, job.double_quantization) is not None


def _reason(
    chosen: RankPlan, ranks: tuple[RankPlan, ...], cluster: Cluster, parallel: str, limit_bytes: int | None
) -> str:
    """Return why a way was chosen, with the needs of those that do not fit."""
    if limit_bytes is None:
        why = "as requested" if parallel != AUTO else "no GPU memory was given, so nothing was compared with it"
        return f"{chosen.way}: {why}"
    why = f"needs {format_bytes(chosen.needed_bytes)} of {format_bytes(limit_bytes)} ({MARGIN:.0%} margin)"
    if parallel != AUTO:
        return f"{chosen.way}: as requested, {why}"
    before = [f"{rank.way} needs {format_bytes(rank.needed_bytes)}" for rank in ranks[: ranks.index(chosen)]]
    if before:
        return f"{chosen.way}: {why}, but {' and '.join(before)}"
    return f"{chosen.way}: {why}; the whole base fits, so only gradients are sent"


def _does_not_fit(plan: Plan, cluster: Cluster, parallel: str, smallest: RankPlan, limit_bytes: int) -> ConfigError:
    """Return the error for a limit into which no way fits, with what would fit."""
    smaller = _fitting(list(_variants(plan)), cluster, parallel, limit_bytes)
    options = [smaller] if smaller else []
    for more in _more(plan, cluster):
        found = _fitting([plan] if smaller else list(_variants(plan)), more, parallel, limit_bytes)
        if found is not None:
            options.append(f"--nproc {more.processes} {found}")
            break
    advice = f"What would fit: {'; or '.join(options)}." if options else "Use a smaller --max-length or model."
    quantization = "" if _is_quantized(plan) else " --quantization nf4 makes the base smaller."
    gpus = format_count(cluster.processes, "GPU")
    return ConfigError(
        f"the run does not fit into {format_bytes(limit_bytes)} on each of {gpus}: {smallest.way} needs at least "
        f"{format_bytes(smallest.needed_bytes)} (planned peak {format_bytes(smallest.peak_bytes)} plus {MARGIN:.0%}). "
        f"{advice}{quantization}",
        what=format_bytes(limit_bytes),
        field="gpu",
    )


def _variants(plan: Plan) -> Iterator[Plan]:
    """Yield plans of the same run with more recomputation and then with smaller batches."""
    rows, ways = plan.job.batch_rows, [way for way in RECOMPUTED if plan.job.accelerated or way != "feed-forward"]
    while rows:
        yield from (with_job(plan, batch_rows=rows, recompute=recompute) for recompute in ways)
        rows //= 2


def _fitting(plans: Sequence[Plan], cluster: Cluster, parallel: str, limit_bytes: int) -> str | None:
    """Return the flags of the first plan that fits in one of the ways that `parallel` allows, or None."""
    for plan in plans:
        for way in _possible(plan, cluster, parallel):
            rank = rank_plan(plan, cluster, way)
            if parallel in (AUTO, way) and rank.needed_bytes <= limit_bytes:
                flags = f"--per-device-train-batch-size {plan.job.batch_rows} --recompute {plan.job.recompute}"
                return f"--parallel {way} {flags} ({format_bytes(rank.needed_bytes)})"
    return None


def _more(plan: Plan, cluster: Cluster) -> Iterator[Cluster]:
    """Yield clusters of more processes, over which a base that is not quantized can be sharded."""
    count = cluster.processes
    while not _is_quantized(plan) and (count := 2 * count) <= MOST_PROCESSES:
        per_node = cluster.per_node if count <= cluster.per_node else cluster.local
        yield replace(cluster, processes=count, per_node=per_node)
