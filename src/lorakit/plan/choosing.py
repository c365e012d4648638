"""Choose how the processes of a run share the base, given the memory of each GPU, and say why or what would fit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from lorakit.errors import ConfigError, NotYetSupported, UsageError
from lorakit.plan.budget import MARGIN, with_job
from lorakit.plan.estimating import Plan
from lorakit.plan.job import RECOMPUTED
from lorakit.plan.memory import base_of
from lorakit.plan.parallel import DDP, FSDP, HSDP, WAYS, Cluster, RankPlan, rank_plan
from lorakit.tables import format_bytes, format_count

AUTO = "auto"
"""Value of `--parallel` that selects the first of `WAYS` that fits."""

MOST_PROCESSES = 1024
"""Number of processes up to which advice is given."""


@dataclass(frozen=True)
class ParallelPlan:
    """Way in which the processes of a run share the base.

    Attributes:
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


def choose_parallel(
    plan: Plan,
    cluster: Cluster,
    parallel: str = AUTO,
    limit_bytes: int | None = None,
    *,
    obstacle: str | None = None,
    must_fit: bool = True,
) -> ParallelPlan:
    """Choose how the processes of a run share the base.

    Args:
        plan: The plan of one process that is alone, with the batch of one process.
        cluster: The processes.
        parallel: One of `WAYS`, or `AUTO` for the first of them that fits. On one node, HSDP is the same as FSDP.
        limit_bytes: Memory of each GPU in bytes; None if it is unknown, in which case `AUTO` selects DDP.
        obstacle: Clause that says why the base of this run cannot be sharded, or None; a quantized base never can.
        must_fit: Whether it is an error if nothing fits; otherwise, the way that needs the least memory is chosen.

    Raises:
        ConfigError: The way is unknown, or no way fits; the message says what would fit.
        UsageError: One process cannot share the base.
        NotYetSupported: The base cannot be sharded.
    """
    obstacle = "a quantized base cannot be sharded" if _is_quantized(plan) else obstacle
    ways = possible_ways(cluster, parallel, obstacle)
    ranks = tuple(rank_plan(plan, cluster, way) for way in ways)
    wanted = FSDP if parallel == HSDP and HSDP not in ways else parallel
    asked = [rank for rank in ranks if wanted in (AUTO, rank.way)]
    chosen = next((rank for rank in asked if limit_bytes is None or rank.needed_bytes <= limit_bytes), None)
    if chosen is None and must_fit:
        raise _does_not_fit(plan, cluster, parallel, asked[-1], limit_bytes or 0, obstacle)
    chosen = chosen or asked[-1]
    reason = _reason(chosen, asked, parallel, limit_bytes, obstacle)
    tokens = cluster.processes * plan.job.step_tokens
    return ParallelPlan(chosen.way, reason, cluster, limit_bytes, ranks, plan.lora.step_seconds, tokens)


def possible_ways(cluster: Cluster, parallel: str = AUTO, obstacle: str | None = None) -> list[str]:
    """Return the possible ones of `WAYS`, unless `obstacle` says why the base cannot be sharded; checks `parallel`.

    Raises:
        ConfigError: The way is unknown.
        UsageError: One process cannot share the base.
        NotYetSupported: The base cannot be sharded.
    """
    if parallel not in (AUTO, *WAYS):
        raise ConfigError.of("parallel", parallel, allowed=(AUTO, *WAYS))
    is_sharded = parallel in (HSDP, FSDP)
    if is_sharded and cluster.processes == 1:
        text = f"parallel is {parallel!r}, which needs at least 2 processes; pass --nproc, or omit it."
        raise UsageError(text, what=parallel, field="parallel", allowed=(AUTO, DDP))
    if is_sharded and obstacle is not None:
        text = f"parallel is {parallel!r}, but {obstacle}; use --parallel ddp."
        raise NotYetSupported(text, what=parallel, field="parallel", allowed=(AUTO, DDP))
    if cluster.processes == 1 or obstacle is not None:
        return [DDP]
    return [way for way in WAYS if way != HSDP or cluster.nodes > 1]


