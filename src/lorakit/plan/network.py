"""Bytes and seconds of the communication between the processes of a run, and the scaling to expect.

Collectives are planned as rings, in which every process sends and receives the same number of bytes, and links at their
nominal rate; latency is not included.

Sources:
    Patarasuk and Yuan 2009, Bandwidth Optimal All-reduce Algorithms for Clusters of Workstations, J. Parallel Distrib.
        Comput. 69(2), for rings; Zhao et al. 2023, arXiv:2304.11277, for all-gathers that overlap with computation.
"""

from __future__ import annotations

from dataclasses import dataclass

from lorakit.errors import ConfigError
from lorakit.plan.budget import bytes_of


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
            raise ConfigError(
                f"nproc is {self.processes}, which does not fill nodes of {self.per_node} GPUs; pass a multiple of "
                f"{self.per_node}, or another --gpus-per-node.",
                what=self.processes,
                field="nproc",
            )

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


def hiding_tokens(itemsize: int, flops_per_second: float, bytes_per_second: float) -> float:
    """Return the tokens per batch from which a block's matmuls take longer than gathering the next block.

    A weight of `itemsize` bytes is used for two FLOPs per token, in the forward pass and again in the backward pass.
    """
    return itemsize * flops_per_second / (2 * bytes_per_second)


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
