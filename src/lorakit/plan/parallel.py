"""Memory and communication of each process of a run, if the base is replicated or sharded.

Under DDP, each process has the whole base. Under FSDP2 (`fully_shard`), the frozen base is sharded in its storage dtype
over all processes, and one block after the other is gathered; HSDP does this within each node. In each way, the adapter
with its gradients and optimizer state is whole in every process, and gradients are summed once per step, during the
last backward pass. Collectives are planned as rings, in which every process sends and receives the same number of
bytes, and links at their nominal rate; latency is not included. `docs/distributed-arithmetic.md` has the formulas with
examples; `choosing` selects one of the ways.

Sources:
    Li et al. 2020, arXiv:2006.15704 (DDP); Zhao et al. 2023, arXiv:2304.11277 (FSDP, hybrid sharding, all-gathers that
        overlap with computation); Patarasuk and Yuan 2009, Bandwidth Optimal All-reduce Algorithms for Clusters of
        Workstations, J. Parallel Distrib. Comput. 69(2) (rings).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from lorakit.architectures.layouts import block_of
from lorakit.architectures.shapes import ModelShape, SiteShape
from lorakit.choices import LINEAR
from lorakit.errors import ConfigError
from lorakit.plan.budget import MARGIN, bytes_of
from lorakit.plan.estimating import Plan
from lorakit.plan.memory import OPTIMIZING, WRITING, Memory


@dataclass(frozen=True)
class Link:
    """A connection between GPUs of one node or between nodes, with its nominal rate in one direction and its source."""

    name: str
    bytes_per_second: float
    source: str


def _pcie(generation: int, transfers: float) -> Link:
    """Return a link of 16 lanes. Each lane sends one bit per transfer, and 128 of 130 bits are data."""
    rate = transfers * 16 * 128 / 130 / 8
    return Link(f"pcie{generation}", rate, f"PCI-SIG, PCI Express {generation}.0: {transfers / 1e9:g} GT/s, 16 lanes")


def _ethernet(gigabits: int) -> Link:
    return Link(f"{gigabits}gbe", gigabits * 1e9 / 8, f"IEEE 802.3: {gigabits} Gb/s, shared by the GPUs of a node")


def _nvlink(generation: int, gigabytes: int, card: str) -> Link:
    return Link(f"nvlink{generation}", gigabytes / 2 * 1e9, f"NVIDIA, {card}: {gigabytes} GB/s in both directions")


LINKS: dict[str, Link] = {
    link.name: link
    for link in (
        *(_pcie(generation, transfers) for generation, transfers in ((3, 8e9), (4, 16e9), (5, 32e9))),
        _nvlink(3, 600, "A100 data sheet"),
        _nvlink(4, 900, "H100 data sheet"),
        _nvlink(5, 1800, "Blackwell architecture"),
        *(_ethernet(gigabits) for gigabits in (10, 25, 100, 200, 400)),
    )
}
"""Name -> link."""

LINK, NETWORK = "pcie4", "100gbe"
"""Names of the links that are assumed within a node and between nodes."""

BUCKET_BYTES = 4 << 20
"""Size of gradients from which they are summed during the backward pass: what the network takes longer to send than to
begin (3 ms at 10 Gbit/s, against 0.1 ms), while the last bucket, which no backward pass hides, stays small."""

PER_NODE = 8
"""GPUs of a node, unless the user gives another number."""


def link_named(text: str, field: str) -> Link:
    """Return the link of a key of `LINKS`, or one with a rate such as "25GB/s"; a ConfigError names `field`."""
    if text.lower() in LINKS:
        return LINKS[text.lower()]
    try:
        rate = bytes_of(text.removesuffix("/s"))
    except ConfigError:
        rule = f"a rate such as 25GB/s, or one of {', '.join(LINKS)}"
        raise ConfigError(f"{field} is {text!r}; it must be {rule}.", what=text, field=field, allowed=LINKS) from None
    return Link(text, rate, "given")


@dataclass(frozen=True)
class Cluster:
    """The processes of a run, with one GPU for each, `per_node` of them in a node.

    Raises:
        ConfigError: A number is below 1, or the processes do not fill whole nodes.
    """

    processes: int = 1
    per_node: int = PER_NODE
    link: Link = LINKS[LINK]
    network: Link = LINKS[NETWORK]

    def __post_init__(self) -> None:
        for field, value in (("nproc", self.processes), ("gpus_per_node", self.per_node)):
            if value < 1:
                raise ConfigError.of(field, value, "an integer >= 1")
        if self.processes > self.per_node and self.processes % self.per_node:
            text = (
                f"nproc is {self.processes}, which does not fill nodes of {self.per_node} GPUs; pass a multiple of "
                f"{self.per_node}, or another --gpus-per-node."
            )
            raise ConfigError(text, what=self.processes, field="nproc")

    @property
    def local(self) -> int:
        """Return the number of processes on a node."""
        return min(self.processes, self.per_node)

    @property
    def nodes(self) -> int:
        """Return the number of nodes."""
        return self.processes // self.local

    @property
    def rate(self) -> float:
        """Return the rate of a ring through all processes in bytes per second: that of its slowest link."""
        within, between = self.link.bytes_per_second, self.network.bytes_per_second
        return within if self.nodes == 1 else min(within, between)


def all_reduce_bytes(size: int, processes: int) -> int:
    """Return how many bytes each process sends to sum tensors of `size` bytes. [Patarasuk and Yuan 2009, theorem 1]"""
    return round(2 * (processes - 1) / processes * size)


def all_gather_bytes(part: int, processes: int) -> int:
    """Return how many bytes each process sends so that all have the parts (`part` bytes each) of all."""
    return (processes - 1) * part


@dataclass(frozen=True)
class Traffic:
    """Bytes that each process sends during an optimizer step, and the time that they take.

    Attributes:
        gathered_bytes: Parts of the base that are sent to the other processes.
        reduced_bytes: Gradients.
        first_seconds: Part of `gather_seconds` that precedes the first block of a batch.
        last_seconds: Part of `reduce_seconds` that follows the last backward pass.
        backward: The step's last backward pass as a fraction of its computation.
    """

    gathered_bytes: int
    reduced_bytes: int
    gather_seconds: float
    first_seconds: float
    reduce_seconds: float
    last_seconds: float
    backward: float

    @property
    def sent_bytes(self) -> int:
        """Return the number of bytes that each process sends."""
        return self.gathered_bytes + self.reduced_bytes

    @property
    def seconds(self) -> float:
        """Return the time of all communication."""
        return self.gather_seconds + self.reduce_seconds

    @property
    def _never_hidden(self) -> float:
        return self.first_seconds + self.last_seconds

    @property
    def _hidden(self) -> float:
        """Return the time of communication that can run during the computation."""
        return self.seconds - self._never_hidden

    @property
    def _hidden_sum(self) -> float:
        """Return the time of communication that can run during the last backward pass only."""
        return self.reduce_seconds - self.last_seconds

    def exposed_seconds(self, compute_seconds: float) -> float:
        """Return the time of a step, which computes for `compute_seconds`, in which a process only waits."""
        beyond = max(self._hidden - compute_seconds, self._hidden_sum - self.backward * compute_seconds)
        return self._never_hidden + max(0.0, beyond)

    def scaling(self, compute_seconds: float) -> float:
        """Return the expected speed of each process, as a fraction of the speed of one that is alone."""
        return compute_seconds / (compute_seconds + self.exposed_seconds(compute_seconds))

    def seconds_for(self, scaling: float) -> float:
        """Return the shortest computation of a step with which the scaling is at least a fraction (0 to 1)."""
        waiting = (1 - scaling) / scaling  # seconds in which a process may wait per second of computation
        always = self._never_hidden
        return max(
            always / waiting,
            (always + self._hidden) / (waiting + 1),
            (always + self._hidden_sum) / (waiting + self.backward),
        )


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
    parts: dict[str | None, int] = {None: 0}
    for block, rows, columns in tensors_of_base(shape):
        parts[block] = parts.get(block, 0) + itemsize * -(-rows // processes) * columns
    return parts


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
        """Return the memory limit that the process needs in bytes: its peak plus `MARGIN`."""
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