def _is_quantized(plan: Plan) -> bool:
    return base_of(plan.shape, plan.job) is not None


def _reason(
    chosen: RankPlan, asked: Sequence[RankPlan], parallel: str, limit_bytes: int | None, obstacle: str | None
) -> str:
    """Return why a way was chosen, with the needs of those before it, which do not fit."""
    if limit_bytes is None:
        if parallel == AUTO:
            return f"{chosen.way}: no GPU memory was given, so nothing was compared with it"
        same = "; on one node, hsdp is the same" if chosen.way != parallel else ""
        return f"{chosen.way}: as requested{same}"
    needs = f"needs {format_bytes(chosen.needed_bytes)} of {format_bytes(limit_bytes)} ({MARGIN:.0%} margin)"
    if chosen.needed_bytes > limit_bytes:
        needs += ", which is too much"
    if parallel != AUTO:
        return f"{chosen.way}: as requested, {needs}"
    before = [f"{rank.way} needs {format_bytes(rank.needed_bytes)}" for rank in asked[: asked.index(chosen)]]
    if before:
        return f"{chosen.way}: {needs}, but {' and '.join(before)}"
    fits = "the whole base fits, so only gradients are sent" if chosen.traffic.sent_bytes else "nothing is sent"
    return f"{chosen.way}: {needs}; {obstacle or fits}"


def _does_not_fit(
    plan: Plan, cluster: Cluster, parallel: str, smallest: RankPlan, limit_bytes: int, obstacle: str | None
) -> ConfigError:
    """Return the error for a limit into which no way fits, with what would fit."""
    smaller = _fitting(list(_variants(plan)), cluster, parallel, limit_bytes, obstacle)
    options = [smaller] if smaller else []
    for more in _more(cluster) if obstacle is None else ():
        flags = _fitting([plan] if smaller else list(_variants(plan)), more, parallel, limit_bytes, obstacle)
        if flags is not None:
            options.append(f"--nproc {more.processes} {flags}")
            break
    advice = f"What would fit: {'; or '.join(options)}." if options else "Use a smaller --max-length or model."
    quantization = "" if _is_quantized(plan) else " --quantization nf4 makes the base smaller."
    gpus = format_count(cluster.processes, "GPU")
    text = (
        f"the run does not fit into {format_bytes(limit_bytes)} on each of {gpus}: {smallest.way} needs at least "
        f"{format_bytes(smallest.needed_bytes)} (planned peak {format_bytes(smallest.peak_bytes)} plus {MARGIN:.0%}). "
        f"{advice}{quantization}"
    )
    return ConfigError(text, what=format_bytes(limit_bytes), field="gpu")


def _variants(plan: Plan) -> Iterator[Plan]:
    """Yield plans of the same run with more recomputation and then with smaller batches."""
    rows, ways = plan.job.batch_rows, [way for way in RECOMPUTED if plan.job.accelerated or way != "feed-forward"]
    while rows:
        yield from (with_job(plan, batch_rows=rows, recompute=recompute) for recompute in ways)
        rows //= 2


def _fitting(
    plans: Sequence[Plan], cluster: Cluster, parallel: str, limit_bytes: int, obstacle: str | None
) -> str | None:
    """Return the flags of the first plan that fits in one of the ways that `parallel` allows, or None."""
    ways = [way for way in possible_ways(cluster, parallel, obstacle) if parallel in (AUTO, way)] or [FSDP]
    for plan in plans:
        for way in ways:
            rank = rank_plan(plan, cluster, way)
            if rank.needed_bytes <= limit_bytes:
                flags = f"--per-device-train-batch-size {plan.job.batch_rows} --recompute {plan.job.recompute}"
                return f"--parallel {way} {flags} ({format_bytes(rank.needed_bytes)})"
    return None


def _more(cluster: Cluster) -> Iterator[Cluster]:
    """Yield clusters of twice, four times, ... as many processes."""
    count = cluster.processes
    while (count := 2 * count) <= MOST_PROCESSES:
        per_node = cluster.per_node if count <= cluster.per_node else cluster.local
        yield replace(cluster, processes=count, per_node=per_node)
